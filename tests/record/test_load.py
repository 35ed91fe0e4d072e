"""The table of fastfs.load: columns and types, resumed runs, files of schema 1, torn lines, memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import fastfs
from benchmarks.monitor.load_record import write_record
from fastfs._record.columns import ALWAYS_PER_STEP, PER_LAYER
from fastfs._record.reading.jsonl_reader import RowReader, split_lines
from fastfs._record.reading.load import load_compact, read_header
from fastfs._record.reading.store import Store
from fastfs._record.record import Record
from fastfs._record.sinks.jsonl_sink import JsonlSink
from fastfs._record.sinks.parquet_sink import ParquetSink
from tests.helpers.record_cases import alert, head, measured, predicted

SKIPPED = Record("skipped", 3, 103.0, {"reason": "overflow"})
STRUCTURE = Record("structure", 0, 99.0, {}, {"cut": [True] * 3, "reason": [None] * 3, "parameters": [8] * 3})


@pytest.fixture(params=["jsonl", "parquet"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Writes a header and records. Returns the path."""

    def write(records: list[dict[str, Any]], header: Any = None) -> Any:
        sink = (JsonlSink if request.param == "jsonl" else ParquetSink)(tmp_path / f"run.{request.param}")
        sink.open(header or head())
        sink.write(records)
        sink.close()
        return tmp_path / f"run.{request.param}"

    return write


def test_one_row_for_each_record_and_layer(write: Any) -> None:
    path = write([STRUCTURE, measured(0), predicted(1), SKIPPED, alert(3), measured(2, cos_angle_q10=0.125)])
    table = fastfs.load(path)
    assert list(table) == [
        *("kind", "run", "step", "time", "layer", "name", "group"),
        *PER_LAYER,
        "cos_angle_q10",
        *ALWAYS_PER_STEP,
    ]
    assert table["kind"].tolist() == ["measured"] * 4 + ["predicted"] * 4 + ["measured"] * 4
    assert table["layer"].tolist() == [0, 1, 2, 3] * 3
    assert table["name"].tolist() == ["blocks.0", "blocks.1", "blocks.2", "all"] * 3
    assert table["group"].tolist() == [False, False, False, True] * 3
    assert table["angle"].tolist()[:4] == measured(0).columns["angle"]
    assert table["angle"].isna().tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert table["update_rms"].tolist()[4] == 0.03
    assert table["update_rms"].isna().sum() == 3
    assert table["cos_angle_q10"].tolist()[-4:] == [0.125] * 4
    assert table["loss"].tolist() == [0.5] * 12
    assert table["method"].tolist()[:5] == ["plain"] * 4 + [None]
    assert (table["valid"].dtype, table["count"].dtype) == ("boolean", "float64")
    assert table[table["valid"]]["kind"].unique().tolist() == ["measured"]
    assert table["why"].isna().all()
    assert table.attrs["headers"] == [head()]
    assert table.attrs["alerts"] == [{"kind": "alert", "run": "a", "step": 3, "time": 103.0, **alert(3).scalars}]
    assert table.attrs["skipped"] == [{"kind": "skipped", "run": "a", "step": 3, "time": 103.0, "reason": "overflow"}]
    assert [line["layers"]["cut"] for line in table.attrs["structure"]] == [[True] * 3]


def test_columns_without_missing_values_have_their_own_types(write: Any) -> None:
    table = fastfs.load(write([measured(0, rows=5)]))
    for name in ("step", "layer", "count", "nonfinite", "rows", "micro_batches"):
        assert table[name].dtype == "int64", name
    assert table["valid"].dtype == table["group"].dtype == "bool"
    assert table["residual"].dtype == table["radial_update"].dtype == table["loss_scale"].dtype == "float64"


def test_a_run_without_rows_is_an_empty_table(write: Any) -> None:
    table = fastfs.load(write([]))
    assert len(table) == 0
    assert {"angle", "step", "loss"} <= set(table)
    assert table.attrs["headers"] == [head()]


def test_columns_of_later_versions_are_kept(write: Any) -> None:
    more = measured(0, flavour=["up", None, "down", "up"], colour=2.5)
    table = fastfs.load(write([Record("measured", 0, 1.0, {**more.scalars, "mood": "calm"}, more.columns)]))
    assert table["flavour"].tolist() == ["up", None, "down", "up"]
    assert table["colour"].tolist() == [2.5] * 4
    assert table["mood"].tolist() == ["calm"] * 4


def test_steps_that_a_resumed_run_repeats_count_once(write: Any) -> None:
    write([STRUCTURE, *(measured(step) for step in range(10)), alert(8)])
    write([measured(20, loss=9.0)], head(run="b", started="2026-01-02T00:00:00+00:00"))
    path = write([measured(step, loss=0.25) for step in range(6, 12)], head(resumed_at=6))
    table = fastfs.load(path)
    own = table[table["run"] == "a"].drop_duplicates("step").sort_values("step")
    assert own["step"].tolist() == list(range(12))
    assert own["loss"].tolist() == [0.5] * 6 + [0.25] * 6
    assert len(table) == 13 * 4
    assert table.attrs["alerts"] == []
    assert len(table.attrs["structure"]) == 1
    assert sorted(header["run"] for header in table.attrs["headers"]) == ["a", "a", "b"]
    compact = load_compact(path)
    assert compact["run"].astype(str).tolist() == table["run"].tolist()
    assert compact["step"].tolist() == table["step"].tolist()
    assert read_header(path, "a")["resumed_at"] == 6
    with pytest.raises(ValueError, match="no run 'c'"):
        read_header(path, "c")


