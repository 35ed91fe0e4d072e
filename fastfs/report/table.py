"""Puts the table of :func:`fastfs.load` together from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas

from fastfs.monitor.record.rows import BOOLEANS, COLUMNS, INTEGERS, SCALARS, STRINGS

__all__ = ["Builder"]

_KEYS = ("kind", "run", "step", "time", "layer", "name", "group")
_NAMED = ("kind", "run", "name", *STRINGS)
_OLD_NAMES = {"measure_seconds": "overhead_seconds"}  # of schema 1

Array = np.ndarray[Any, Any]


class Builder:
    """Takes records one by one; keeps numbers as arrays, since a long run has tens of millions of them."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._frames: list[tuple[int, pandas.DataFrame]] = []  # with the number of blocks before
        self._others: list[Mapping[str, Any]] = []

    def add(self, line: Mapping[str, Any], names: Sequence[str], layers: int) -> None:
        """A line of schema 2: columns with a value for each layer and group."""
        columns = line.get("layers") or {}
        length = max(map(len, columns.values()), default=0)
        scalars = {key: value for key, value in line.items() if key not in ("kind", "run", "step", "time", "layers")}
        self._blocks.append(
            _Block(
                line["kind"], line["run"], line["step"], line["time"], length, names, layers,
                {name: _array(name, values) for name, values in columns.items()}, scalars,
            )
        )  # fmt: skip

    def add_row(self, line: Mapping[str, Any]) -> None:
        """A line of schema 1: one layer."""
        values = {_OLD_NAMES.get(key, key): value for key, value in line.items() if key not in _KEYS}
        columns = {name: _array(name, [value]) for name, value in values.items() if name not in SCALARS}
        scalars = {name: value for name, value in values.items() if name in SCALARS}
        self._blocks.append(
            _Block(
                line["kind"], line["run"], line["step"], line["time"], 1, (line["name"],), 1, columns, scalars,
                line["layer"],
            )
        )  # fmt: skip

    def add_frame(self, frame: pandas.DataFrame) -> None:
        """Rows that are a table already."""
        if len(frame):
            self._frames.append((len(self._blocks), frame))

    def add_other(self, line: Mapping[str, Any]) -> None:
        self._others.append(line)

    def forget(self, run: str, step: int) -> None:
        """A run goes on at this step: what it recorded from there on before is done again."""
        self._blocks = [b for b in self._blocks if b.run != run or b.step < step]
        self._frames = [(n, frame[(frame["run"] != run) | (frame["step"] < step)]) for n, frame in self._frames]
        self._others = [
            line
            for line in self._others
            if line.get("run") != run or line["step"] < step or line["kind"] == "structure"
        ]

    def table(self, headers: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
        """The table, with its ``attrs``."""
        frames = [frame for _, frame in self._frames if len(frame)]
        data = self._columns()
        if frames and not self._blocks:
            extra = dict.fromkeys(name for frame in frames for name in frame.columns if name not in data)
            data = {
                name: _typed(name, np.concatenate([_from_frame(frame, name) for frame in frames]))
                for name in (*data, *extra)
            }
        else:
            data = {name: _typed(name, values) for name, values in data.items()}
        others = [name for name in data if name not in (*_KEYS, *COLUMNS, *SCALARS)]
        table = pandas.DataFrame({name: data[name] for name in (*_KEYS, *COLUMNS, *others, *SCALARS)})
        table.attrs = {
            "headers": [dict(header) for header in headers],
            "structure": self._of("structure"),
            "alerts": self._of("alert"),
            "skipped": self._of("skipped"),
        }
        return table

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [dict(line) for line in self._others if line["kind"] == kind]

    def _columns(self) -> dict[str, Array]:
        blocks = self._blocks
        lengths = np.array([block.length for block in blocks], dtype=np.int64)
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(blocks) else 0
        starts = (ends - lengths).tolist()

        def repeat(values: list[Any], dtype: Any) -> Array:
            array = np.empty(len(values), dtype=dtype)
            array[:] = values
            return np.repeat(array, lengths)

        data: dict[str, Array] = {
            "kind": repeat([b.kind for b in blocks], object),
            "run": repeat([b.run for b in blocks], object),
            "step": repeat([b.step for b in blocks], np.int64),
            "time": repeat([b.time for b in blocks], np.float64),
            "layer": np.empty(total, dtype=np.int64),
            "name": np.empty(total, dtype=object),
            "group": np.empty(total, dtype=bool),
        }
        extra = dict.fromkeys(name for b in blocks for name in b.columns if name not in COLUMNS)
        for name in (*COLUMNS, *extra):
            kind: Any = object if name in (*STRINGS, *BOOLEANS) else np.float64
            if name in extra and any(b.columns[name].dtype == object for b in blocks if name in b.columns):
                kind = object
            data[name] = np.full(total, None if kind is object else np.nan, dtype=kind)
        for start, block in zip(starts, blocks, strict=True):
            stop = start + block.length
            block.name(data["layer"][start:stop], data["name"][start:stop], data["group"][start:stop])
            for name, values in block.columns.items():
                data[name][start : start + len(values)] = values
        more = dict.fromkeys(name for b in blocks for name in b.scalars if name not in (*data, *SCALARS))
        for name in (*SCALARS, *more):
            given = [b.scalars.get(name) for b in blocks]
            text = any(isinstance(value, (str, list, dict)) for value in given)
            data[name] = repeat(given, object if text else np.float64)
        return data


class _Block:
    """One record."""

    __slots__ = ("_layers", "_names", "columns", "first", "kind", "length", "run", "scalars", "step", "time")

    def __init__(
        self,
        kind: str,
        run: str,
        step: int,
        time: float,
        length: int,
        names: Sequence[str],
        layers: int,
        columns: dict[str, Array],
        scalars: dict[str, Any],
        first: int = 0,
    ) -> None:
        self.kind, self.run, self.step, self.time, self.length = kind, run, step, time, length
        self.columns, self.scalars, self.first = columns, scalars, first
        self._names, self._layers = names, layers

    def name(self, layer: Array, name: Array, group: Array) -> None:
        layer[:] = np.arange(self.first, self.first + self.length)
        known = min(len(self._names), self.length)
        name[:known] = self._names[:known]
        name[known:] = [str(index) for index in range(known, self.length)]
        group[:] = np.arange(self.length) >= self._layers


def _array(name: str, values: Sequence[Any]) -> Array:
    """A column of one record; null is NaN."""
    if name in STRINGS or name in BOOLEANS:
        return np.array(values, dtype=object)
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError):  # a column that this version does not know, of strings perhaps
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return array


def _from_frame(frame: pandas.DataFrame, name: str) -> Array:
    if name not in frame:
        return np.full(len(frame), None, dtype=object) if name in (*_NAMED, *BOOLEANS) else np.full(len(frame), np.nan)
    column = frame[name]
    if name in (*_NAMED, *BOOLEANS) or not pandas.api.types.is_numeric_dtype(column):
        values: Array = column.to_numpy(dtype=object, copy=True)
        values[column.isna().to_numpy()] = None
        return values
    numbers: Array = column.to_numpy()
    return numbers


def _typed(name: str, values: Array) -> Any:
    if name in BOOLEANS:
        known = np.array([value is not None for value in values], dtype=bool)
        flags = np.where(known, values, False).astype(bool)
        return flags if known.all() else pandas.arrays.BooleanArray(flags, ~known)
    if name in INTEGERS and values.dtype != np.int64 and np.isfinite(values).all():
        return values.astype(np.int64)
    if values.dtype == object:
        values[[isinstance(value, float) and value != value for value in values]] = None  # a part without the column
        return pandas.Series(values, dtype=object)
    return values
