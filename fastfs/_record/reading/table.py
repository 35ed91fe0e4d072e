"""Builds the table of :func:`fastfs.load` from a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas

from fastfs._record.columns import ALWAYS_PER_STEP, PER_LAYER, ROW_KINDS, type_of
from fastfs._record.reading.store import ABSENT, GrowingArray, Store, known_type, merged
from fastfs._record.schema import Array

__all__ = ["make_table"]


def make_table(
    store: Store, headers: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], *, compact: bool = False
) -> pandas.DataFrame:
    """Builds the table with its ``attrs``. Empties the store column by column, so that no column exists twice.

    Args:
        store: of all records.
        headers: of their runs.
        others: lines of other kinds.
        compact: whether to represent strings as categories and leave out columns that were not recorded.

    Returns:
        The table.
    """
    builder = _Builder(store, compact)
    data = builder.keys()
    columns = builder.columns(store.columns, PER_LAYER)
    scalars = builder.scalars()
    # A name that is a column per layer and per step, in records of other versions, is that of the column per layer.
    extra = {name: values for name, values in columns.items() if name not in PER_LAYER}
    data |= {name: columns[name] for name in PER_LAYER if name in columns} | extra
    data |= {name: values for name, values in scalars.items() if name not in data}
    table = pandas.DataFrame(data, copy=False)
    table.attrs = {
        "headers": [dict(header) for header in headers],
        "structure": _of(others, "structure"),
        "alerts": _of(others, "alert"),
        "skipped": _of(others, "skipped"),
    }
    return table


def _of(others: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [dict(line) for line in others if line["kind"] == kind]


class _Builder:
    def __init__(self, store: Store, compact: bool) -> None:
        self._store = store
        self._compact = compact
        self._total = store.rows
        self._strings = _objects(store.strings)
        gone = store.gone.take(store.records)
        self._lengths = store.lengths.take(store.records)
        self._keep: Array | None = None
        self._alive: Array | None = None
        if gone.any():
            self._alive = ~gone
            self._keep = np.repeat(self._alive, self._lengths)
            self._lengths = self._lengths[self._alive]

    def keys(self) -> dict[str, Any]:
        store = self._store
        kinds, shapes, firsts = (self._records(g) for g in (store.kinds, store.shapes, store.firsts))
        runs, codes, _ = _names([store.runs])  # a run that is resumed after another one is declared again
        data: dict[str, Any] = {
            "kind": self._text(self._rows(kinds), _objects(ROW_KINDS)),
            "run": self._text(self._rows(codes[shapes]), runs),
            "step": self._rows(self._records(store.steps)),
            "time": self._rows(self._records(store.times)),
        }
        ends = np.cumsum(self._lengths, dtype=np.int64)
        layer = self._rows(firsts - ends + self._lengths)
        layer += np.arange(len(layer))
        data["layer"] = layer
        every, codes, starts = _names(store.names)
        place = self._rows(starts[shapes] if len(starts) else shapes)
        place += layer
        data["name"] = self._text(codes[place] if len(codes) else place, every)
        layers = np.array(store.layers, dtype=np.int64)
        data["group"] = layer >= self._rows(layers[shapes] if len(layers) else shapes)
        return data

    def columns(self, found: dict[tuple[str, str], GrowingArray], known: Sequence[str]) -> dict[str, Any]:
        """Returns the columns per layer by name. Declared columns that were not recorded have null values."""
        result: dict[str, Any] = {}
        for name, kinds in _by_name(found, () if self._compact else known).items():
            parts = {kind: self._kept(found.pop((name, kind)).take(self._total)) for kind in kinds}
            size = int(self._lengths.sum())
            result[name] = self._public(name, parts or {known_type(name): _nulls(known_type(name), size)})
        return result

    def scalars(self) -> dict[str, Any]:
        """Returns the values per step, repeated for each row: undeclared and optional ones, then the others."""
        store = self._store
        result: dict[str, Any] = {}
        names = _by_name(store.scalars, () if self._compact else ALWAYS_PER_STEP)
        for name in [*(n for n in names if n not in ALWAYS_PER_STEP), *(n for n in names if n in ALWAYS_PER_STEP)]:
            parts = {kind: self._records(store.scalars.pop((name, kind))) for kind in names[name]}
            parts = parts or {"number": _nulls("number", len(self._lengths))}
            result[name] = self._public(name, {kind: self._rows(values) for kind, values in parts.items()})
        return result

    def _records(self, growing: GrowingArray) -> Array:
        values = growing.take(self._store.records)
        return values if self._alive is None else values[self._alive]

    def _kept(self, values: Array) -> Array:
        return values if self._keep is None else values[self._keep]

    def _rows(self, values: Array) -> Array:
        return np.repeat(values, self._lengths)

    def _text(self, codes: Array, categories: Array) -> Any:
        if self._compact:
            return pandas.Categorical.from_codes(codes, pandas.Index(categories, dtype=object), validate=False)
        return pandas.Series(categories[codes], dtype=object, copy=False)

    def _public(self, name: str, parts: dict[str, Array]) -> Any:
        """Converts a column to its form in the table, see :func:`fastfs.load`."""
        if len(parts) > 1:
            return pandas.Series(merged(parts, self._strings), dtype=object, copy=False)
        ((kind, values),) = parts.items()
        if kind == "number":
            return values.astype(np.int64) if type_of(name) == "integer" and np.isfinite(values).all() else values
        known = values != ABSENT
        if kind == "boolean":
            flags = values == 1
            return flags if known.all() else pandas.arrays.BooleanArray(flags, ~known)
        if self._compact:
            return pandas.Categorical.from_codes(values, pandas.Index(self._strings, dtype=object), validate=False)
        # The last entry is for the code -1 of missing values.
        return pandas.Series(np.append(self._strings, _objects([None]))[values], dtype=object, copy=False)


def _by_name(found: Mapping[tuple[str, str], GrowingArray], known: Sequence[str]) -> dict[str, list[str]]:
    """Returns the types of each column, the declared ones first."""
    result: dict[str, list[str]] = {name: [] for name in known}
    for name, kind in found:
        result.setdefault(name, []).append(kind)
    return result


def _names(shapes: Sequence[Sequence[str]]) -> tuple[Array, Array, Array]:
    """Returns the distinct names, the codes of the names of all shapes (concatenated), and where each shape starts."""
    codes: dict[str, int] = {}
    flat = [codes.setdefault(name, len(codes)) for names in shapes for name in names]
    starts = np.cumsum([0, *(len(names) for names in shapes)])[:-1]
    return _objects(list(codes)), np.array(flat, dtype=np.int32), starts.astype(np.int64)


def _nulls(kind: str, size: int) -> Array:
    return np.full(size, np.nan) if kind == "number" else np.full(size, ABSENT, dtype=np.int8)


def _objects(values: Sequence[Any]) -> Array:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