def test_files_of_the_first_version_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    lines = [{"kind": "header", "schema": 1, "run": "old", "layers": ["x", "y"]}]
    for step in (0, 5):
        for layer, name in enumerate("xy"):
            lines.append(
                {
                    "kind": "measured",
                    "run": "old",
                    "step": step,
                    "time": 1.0,
                    "layer": layer,
                    "name": name,
                    "angle": None if layer else 1.25,
                    "cos_angle": 0.3,
                    "update_rms": 0.1,
                    "valid": True,
                    "nonfinite": 0,
                    "count": 64,
                    "loss": 0.5,
                    "micro_batches": 2,
                    "measure_seconds": 0.125,
                }
            )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sink = JsonlSink(path)
    sink.open(head())
    sink.write([measured(0)])
    sink.close()
    table = fastfs.load(path)
    old = table[table["run"] == "old"]
    assert old["layer"].tolist() == [0, 1, 0, 1]
    assert old["name"].tolist() == ["x", "y", "x", "y"]
    assert old["overhead_seconds"].tolist() == [0.125] * 4
    assert old["angle"].fillna(-1).tolist() == [1.25, -1, 1.25, -1]
    assert not old["group"].any()
    assert (table["count"].dtype, table["micro_batches"].tolist()) == ("int64", [2] * 4 + [1] * 4)
    assert len(table) == 8
    assert read_header(path, "old")["schema"] == 1


def test_other_schemas_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"kind":"header","schema":99,"run":"a"}\n')
    for read in (fastfs.load, read_header):
        with pytest.raises(ValueError, match=r"schema 99; this version of fastfs reads \[1, 2\]"):
            read(path)
    folder = tmp_path / "empty.parquet"
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no run"):
        fastfs.load(folder)
    pd.DataFrame({"a": [1]}).to_parquet(folder / "part-x-000000.parquet")
    with pytest.raises(ValueError, match="expected a part of a record"):
        fastfs.load(folder)
    with pytest.raises(FileNotFoundError):
        fastfs.load(tmp_path / "none")


def test_a_torn_header_does_not_make_the_file_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(head(), separators=(",", ":")).encode()[:60])
    with pytest.raises(ValueError, match="holds no run"):
        fastfs.load(path)
    sink = JsonlSink(path)
    sink.open(head(run="b"))
    sink.write([measured(0)])
    sink.close()
    assert fastfs.load(path)["run"].unique().tolist() == ["b"]


def long_record(path: Any, layers: Any, rows: Any) -> Any:
    write_record(path, layers, rows)
    return path


@pytest.mark.parametrize("layers", [100, 2])
def test_reading_takes_little_more_than_the_table(tmp_path: Path, layers: int) -> None:
    path = long_record(tmp_path / "long.jsonl", layers, 30_000)
    fastfs.load(long_record(tmp_path / "short.jsonl", layers, 1000))  # imports, caches
    tracemalloc.start()
    try:
        table = fastfs.load(path)
        _, peak = tracemalloc.get_traced_memory()
        size = int(table.memory_usage(index=False, deep=False).sum())
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        compact = load_compact(path)
        _, peak_compact = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # In addition to the table: a chunk of the file, one drain of the native reader, and a reserve of a tenth.
    chunk = 3 * (1 << 20) + (1 << 15) * 200
    assert peak < 1.25 * size + chunk
    assert compact.memory_usage(index=False, deep=False).sum() < 0.62 * size
    assert peak_compact - before < 0.8 * size + chunk
    assert len(table) == len(compact) == 30_000


def test_without_the_native_core_the_table_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = long_record(tmp_path / "long.jsonl", 7, 700)
    whole = fastfs.load(path)
    monkeypatch.setattr("fastfs._core.ops._C", None)
    pd.testing.assert_frame_equal(fastfs.load(path), whole)


def test_the_native_reader_accepts_what_the_sink_writes(tmp_path: Path) -> None:
    """Otherwise records would be read ten times slower, and nothing would show it."""
    path = tmp_path / "a.jsonl"
    sink = JsonlSink(path)
    sink.open(head(groups={"all": ["blocks.0"], "two": []}))
    records = [measured(0, groups=2, linear=True, decrease_why="clipped", cos_angle_q10=0.5), predicted(1, groups=2)]
    records[0].scalars.update(kappa=3.5, choices=4, choices_changed=0, other=1.5)
    sink.write(records)
    sink.close()
    lines = [line for _, line, _ in split_lines(path)]
    reader = RowReader(path, Store())
    reader.read()
    native = reader._native
    native.expect("a", 0, 5)
    for line in lines[1:]:
        data = line + b"\n"
        assert native.read(data, 0) == len(data), line
    assert native.rows == 10
    slow = json.dumps({**json.loads(lines[1]), "run": "b"}).encode() + b"\n"
    assert native.read(slow, 0) == 0
