"""What a long record holds, in memory: a typed array for each column, however many lines it came in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastfs._monitor.record.schema import Array, Checked, type_of

__all__ = ["ABSENT", "Growing", "Store"]

ABSENT = -1
"""Code of a string or boolean that is null or absent."""


class Growing:
    """An array that grows at its end. What is skipped holds ``fill``.

    Room for ``reserve`` entries is asked for at once: memory that is not written to costs nothing, and a copy into a
    larger array would need both.
    """

    def __init__(self, dtype: Any, fill: Any, reserve: int = 0) -> None:
        self._data: Array = np.empty(max(reserve, 1024), dtype=dtype)
        self._fill = fill
        self.size = 0

    def write(self, at: int, values: Any, count: int) -> None:
        """``count`` values (or one for all of them) at a place that is not before the end."""
        self._grow(at + count)
        self._data[self.size : at] = self._fill
        self._data[at : at + count] = values
        self.size = at + count

    def reserve(self, size: int) -> None:
        """Make room for that many entries in all."""
        if size > len(self._data):
            self._data.resize(size, refcheck=False)  # in place where the allocator can

    def view(self, size: int) -> Array:
        """The first ``size`` entries, until the array grows the next time."""
        self.write(size, self._fill, 0) if size > self.size else None
        return self._data[:size]

    def take(self, size: int) -> Array:
        """The array, cut to ``size``; leaves nothing behind."""
        if size > self.size:
            self.write(size, self._fill, 0)
        data, self._data = self._data, np.empty(0, dtype=self._data.dtype)
        data.resize(size, refcheck=False)
        return data

    def _grow(self, size: int) -> None:
        if size > len(self._data):
            self.reserve(max(size, len(self._data) * 5 // 4))


class Store:
    """Records in the order of their lines.

    Columns are under their name and the type of their values: ``number`` (float64, or what is asked for), ``boolean``
    and ``string`` (codes into ``strings``). Known columns have one type; others may have several.

    Args:
        number: dtype of the columns of layers that hold numbers.
        leave_out: columns that are not kept.
    """

    def __init__(self, number: Any = np.float64, leave_out: Iterable[str] = ()) -> None:
        self.rows = 0
        self.records = 0
        self.runs: list[str] = []  # of each shape
        self.names: list[Sequence[str]] = []
        self.layers: list[int] = []
        self.strings: list[str] = []
        self.columns: dict[tuple[str, str], Growing] = {}
        self.scalars: dict[tuple[str, str], Growing] = {}
        self.kinds, self.shapes, self.lengths, self.firsts = (self._ints(t) for t in (np.int8, *[np.int32] * 3))
        self.steps = Growing(np.int64, 0)
        self.times = Growing(np.float64, np.nan)
        self.gone = Growing(np.bool_, False)
        self._number = number
        self._leave_out = frozenset(leave_out)
        self._codes: dict[str, int] = {}
        self._room = (0, 0)

    @staticmethod
    def _ints(dtype: Any) -> Growing:
        return Growing(dtype, 0)

    def add_shape(self, run: str, names: Sequence[str], layers: int) -> int:
        """What the rows to come of a run are of; its number."""
        if self.runs and self.runs[-1] == run and self.names[-1] == names:
            return len(self.runs) - 1
        self.runs.append(run)
        self.names.append(names)
        self.layers.append(layers)
        return len(self.runs) - 1

    def expect(self, rows: int, records: int) -> None:
        """About so many will come in all."""
        self._room = rows, records
        for growing in self.columns.values():
            growing.reserve(rows)
        for growing in (self.kinds, self.shapes, self.lengths, self.steps, self.times, *self.scalars.values()):
            growing.reserve(records)

    def add(self, checked: Checked, shape: int) -> None:
        """One line."""
        line = checked.line
        self.add_records(
            np.array([checked.kind == "predicted"]), np.array([shape]), np.array([checked.length]),
            np.array([line["step"]]), np.array([line["time"]], dtype=np.float64),
        )  # fmt: skip
        if checked.first:
            self.firsts.write(self.records - 1, checked.first, 1)
        for name, values in checked.columns.items():
            self.add_column(name, _typed(values), values, self.rows - checked.length)
        for name, value in checked.scalars.items():
            values = np.array([value], dtype=object if isinstance(value, str) else None)
            self.add_scalar(name, _typed(values), values, self.records - 1)

    def add_records(self, kinds: Array, shapes: Array, lengths: Array, steps: Array, times: Array) -> None:
        """Records without their columns, which are added after. ``kinds``: 1 for predicted."""
        count = len(kinds)
        for growing, values in (
            (self.kinds, kinds), (self.shapes, shapes), (self.lengths, lengths), (self.steps, steps),
            (self.times, times),
        ):  # fmt: skip
            growing.write(self.records, values, count)
        self.records += count
        self.rows += int(lengths.sum())

    def add_column(self, name: str, kind: str, values: Array, at: int) -> None:
        """Values of rows from ``at`` on."""
        if name not in self._leave_out:
            self._write(self.columns, name, kind, values, at, self._number, self._room[0])

    def add_scalar(self, name: str, kind: str, values: Array, at: int) -> None:
        """Values of records from ``at`` on."""
        if name not in self._leave_out:
            self._write(self.scalars, name, kind, values, at, np.float64, self._room[1])

    def code(self, text: str) -> int:
        """The number of a string."""
        code = self._codes.get(text)
        if code is None:
            code = self._codes[text] = len(self.strings)
            self.strings.append(text)
        return code

    def forget(self, run: str, step: int) -> None:
        """A run goes on at this step: what it recorded from there on before is done again."""
        own = np.array([other == run for other in self.runs], dtype=bool)
        if own.any() and self.records:
            late = own[self.shapes.view(self.records)] & (self.steps.view(self.records) >= step)
            self.gone.view(self.records)[late] = True

    def _write(
        self,
        into: dict[tuple[str, str], Growing],
        name: str,
        kind: str,
        values: Array,
        at: int,
        number: Any,
        room: int,
    ) -> None:
        growing = into.get((name, kind))
        if growing is None:
            dtype, fill = {
                "number": (number, np.nan), "boolean": (np.int8, ABSENT), "string": (np.int32, ABSENT)
            }[kind]  # fmt: skip
            growing = into[name, kind] = Growing(dtype, fill, room)
        if kind == "string" and values.dtype == object:
            values = np.array([ABSENT if value is None else self.code(value) for value in values], dtype=np.int32)
        with np.errstate(over="ignore"):  # beyond float32, where that is asked for: infinite
            growing.write(at, values, len(values))


def _typed(values: Array) -> str:
    if values.dtype == object:
        return "string"
    return "boolean" if values.dtype in (np.int8, np.bool_) else "number"


def known_type(name: str) -> str:
    """Of a column of the format: as :class:`Store` has it."""
    kind = type_of(name)
    return "number" if kind in (None, "integer") else str(kind)


def merged(parts: Mapping[str, Array], strings: Array) -> Array:
    """A column that was recorded with values of several types: objects."""
    (size,) = {len(values) for values in parts.values()}
    result = np.full(size, None, dtype=object)
    for kind, values in parts.items():
        given = ~np.isnan(values) if kind == "number" else values != ABSENT
        found = values[given]
        result[given] = strings[found] if kind == "string" else found.astype(bool) if kind == "boolean" else found
    return result
