"""Reads the folders that :class:`fastfs.monitor.ParquetSink` writes."""

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

from fastfs._record.columns import KEYS, PER_STEP, ROW_KINDS, type_of
from fastfs._record.encoding import HEADER_KEY, OTHERS_KEY, parse
from fastfs._record.reading.rejected_lines import RejectedLines
from fastfs._record.reading.store import ABSENT, Store
from fastfs._record.schema import MOST_STEPS, Array, Checker, Line, UnknownSchemaError, row_names

__all__ = ["read_headers", "read_parts"]

_KEYS = tuple(key.name for key in KEYS)
_FOREIGN = "expected a part of a record of fastfs.Monitor"
_UNREADABLE = (OSError, ValueError, pyarrow.ArrowException)


def read_parts(folder: Path, store: Store) -> tuple[list[Line], list[Line], RejectedLines]:
    """Reads the parts of all runs into a store, in order.

    Returns:
        The headers, each once; lines of other kinds; the parts that could not be read.

    Raises:
        ValueError: a run has an unknown schema version.
    """
    parts, rejected = _ordered(folder)
    headers: list[Line] = []
    others: list[Line] = []
    checker = Checker()
    for path, header, metadata in parts:
        try:
            checker.check(header)  # the rows and lines of this part are checked against it
            lines = [checker.check(line).line for line in _list(parse(metadata.get(OTHERS_KEY, b"[]")))]
            table = _Rows(pyarrow.parquet.ParquetFile(path).read(), header)
        except _UNREADABLE as error:
            rejected.add(path.name, error)
            continue
        if header not in headers:
            headers.append(header)
            # Only at the first part after a resume: later ones would drop the steps of their own run.
            if header.get("resumed_at") is not None:
                run, step = header["run"], header["resumed_at"]
                store.forget(run, step)
                others = [o for o in others if o["run"] != run or o["step"] < step or o["kind"] == "structure"]
        others += lines
        names, layers = row_names(header)
        table.add_to(store, store.add_shape(header["run"], names, layers))
    return headers, others, rejected


def read_headers(folder: Path) -> tuple[list[Line], RejectedLines]:
    """Returns the header of each start of a run, in order, and the parts that could not be read."""
    headers: list[Line] = []
    parts, rejected = _ordered(folder)
    for _, header, _ in parts:
        if header not in headers:
            headers.append(header)
    return headers, rejected


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{_FOREIGN}: its other lines are not a list")
    return value


def _ordered(folder: Path) -> tuple[list[tuple[Path, Line, Mapping[bytes, bytes]]], RejectedLines]:
    """Returns the parts ordered by start of their run and by number, with header and metadata."""
    found = []
    rejected = RejectedLines(folder, "part")
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
            rejected.add(path.name, error)
            continue
        found.append((path, checked.line, metadata))
    starts: dict[str, str] = {}
    for _, header, _ in found:
        starts[header["run"]] = min(starts.get(header["run"], "~"), header.get("started") or "")
    found.sort(key=lambda part: (starts[part[1]["run"]], part[1]["run"], part[0].name))
    return found, rejected


class _Rows:
    """The checked rows of one part.

    Raises:
        ValueError: the rows do not conform to the schema.
    """

    def __init__(self, table: Any, header: Line) -> None:
        self._table = table
        rows = len(table)
        if len(set(table.column_names)) != len(table.column_names) or not set(_KEYS) <= set(table.column_names):
            raise ValueError(f"{_FOREIGN}: expected the columns {', '.join(_KEYS)}, each once")
        names, _ = row_names(header)
        layer, step, time = self._key("layer", "i"), self._key("step", "i"), self._key("time", "f")
        kinds, labels = self._strings("kind")
        self.starts = np.flatnonzero(layer == 0)
        self.lengths = np.diff(np.append(self.starts, rows))
        if rows and (not len(names) or rows % len(names) or (layer != np.arange(rows) % len(names)).any()):
            raise ValueError(f"layer: expected the {len(names)} layers and groups of the header repeated in order")
        if not set(labels) <= set(ROW_KINDS) or (kinds < 0).any():
            raise ValueError(f"kind: expected {' or '.join(ROW_KINDS)}, got {', '.join(labels)}")
        kinds = np.array([label == "predicted" for label in labels], dtype=np.int8)[kinds]
        runs, ids = self._strings("run")
        if (runs < 0).any() or any(run != header["run"] for run in ids):
            raise ValueError(f"run: expected {header['run']}")
        if rows and (step.min() < 0 or step.max() >= MOST_STEPS or not np.isfinite(time).all()):
            raise ValueError("step, time: out of range")
        self._once(kind=kinds, step=step, time=time)
        self._records = (kinds[self.starts], step[self.starts], time[self.starts])
        self._values = {name: self._column(name) for name in table.column_names if name not in _KEYS}
        self._once(**{name: self._values[name][1] for name in PER_STEP if name in self._values})

    def add_to(self, store: Store, shape: int) -> None:
        kinds, steps, times = self._records
        row, record = store.rows, store.records
        store.add_records(kinds, np.full(len(kinds), shape), self.lengths, steps, times)
        for name, (kind, values) in self._values.items():
            if name in PER_STEP:
                store.add_scalar(name, kind, values[self.starts], record)
            else:
                store.add_column(name, kind, _coded(store, values) if kind == "string" else values, row)

    def _once(self, **columns: Array) -> None:
        """Raises ValueError if rows of one record have different values."""
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
        """Encodes a column of strings. Returns the codes (-1 for null) and the strings."""
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
            return _nulls(wanted, len(column))
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
        values = np.where(np.isfinite(values), values, np.nan)  # as in JSON lines
        if wanted == "integer" and not np.all(np.isnan(values) | ((values >= 0) & (values == np.floor(values)))):
            raise ValueError(f"{name}: expected integers >= 0")
        return "number", values


def _nulls(wanted: str | None, rows: int) -> tuple[str, Array]:
    if wanted == "string":
        return "string", np.full(rows, None, dtype=object)
    if wanted == "boolean":
        return "boolean", np.full(rows, ABSENT, dtype=np.int8)
    return "number", np.full(rows, np.nan)


def _coded(store: Store, values: Sequence[Any]) -> Array:
    codes = {text: ABSENT if text is None else store.code(text) for text in set(values)}
    return np.array([codes[text] for text in values], dtype=np.int32)
