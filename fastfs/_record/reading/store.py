"""The rows of a record in memory, as one typed array per column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastfs._record.columns import type_of
from fastfs._record.schema import Array, CheckedLine

__all__ = ["ABSENT", "GrowingArray", "Store", "known_type", "merged"]

ABSENT = -1
"""Code of a string or boolean that is null or missing."""


class GrowingArray:
    """An array that grows at its end.

    Memory for ``reserve`` entries is allocated at once: unused pages cost nothing, while a copy to a larger array needs
    memory for both.

    Args:
        dtype: of the array.
        fill: value of entries that are skipped.
        reserve: expected size.
    """

    def __init__(self, dtype: Any, fill: Any, reserve: int = 0) -> None:
        self._data: Array = np.empty(max(reserve, 1024), dtype=dtype)
        self._fill = fill
        self.size = 0

    def write(self, at: int, values: Any, count: int) -> None:
        """Writes ``count`` values (or one value for all of them) at a position that is not before the end."""
        self._grow(at + count)
        self._data[self.size : at] = self._fill
        self._data[at : at + count] = values
        self.size = at + count

    def reserve(self, size: int) -> None:
        """Allocates memory for so many entries in total."""
        if size > len(self._data):
            self._data.resize(size, refcheck=False)  # in place where the allocator can

    def view(self, size: int) -> Array:
        """Returns the first ``size`` entries; valid until the array grows."""
        self.write(size, self._fill, 0) if size > self.size else None
        return self._data[:size]

    def take(self, size: int) -> Array:
        """Returns the array, cut to ``size``, and leaves this object empty."""
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

    Columns are stored by name and type of value: ``number``, ``boolean`` (int8), ``string`` (codes into ``strings``).
    Declared columns have one type; others may have several.

    Args:
        number: dtype of numbers per layer.
        leave_out: columns that are not stored.
    """

    def __init__(self, number: Any = np.float64, leave_out: Iterable[str] = ()) -> None:
        self.rows = 0
        self.records = 0
        self.runs: list[str] = []  # of each block
        self.names: list[Sequence[str]] = []
        self.layers: list[int] = []
        self.strings: list[str] = []
        self.columns: dict[tuple[str, str], GrowingArray] = {}
        self.scalars: dict[tuple[str, str], GrowingArray] = {}
        self.kinds, self.shapes, self.lengths, self.firsts = (self._ints(t) for t in (np.int8, *[np.int32] * 3))
        self.steps = GrowingArray(np.int64, 0)
        self.times = GrowingArray(np.float64, np.nan)
        self.gone = GrowingArray(np.bool_, False)
        self._number = number
        self._leave_out = frozenset(leave_out)
        self._codes: dict[str, int] = {}
        self._room = (0, 0)

    @staticmethod
    def _ints(dtype: Any) -> GrowingArray:
        return GrowingArray(dtype, 0)

    def add_shape(self, run: str, names: Sequence[str], layers: int) -> int:
        """Declares the layers and groups of the following rows of a run. Returns the index of this declaration."""
        if self.runs and self.runs[-1] == run and self.names[-1] == names:
            return len(self.runs) - 1
        self.runs.append(run)
        self.names.append(names)
        self.layers.append(layers)
        return len(self.runs) - 1

    def expect(self, rows: int, records: int) -> None:
        """Allocates memory for about so many rows and records in total."""
        self._room = rows, records
        for growing in self.columns.values():
            growing.reserve(rows)
        for growing in (self.kinds, self.shapes, self.lengths, self.steps, self.times, *self.scalars.values()):
            growing.reserve(records)

    def add(self, checked: CheckedLine, shape: int) -> None:
        """Adds one line."""
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
        """Adds records; their columns are added afterwards. ``kinds`` is 1 for predicted records."""
        count = len(kinds)
        for growing, values in (
            (self.kinds, kinds), (self.shapes, shapes), (self.lengths, lengths), (self.steps, steps),
            (self.times, times),
        ):  # fmt: skip
            growing.write(self.records, values, count)
        self.records += count
        self.rows += int(lengths.sum())

    def add_column(self, name: str, kind: str, values: Array, at: int) -> None:
        """Adds values of the rows from ``at`` on."""
        if name not in self._leave_out:
            self._write(self.columns, name, kind, values, at, self._number, self._room[0])

    def add_scalar(self, name: str, kind: str, values: Array, at: int) -> None:
        """Adds values of the records from ``at`` on."""
        if name not in self._leave_out:
            self._write(self.scalars, name, kind, values, at, np.float64, self._room[1])

    def code(self, text: str) -> int:
        """Returns the code of a string."""
        code = self._codes.get(text)
        if code is None:
            code = self._codes[text] = len(self.strings)
            self.strings.append(text)
        return code

    def forget(self, run: str, step: int) -> None:
        """Marks the records of a run from ``step`` on as removed, because the run resumes there."""
        own = np.array([other == run for other in self.runs], dtype=bool)
        if own.any() and self.records:
            late = own[self.shapes.view(self.records)] & (self.steps.view(self.records) >= step)
            self.gone.view(self.records)[late] = True

    def _write(
        self,
        into: dict[tuple[str, str], GrowingArray],
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
            growing = into[name, kind] = GrowingArray(dtype, fill, room)
        if kind == "string" and values.dtype == object:
            values = np.array([ABSENT if value is None else self.code(value) for value in values], dtype=np.int32)
        with np.errstate(over="ignore"):  # what overflows float32 becomes infinite
            growing.write(at, values, len(values))


def _typed(values: Array) -> str:
    if values.dtype == object:
        return "string"
    return "boolean" if values.dtype in (np.int8, np.bool_) else "number"


def known_type(name: str) -> str:
    """The type under which :class:`Store` has a declared column."""
    kind = type_of(name)
    return "number" if kind in (None, "integer") else str(kind)


def merged(parts: Mapping[str, Array], strings: Array) -> Array:
    """Joins a column that was recorded with values of several types to an array of objects."""
    (size,) = {len(values) for values in parts.values()}
    result = np.full(size, None, dtype=object)
    for kind, values in parts.items():
        given = ~np.isnan(values) if kind == "number" else values != ABSENT
        found = values[given]
        result[given] = strings[found] if kind == "string" else found.astype(bool) if kind == "boolean" else found
    return result
