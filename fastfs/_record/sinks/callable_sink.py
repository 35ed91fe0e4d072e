"""Records as calls of a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastfs._record.record import Record, as_rows

__all__ = ["CallableSink"]

Row = dict[str, Any]


class CallableSink:
    """Calls a function with each batch of rows: ``sinks=[rows.extend]`` collects them in a list.

    A row is a dictionary with ``kind, run, step, time, layer, name, group``, the record's columns at that layer and its
    values per step. A record without columns (an alert, a skipped step) is one dictionary. Numbers may be NaN. The
    function runs in the writer's thread; if it raises, it gets the same rows again later.
    """

    def __init__(self, function: Callable[[list[Row]], object]) -> None:
        self._function = function
        self._header: Mapping[str, Any] = {}

    def open(self, header: Mapping[str, Any]) -> None:
        self._header = header

    def write(self, records: Sequence[Record]) -> None:
        self._function([row for record in records for row in as_rows(record, self._header)])

    def close(self) -> None:
        pass
