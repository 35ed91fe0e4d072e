"""The columns of a record that the report shows, with their names, units and explanations."""

from __future__ import annotations

from dataclasses import dataclass

from fastfs._record import columns
from fastfs._record.column import Column, Display
from fastfs._record.columns import COLUMNS

__all__ = ["NOT_QUANTITIES", "PREDICTED", "QUANTITIES", "UNUSED", "Quantity"]


@dataclass(frozen=True)
class Quantity:
    """A column as the page shows it; see :class:`fastfs._record.column.Display`."""

    key: str
    label: str
    unit: str
    about: str
    log: bool = False
    guarded: bool = False
    error: str | None = None


def _quantity(column: Column, display: Display) -> Quantity:
    return Quantity(
        column.name,
        display.label,
        column.unit or "no unit",
        display.about,
        display.logarithmic,
        display.guarded,
        display.error,
    )


QUANTITIES = tuple(_quantity(column, column.display) for column in columns.QUANTITIES if column.display)
"""In the order of the menu."""

PREDICTED = frozenset(column.name for column in columns.QUANTITIES if "predicted" in column.kinds)
"""Quantities of predicted records."""

NOT_QUANTITIES = frozenset(column.name for column in COLUMNS if column.per != "layer" or column.type != "number")
"""Declared columns that are not numbers per layer."""

UNUSED = NOT_QUANTITIES - {
    "valid",
    "why",
    "linear",
    "loss",
    "overhead_seconds",
    "gradient_scale",
    "overshoot",
    "ranks",
    "rank_apart",
}
"""Columns that the report does not need."""
