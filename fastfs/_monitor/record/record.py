"""What is recorded: one :class:`Record` a step, its line in a file and its rows in a table. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastfs._monitor.record.schema import (
    BOOLEANS,
    COLUMNS,
    INTEGERS,
    QUANTITIES,
    SCALARS,
    SCHEMA,
    STRINGS,
    TABLED,
    row_names,
)

__all__ = [
    "BOOLEANS",
    "COLUMNS",
    "INTEGERS",
    "QUANTITIES",
    "SCALARS",
    "SCHEMA",
    "STRINGS",
    "TABLED",
    "Record",
    "as_line",
    "as_rows",
    "row_names",
]

Scalar = float | int | str | None


@dataclass(frozen=True)
class Record:
    """What is known of one optimizer step.

    Attributes:
        kind: ``structure``, ``measured``, ``predicted``, ``skipped`` or ``alert``.
        step: number of the optimizer step; the first is 0.
        time: seconds since 1970.
        scalars: one value for the whole step.
        columns: one value for each layer of the header, then for each group; empty for ``skipped`` and ``alert``.
    """

    kind: str
    step: int
    time: float
    scalars: dict[str, Scalar] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of values, for bounds on memory."""
        return 8 + len(self.scalars) + sum(map(len, self.columns.values()))


def as_line(record: Record, run: str) -> dict[str, Any]:
    """What a line of a JSONL file holds."""
    line: dict[str, Any] = {"kind": record.kind, "run": run, "step": record.step, "time": record.time, **record.scalars}
    if record.columns:
        line["layers"] = record.columns
    return line


def as_rows(record: Record, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Plain dictionaries: one for each layer and group of a measured or predicted step, a single one for the others."""
    common = {"kind": record.kind, "run": header["run"], "step": record.step, "time": record.time}
    if record.kind not in TABLED:
        return [{**common, **record.scalars, **({"layers": record.columns} if record.columns else {})}]
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
