"""What is recorded of one step, and its form as a line of a file and as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastfs._record.columns import ROW_KINDS
from fastfs._record.detail_columns import DETAILS
from fastfs._record.schema import row_names

__all__ = ["Record", "as_line", "as_rows"]

Scalar = float | int | str | None


@dataclass(frozen=True)
class Record:
    """What is known about one optimizer step.

    Attributes:
        kind: ``structure``, ``measured``, ``predicted``, ``details``, ``skipped`` or ``alert``.
        step: number of the optimizer step, from 0.
        time: seconds since 1970.
        scalars: values per step, by column.
        columns: values per layer, by column: those of the header's layers followed by those of its groups. Empty for
            ``skipped`` and ``alert``; of ``details`` lists with a value for each entry.
    """

    kind: str
    step: int
    time: float
    scalars: dict[str, Scalar] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Approximate number of values, for memory bounds."""
        return 8 + len(self.scalars) + sum(map(len, self.columns.values()))


def as_line(record: Record, run: str) -> dict[str, Any]:
    """Converts a record to the object on a line of a JSONL file."""
    line: dict[str, Any] = {"kind": record.kind, "run": run, "step": record.step, "time": record.time, **record.scalars}
    if record.columns:
        line["entries" if record.kind == DETAILS else "layers"] = record.columns
    return line


def as_rows(record: Record, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Converts a record to dictionaries.

    Returns:
        One per layer and group for a measured or predicted step, a single one for other kinds.
    """
    common = {"kind": record.kind, "run": header["run"], "step": record.step, "time": record.time}
    if record.kind not in ROW_KINDS:
        columns = {"entries" if record.kind == DETAILS else "layers": record.columns} if record.columns else {}
        return [{**common, **record.scalars, **columns}]
    names, layers = row_names(header)
    length = max(map(len, record.columns.values()))
    return [
        {
            **common,
            "layer": index,
            "name": names[index] if index < len(names) else str(index),
            "group": index >= layers,
            **{key: column[index] for key, column in record.columns.items() if index < len(column)},
            **record.scalars,
        }
        for index in range(length)
    ]
