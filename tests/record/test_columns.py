"""The declarations of columns, and that the monitor and every sink and reader follow them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet
import pytest
import torch

import fastfs
from fastfs._core import ops
from fastfs._record.columns import (
    BY_NAME,
    COLUMNS,
    EVENT_FIELDS,
    FROM_STATS,
    KEYS,
    KINDS,
    PER_LAYER,
    PER_STEP,
    ROW_KINDS,
    SCHEMAS,
    quantile_name,
)
from fastfs._record.reading.jsonl_reader import RowReader
from fastfs._record.reading.store import Store
from fastfs._record.record import Record
from fastfs._record.sinks.jsonl_sink import JsonlSink
from fastfs._record.sinks.parquet_sink import ParquetSink
from fastfs.models import ResNet
from tests.helpers.monitor_cases import train
from tests.helpers.record_cases import LAYERS, head

VALUES = {"number": [0.5, None, -1e-300], "integer": [0, None, 7], "boolean": [True, None, False]}
VALUES["string"] = ["plain", None, "rounding noise"]
ARROW = {"number": "double", "integer": "int64", "boolean": "bool", "string": "string"}


def full_record(step: int = 0) -> Any:
    """A measured record with every declared column and a value for each layer of `LAYERS`."""
    columns = {column.name: VALUES[column.type] for column in COLUMNS if column.per == "layer"}
    scalars = {column.name: VALUES[column.type][0] for column in COLUMNS if column.per == "step"}
    return Record("measured", step, 1.0, scalars, columns)


def written(sink: Any) -> Any:
    sink.open(head(groups={}))
    sink.write([full_record(0), full_record(1)])
    sink.close()
    return sink


def test_declarations_are_consistent() -> None:
    names = [column.name for column in (*KEYS, *COLUMNS)]
    assert len(set(names)) == len(names)
    assert [column.name for column in COLUMNS] == [*PER_LAYER, *PER_STEP]
    assert set(EVENT_FIELDS) | set(ROW_KINDS) | {"header"} == set(KINDS)
    shown = [column for column in COLUMNS if column.display is not None]
    assert sorted(column.display.menu for column in shown) == list(range(len(shown)))
    for column in COLUMNS:
        assert column.meaning, column.name
        assert set(column.kinds) <= set(ROW_KINDS)
        assert column.since in SCHEMAS
    for column in shown:
        assert (column.type, column.per) == ("number", "layer")
        assert column.display.error is None or BY_NAME[column.display.error].unit == column.unit
    for name in FROM_STATS:
        assert isinstance(getattr(fastfs.FeatureStats, name), property)


def test_the_monitor_records_the_declared_columns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ResNet(8, 16, 2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    path = tmp_path / "record.jsonl"
    with fastfs.Monitor(
        model, optimizer, every=3, aligned_every=1, amplify=True, quantiles=(0.1,), path=path, verbose=False
    ):
        train(model, optimizer, 6)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for kind in ROW_KINDS:
        declared = {column.name for column in COLUMNS if kind in column.kinds}
        quantiles = {quantile_name(column.name, 0.1) for column in COLUMNS if column.quantiles and kind == "measured"}
        found = [line for line in lines if line["kind"] == kind]
        assert found
        for line in found:
            optional = {column.name for column in COLUMNS if column.optional or column.option}
            assert set(line["layers"]) == {name for name in declared if name in PER_LAYER} - optional | quantiles
            given = set(line) - {"kind", "run", "step", "time", "layers"}
            assert given | optional == {name for name in declared if name in PER_STEP} | optional
            assert given <= declared
    structure = next(line for line in lines if line["kind"] == "structure")
    assert list(structure["layers"]) == [field.name for field in EVENT_FIELDS["structure"]]


@pytest.mark.skipif(not ops.native_available(), reason="no native core")
def test_the_native_reader_knows_every_column(tmp_path: Path) -> None:
    path = written(JsonlSink(tmp_path / "a.jsonl")).path
    lines = path.read_bytes().splitlines(keepends=True)
    reader = RowReader(path, Store())
    reader.read()
    native = reader._native
    native.expect("a", 0, len(LAYERS))
    for line in lines[1:]:
        assert native.read(line, 0) == len(line)
    drained = native.drain()
    assert list(drained["columns"]) == list(PER_LAYER)
    assert list(drained["scalars"]) == list(PER_STEP)


def test_the_native_reader_numbers_types_like_the_python_one() -> None:
    from fastfs._record.reading.jsonl_reader import _NATIVE_TYPES

    source = Path(__file__).parents[2] / "csrc" / "record_lines.h"
    (body,) = re.findall(r"enum class ValueKind : int \{(.*?)\}", source.read_text())
    numbers = {name: int(number) for name, number in re.findall(r"(\w+) = (\d+)", body)}
    names = {"number": "number", "integer": "integer", "boolean": "boolean", "string": "text"}
    assert {name: numbers[names[name]] for name in _NATIVE_TYPES} == {name: i for i, name in enumerate(_NATIVE_TYPES)}


def test_tables_and_parquet_files_have_the_declared_types(tmp_path: Path) -> None:
    table = fastfs.load(written(JsonlSink(tmp_path / "a.jsonl")).path)
    assert list(table)[: len(KEYS)] == [key.name for key in KEYS]
    assert set(table) == set(BY_NAME)
    dtypes = {"number": "float64", "integer": "float64", "boolean": "boolean", "string": "object"}
    for name in PER_LAYER:
        assert table[name].dtype == dtypes[BY_NAME[name].type], name
        assert [None if pd.isna(value) else value for value in table[name][:3]] == VALUES[BY_NAME[name].type]
    sink = written(ParquetSink(tmp_path / "a.parquet"))
    pd.testing.assert_frame_equal(fastfs.load(sink.folder), table)
    for part in sorted(sink.folder.iterdir()):
        schema = pyarrow.parquet.read_schema(part)
        assert {field.name: str(field.type) for field in schema if field.name in BY_NAME} == {
            name: ARROW[BY_NAME[name].type] for name in schema.names if name in BY_NAME
        }
        assert [name for name in schema.names if name in PER_LAYER] == list(PER_LAYER)
