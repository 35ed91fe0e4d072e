"""Converts the rows of a run to layer x step grids, and thins these for display."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfs._record.columns import KEYS
from fastfs._record.reading.confidence import LARGEST_FACTOR, Backtest, factors
from fastfs._report.quantities import NOT_QUANTITIES, QUANTITIES, Quantity

if TYPE_CHECKING:
    import pandas

__all__ = [
    "Grid",
    "Predictions",
    "Thinned",
    "empty_grid",
    "has_numbers",
    "judge_predictions",
    "make_grid",
    "quantities_of",
    "thin",
    "thin_series",
]

Array = np.ndarray[Any, Any]

_NOT_SHOWN = NOT_QUANTITIES | {"measure_seconds", *(key.name for key in KEYS)}
_MOST_OTHERS = 12


@dataclass(frozen=True)
class Grid:
    """All records of one kind: a column per step, a row per layer or group.

    Attributes:
        steps, times, loss, overhead: (steps,).
        columns: float32 arrays (rows, steps) by name, NaN where a value is missing.
        invalid: (rows, steps), whether a row was measured and is not valid.
        why: (rows, steps), indices into ``reasons``.
        reasons: texts.
        scale: gradient scale, (steps,); None if it is not in the table.
        overshoot: of the step, (steps,); None if it is not in the table.
        ranks: number of ranks whose numbers a row has, (steps,); None if it is not in the table.
        apart: (rows, steps), number of a rank that stands apart, NaN if none does; None if it is not in the table.
    """

    steps: Array
    times: Array
    loss: Array
    overhead: Array
    columns: dict[str, Array]
    invalid: Array
    why: Array
    reasons: list[str]
    scale: Array | None = None
    ranks: Array | None = None
    apart: Array | None = None
    overshoot: Array | None = None


def empty_grid(rows: int) -> Grid:
    """Returns a grid without steps."""
    none: Array = np.empty(0)
    cells: Array = np.zeros((rows, 0), np.uint8)
    return Grid(none.astype(np.int64), none, none, none, {}, cells.astype(bool), cells, [])


def quantities_of(table: pandas.DataFrame, where: Array | None = None) -> list[Quantity]:
    """Lists the quantities of a table: those with at least one number, then up to 12 others.

    Args:
        table: with a column per quantity.
        where: mask of the rows to look at; all of them if None.

    Returns:
        The quantities, in the order of the menu.
    """
    errors = {quantity.error for quantity in QUANTITIES}
    known = {quantity.key: quantity for quantity in QUANTITIES}
    others = [c for c in table.columns if c not in _NOT_SHOWN and c not in known and c not in errors]
    found = [q for q in QUANTITIES if has_numbers(table, q.key, where)]
    numeric = [c for c in others if has_numbers(table, c, where)]
    return found + [Quantity(c, c, "see record", "Column of the record.", guarded=True) for c in numeric[:_MOST_OTHERS]]


def has_numbers(table: pandas.DataFrame, column: str, where: Array | None) -> bool:
    """Returns whether a table has a column with at least one number, in the rows of a mask if one is given."""
    if column not in table.columns:
        return False
    given = ~np.isnan(_numbers(table, column))
    return bool((given if where is None else given & where).any())


def _numbers(table: pandas.DataFrame, column: str) -> Array:
    import pandas

    values = pandas.to_numeric(table[column], "coerce")
    if values.dtype == np.float32:
        return np.asarray(values)
    return np.asarray(values.to_numpy(dtype=np.float64, na_value=np.nan))


def make_grid(table: pandas.DataFrame, rows: int, columns: Sequence[str], where: Array | None = None) -> Grid:
    """Converts rows of one kind to grids. Of a step that occurs twice the last occurrence counts.

    Args:
        table: with the columns ``step`` and ``layer``.
        rows: number of layers and groups.
        columns: to convert; those that the table does not have become NaN.
        where: mask of the rows of that kind, so that a large table need not be copied; all of them if None.

    Returns:
        The grids.
    """
    import pandas

    every = where is None or bool(where.all())

    def chosen(values: Array) -> Array:
        return values if every else values[where]

    steps, at = np.unique(chosen(table["step"].to_numpy(dtype=np.int64)), return_inverse=True)
    layer = chosen(table["layer"].to_numpy(dtype=np.int64))
    shape = (rows, len(steps))

    def per_step(name: str) -> Array:
        values = np.full(len(steps), np.nan)
        if name in table.columns:
            values[at] = chosen(_numbers(table, name))
        return values

    grids = {}
    for name in columns:
        cells = np.full(shape, np.nan, dtype=np.float32)
        if name in table.columns:
            with np.errstate(over="ignore"):
                cells[layer, at] = chosen(_numbers(table, name))
        cells[~np.isfinite(cells)] = np.nan
        grids[name] = cells
    invalid = np.zeros(shape, dtype=bool)
    why = np.zeros(shape, dtype=np.uint8)
    reasons = ["no reason given"]
    if "valid" in table.columns:
        flagged = (table["valid"] == False).to_numpy(dtype=bool, na_value=False)  # noqa: E712 - None is not False
        invalid[layer, at] = chosen(flagged)
    if "why" in table.columns:
        codes, found = pandas.factorize(chosen(np.asarray(table["why"], dtype=object)))
        reasons += [str(reason)[:200] for reason in found[:254]]
        why[layer, at] = np.where(codes < 254, codes + 1, 0)
    scale, ranks, overshoot = (
        per_step(name) if name in table.columns else None for name in ("gradient_scale", "ranks", "overshoot")
    )
    apart = None
    if "rank_apart" in table.columns:
        apart = np.full(shape, np.nan)
        apart[layer, at] = chosen(_numbers(table, "rank_apart"))
    seconds = per_step("overhead_seconds")
    of_steps = steps, per_step("time"), per_step("loss"), seconds
    return Grid(*of_steps, grids, invalid, why, reasons, scale, ranks, apart, overshoot)


@dataclass(frozen=True)
class Predictions:
    """Predicted speeds of a run, and how far they can be trusted: :mod:`fastfs._record.reading.confidence`.

    Attributes:
        ratios: (rows, measured steps), measured speed over the one that would have been predicted, NaN for none.
        given: (rows, predicted steps), whether the record has a predicted speed.
        factors: (rows, predicted steps), within which the speed is with a probability of 80 %; NaN if not known.
    """

    ratios: Array
    given: Array
    factors: Array

    @property
    def withheld(self) -> Array:
        """(rows, predicted steps), the predictions that are not shown: their factor is too large or not known."""
        return self.given & ~(self.factors <= LARGEST_FACTOR)


def judge_predictions(table: pandas.DataFrame, measured: Grid, predicted: Grid, where: Array) -> Predictions:
    """Compares measured speeds with those that would have been predicted, and gives every prediction its factor.

    Args:
        table: of the run.
        measured: grid of the measured rows.
        predicted: grid of the predicted rows.
        where: mask of the measured rows.

    Returns:
        What is known about the predictions.
    """
    rows = len(measured.invalid)
    needed = make_grid(table, rows, ("cos_angle", "residual", "linear"), where).columns
    backtest, ratios = Backtest(), np.full(measured.invalid.shape, np.nan)
    for i in range(len(measured.steps)):
        cosine, residual, linear = (needed[name][:, i] for name in ("cos_angle", "residual", "linear"))
        ratios[:, i] = backtest.add(cosine, residual, ~measured.invalid[:, i], linear == 1)
    speed = predicted.columns.get("update_rms", np.full(predicted.invalid.shape, np.nan))
    return Predictions(ratios, np.isfinite(speed), factors(ratios, measured.steps, predicted.steps))


@dataclass(frozen=True)
class Thinned:
    """The steps of a grid that are shown.

    Attributes:
        index: (columns,), into the grid's steps.
        merged: (columns,), number of steps that each of them represents.
        invalid: (rows, columns), how many of these were not valid.
    """

    index: Array
    merged: Array
    invalid: Array


def thin(grid: Grid, most: int, alert_steps: Sequence[int] = ()) -> Thinned:
    """Chooses at most ``most`` steps, one of each group of neighbors. Nothing is averaged.

    It is the step with the most alerts, then the one with the most cells that are not valid, then the last one. The
    result also says how many cells of the group were not valid.

    Args:
        grid: of one kind of rows.
        most: number of steps.
        alert_steps: steps of the alerts.

    Returns:
        The chosen steps.
    """
    total = len(grid.steps)
    edges = np.unique(np.linspace(0, total, min(total, most) + 1).round().astype(np.int64))
    alerts = np.zeros(total)
    if total and len(alert_steps):
        # An alert between two measured steps counts for the first of them.
        at = np.searchsorted(grid.steps, np.asarray(alert_steps), side="right") - 1
        np.add.at(alerts, np.clip(at, 0, None), 1)
    score = alerts * (grid.invalid.shape[0] + 1) + grid.invalid.sum(axis=0)
    starts, ends = edges[:-1], edges[1:]
    index = np.array(
        [e - 1 - int(np.argmax(score[s:e][::-1])) for s, e in zip(starts, ends, strict=True)], dtype=np.int64
    )
    counts = np.add.reduceat(grid.invalid.astype(np.int64), starts, axis=1) if len(starts) else grid.invalid[:, :0]
    return Thinned(index, ends - starts, counts.astype(np.uint16))


def thin_series(steps: Array, values: Array, most: int) -> tuple[Array, Array]:
    """Thins a line to about ``most`` points: the lowest and the highest of each group of neighbors."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(steps) <= most:
        return steps, values
    edges = np.linspace(0, len(steps), max(most // 2, 1) + 1).round().astype(np.int64)
    keep = {0, len(steps) - 1}
    for start, end in itertools.pairwise(edges):
        keep |= {start + int(np.argmin(values[start:end])), start + int(np.argmax(values[start:end]))}
    chosen = np.array(sorted(keep))
    return steps[chosen], values[chosen]
