"""Reads the folders that :class:`fastfs._monitor.record.parquet_sink.ParquetSink` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet
except ImportError as missing:
    raise ImportError('fastfs: reading Parquet needs pyarrow: pip install "fastfs[parquet]"') from missing

from fastfs._monitor.record.parquet_sink import HEADER_KEY, OTHERS_KEY
from fastfs._monitor.record.schema import (
    INTEGERS,
    KEYS,
    MORE_SCALARS,
    MOST_STEPS,
    SCALARS,
    TABLED,
    Array,
    Checker,
    UnknownSchemaError,
    parse,
    row_names,
    type_of,
)
from fastfs._report.jsonl_reader import LeftOut
from fastfs._report.store import ABSENT, Store

__all__ = ["read_headers", "read_parts"]

Line = dict[str, Any]

_FOREIGN = "expected a part of a record of fastfs.Monitor"
_UNREADABLE = (OSError, ValueError, pyarrow.ArrowException)


def read_parts(folder: Path, store: Store) -> tuple[list[Line], list[Line], LeftOut]:
    """Read the parts of all runs, in order, into a store.

    Returns:
        The headers, each once; lines of other kinds; what could not be read.

    Raises:
        ValueError: no part is of the format, or a run is of another version.
    """
    parts, left_out = _ordered(folder)
    headers: list[Line] = []
    others: list[Line] = []
    checker = Checker()
    for path, header, metadata in parts:
        try:
            checker.check(header)  # rows and lines to come are of this one
            lines = [checker.check(line).line for line in _list(parse(metadata.get(OTHERS_KEY, b"[]")))]
            table = _Rows(pyarrow.parquet.ParquetFile(path).read(), header)
        except _UNREADABLE as error:
            left_out.add(path.name, error)
            continue
        if header not in headers:
            headers.append(header)
            # Only the first part of a run that goes on says so: the others would forget its own steps.
            if header.get("resumed_at") is not None:
                run, step = header["run"], header["resumed_at"]
                store.forget(run, step)
                others = [o for o in others if o["run"] != run or o["step"] < step or o["kind"] == "structure"]
        others += lines
        names, layers = row_names(header)
        table.add_to(store, store.add_shape(header["run"], names, layers))
    return headers, others, left_out


def read_headers(folder: Path) -> tuple[list[Line], LeftOut]:
    """The header of each start of a run, in order, and what could not be read."""
    headers: list[Line] = []
    parts, left_out = _ordered(folder)
    for _, header, _ in parts:
        if header not in headers:
            headers.append(header)
    return headers, left_out


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{_FOREIGN}: its other lines are no list")
    return value


def _ordered(folder: Path) -> tuple[list[tuple[Path, Line, Mapping[bytes, bytes]]], LeftOut]:
    """Runs by their start, parts by their number."""
    found = []
    left_out = LeftOut(folder, "part")
    for path in sorted(folder.glob("part-*.parquet")):
        try:
            metadata = pyarrow.parquet.read_metadata(path).metadata
            if not metadata or HEADER_KEY not in metadata:
                raise ValueError(_FOREIGN)
            checked = Checker().check_bytes(metadata[HEADER_KEY])
            if checked.kind != "header":
                raise ValueError(_FOREIGN)
        except UnknownSchemaError as error:
            raise ValueError(f"{path}: {error}") from None
        except _UNREADABLE as error:
            left_out.add(path.name, error)
            continue
        found.append((path, checked.line, metadata))
    starts: dict[str, str] = {}
    for _, header, _ in found:
        starts[header["run"]] = min(starts.get(header["run"], "~"), header.get("started") or "")
    found.sort(key=lambda part: (starts[part[1]["run"]], part[1]["run"], part[0].name))
    return found, left_out


class _Rows:
    """The rows of one part, checked.

    Raises:
        ValueError: not of the format.
    """

    def __init__(self, table: Any, header: Line) -> None:
        self._table = table
        rows = len(table)
        if len(set(table.column_names)) != len(table.column_names) or not set(KEYS) <= set(table.column_names):
            raise ValueError(f"{_FOREIGN}: expected the columns {', '.join(KEYS)}, each once")
        names, _ = row_names(header)
        layer, step, time = self._key("layer", "i"), self._key("step", "i"), self._key("time", "f")
        kinds, labels = self._strings("kind")
        self.starts = np.flatnonzero(layer == 0)
        self.lengths = np.diff(np.append(self.starts, rows))
        if rows and (not len(names) or rows % len(names) or (layer != np.arange(rows) % len(names)).any()):
            raise ValueError(f"layer: expected the {len(names)} layers and groups of the header again and again")
        if not set(labels) <= set(TABLED) or (kinds < 0).any():
            raise ValueError(f"kind: expected {' or '.join(TABLED)}, got {', '.join(labels)}")
        kinds = np.array([label == "predicted" for label in labels], dtype=np.int8)[kinds]
        runs, ids = self._strings("run")
        if (runs < 0).any() or any(run != header["run"] for run in ids):
            raise ValueError(f"run: expected {header['run']}")
        if rows and (step.min() < 0 or step.max() >= MOST_STEPS or not np.isfinite(time).all()):
            raise ValueError("step, time: out of range")
        self._once(kind=kinds, step=step, time=time)
        self._records = (kinds[self.starts], step[self.starts], time[self.starts])
        self._values = {name: self._column(name) for name in table.column_names if name not in KEYS}
        self._once(**{name: self._values[name][1] for name in (*SCALARS, *MORE_SCALARS) if name in self._values})

    def add_to(self, store: Store, shape: int) -> None:
        kinds, steps, times = self._records
        row, record = store.rows, store.records
        store.add_records(kinds, np.full(len(kinds), shape), self.lengths, steps, times)
        for name, (kind, values) in self._values.items():
            if name in SCALARS or name in MORE_SCALARS:
                store.add_scalar(name, kind, values[self.starts], record)
            else:
                store.add_column(name, kind, _coded(store, values) if kind == "string" else values, row)

    def _once(self, **columns: Array) -> None:
        """One value for all rows of a record."""
        for name, values in columns.items():
            first = np.repeat(values[self.starts], self.lengths)
            if not np.array_equal(values, first, equal_nan=values.dtype.kind == "f"):
                raise ValueError(f"{name}: expected one value for all rows of a record")

    def _key(self, name: str, kind: str) -> Array:
        column = self._table[name]
        wanted = pyarrow.types.is_integer if kind == "i" else pyarrow.types.is_floating
        if not wanted(column.type) or column.null_count:
            raise ValueError(f"{name}: expected {'integers' if kind == 'i' else 'numbers'}, got {column.type}")
        values: Array = column.to_numpy()
        return values.astype(np.int64 if kind == "i" else np.float64)

    def _strings(self, name: str) -> tuple[Array, list[str]]:
        """Codes, -1 for null, and what they are of."""
        column = self._table[name]
        if pyarrow.types.is_null(column.type):
            return np.full(len(column), ABSENT, dtype=np.int32), []
        if pyarrow.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
            raise ValueError(f"{name}: expected strings, got {column.type}")
        encoded = pyarrow.compute.dictionary_encode(column.combine_chunks())
        if isinstance(encoded, pyarrow.ChunkedArray):
            encoded = encoded.combine_chunks()
        codes: Array = encoded.indices.fill_null(ABSENT).to_numpy(zero_copy_only=False)
        return codes.astype(np.int32), encoded.dictionary.to_pylist()

    def _column(self, name: str) -> tuple[str, Any]:
        column, types = self._table[name], pyarrow.types
        wanted = type_of(name)
        if types.is_null(column.type):
            return _nothing(wanted, len(column))
        boolean = types.is_boolean(column.type)
        number = types.is_integer(column.type) or types.is_floating(column.type)
        if wanted == "string" or (wanted is None and not boolean and not number):
            codes, labels = self._strings(name)
            return "string", np.array([*labels, None], dtype=object)[codes]
        if boolean and wanted in ("boolean", None):
            return "boolean", column.cast(pyarrow.int8()).fill_null(ABSENT).to_numpy()
        if not number or wanted == "boolean":
            raise ValueError(f"{name}: expected {wanted} values, got {column.type}")
        values = column.cast(pyarrow.float64(), safe=False).fill_null(np.nan).to_numpy()
        values = np.where(np.isfinite(values), values, np.nan)  # as in JSON
        if name in INTEGERS and not np.all(np.isnan(values) | ((values >= 0) & (values == np.floor(values)))):
            raise ValueError(f"{name}: expected integers >= 0")
        return "number", values


def _nothing(wanted: str | None, rows: int) -> tuple[str, Array]:
    if wanted == "string":
        return "string", np.full(rows, None, dtype=object)
    if wanted == "boolean":
        return "boolean", np.full(rows, ABSENT, dtype=np.int8)
    return "number", np.full(rows, np.nan)


def _coded(store: Store, values: Sequence[Any]) -> Array:
    codes = {text: ABSENT if text is None else store.code(text) for text in set(values)}
    return np.array([codes[text] for text in values], dtype=np.int32)
