"""What is recorded: one :class:`Record` a step, its line in a file and its rows in a table. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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

SCHEMA = 2
"""Version of the record's format: raised when a column changes its meaning or goes."""

TABLED = ("measured", "predicted")
"""Kinds of records that become rows of a table."""

QUANTITIES = (
    "angle",
    "cos_angle",
    "update_rms",
    "relative_update",
    "feature_rms",
    "backward_rms",
    "radial_update",
    "tangential_update",
    "noise_floor",
)
"""Columns that come from :class:`fastfs.FeatureStats`, under the names that they have there."""

COLUMNS = (
    *QUANTITIES,
    "valid",
    "why",
    "method",
    "nonfinite",
    "count",
    "rows",
    "angle_se",
    "update_rms_se",
    "residual_se",
    "aligned_decrease",
    "decrease_why",
    "residual",
    "linear",
    "parameter_norm",
    "parameter_update_norm",
    "gradient_norm",
)
"""Columns with a number for each layer and group, in the order of a table. A record may have others (quantiles)."""

SCALARS = ("loss", "micro_batches", "overhead_seconds", "loss_scale", "choices", "choices_changed")
"""One number for a whole record."""

BOOLEANS = ("valid", "linear")
INTEGERS = ("nonfinite", "count", "rows", "micro_batches", "choices", "choices_changed")
STRINGS = ("why", "method", "decrease_why")

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


def row_names(header: Mapping[str, Any]) -> tuple[list[str], int]:
    """Names of the layers and then of the groups, and how many are layers."""
    layers = list(header.get("layers", ()))
    return layers + list(header.get("groups") or ()), len(layers)


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
