"""How large a difference between runs has to be: standard errors, and a bound on false alarms over all comparisons.

Three situations give the standard error of a difference ``d`` of scaled values (:meth:`Measure.scaled`):

* **Equal state.** Two runs with the same seed and data are equal, up to rounding, until something makes them part. If
  the sizes of features, backward vectors and gradients before a step agree in all layers, the only noise of
  this step is rounding.
* **Spread over layers.** Otherwise two runs differ in every number, and only what the optimizer's settings determine
  almost alone is compared, the sizes of parameter updates: the common factor of the other layers is removed. The noise
  is the spread of the other layers (an externally studentized residual), and how much the layer itself changes against
  the others from one measured step to the next. A difference in all layers alike does not show.
* **Replicates.** With several runs on one side, the variance between them is the noise (a pooled t statistic), but at
  least its median over layers, so that a variance that is small by chance does not count.

Tails are those of Student's t with the degrees of freedom of the variance, by Satterthwaite's formula. Without
replicates they are at most :data:`HEAVY`, because the noise of layers differs and has heavy tails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastfs._compare.measures import Measure
from fastfs._compare.runs import AlignedRuns
from fastfs.scaling._fit import stats

__all__ = ["HEAVY", "NATURAL", "Differences", "level_of", "of_pair", "of_replicates", "same_state", "with_median"]

Array = np.ndarray[Any, Any]

HEAVY = 4.0
"""Largest number of degrees of freedom without replicates."""

NATURAL = 0.005
"""Least relative standard error between runs in different states, however alike the other layers are."""

_SAME = 1e-5  # relative difference up to which two states are equal
_ROUNDING = 1e-6  # relative error of a sum in float32, with a margin
_AMPLIFIED = 10.0  # by how much a difference of states may be amplified within a step
_STATE = ("feature_rms", "backward_rms", "gradient_norm")  # before the step; norms of parameters are those after it


@dataclass(frozen=True)
class Differences:
    """Differences of one measure between two sides, shape (layers, steps) each, NaN where nothing can be said.

    Attributes:
        difference: of the scaled values, second minus first side.
        error: its standard error.
        freedom: degrees of freedom of the error.
    """

    difference: Array
    error: Array
    freedom: Array

    @property
    def errors(self) -> Array:
        """The difference in standard errors."""
        return self.difference / self.error

    @property
    def p(self) -> Array:
        """Two-sided p-values."""
        found = np.full(self.difference.shape, np.nan)
        told = np.isfinite(self.difference) & np.isfinite(self.freedom)
        if told.any():
            found[told] = 2 * stats().t.sf(np.abs(self.errors[told]), self.freedom[told])
        return found


def level_of(step: Array, cells: Array, confidence: float) -> Array:
    """Level of each test at the k-th step, k from 0, so that all together raise a false alarm with 1 - confidence.

    The levels of the steps, (1 - confidence) / ((k + 1)(k + 2)), add up to at most 1 - confidence however many follow;
    what is found at a step does not depend on later ones. Within a step it is Bonferroni's, valid under any dependence.

    Args:
        step: k.
        cells: number of tests at this step.
        confidence: such as 0.95.

    Returns:
        The levels.
    """
    level: Array = (1 - confidence) / ((step + 1.0) * (step + 2.0)) / np.maximum(cells, 1)
    return level


def same_state(aligned: AlignedRuns) -> tuple[Array, Array]:
    """Finds the steps before which two runs are in the same state.

    Args:
        aligned: two runs.

    Returns:
        Whether it is the same, and the largest relative difference, (steps,) each; NaN if nothing is recorded.
    """
    rows = [np.concatenate([aligned.values(column) for column in _STATE], axis=1), aligned.losses()[:, None]]
    first, second = np.concatenate(rows, axis=1)
    with np.errstate(all="ignore"):
        apart = np.abs(second - first) / np.maximum(np.abs(first), np.abs(second))
    apart[first == second] = 0.0
    one_sided = np.isfinite(first) != np.isfinite(second)
    largest = np.fmax.reduce(apart, axis=0)
    return (largest <= _SAME) & ~one_sided.any(axis=0), largest


def of_pair(aligned: AlignedRuns, measure: Measure, state: tuple[Array, Array]) -> Differences:
    """Compares two runs, by rounding at steps in the same state and by the spread over layers at the others.

    Args:
        aligned: two runs.
        measure: what to compare.
        state: of :func:`same_state`.

    Returns:
        The differences.
    """
    values = measure.scaled(measure.raw(aligned))
    difference = values[1] - values[0]
    same, apart = state
    rounding = np.fmax(_ROUNDING, _AMPLIFIED * np.where(same, apart, 0.0)) ** 2 + _of_features(aligned, measure)
    if not measure.direct:
        return Differences(np.where(same, difference, np.nan), np.sqrt(rounding), np.full(difference.shape, HEAVY))
    spread, center, others = _without_each(difference)
    spread = spread**2 * (1 + 1 / np.maximum(others, 1))
    change, changes = _between_steps(values)
    noise = spread + change + NATURAL**2 + rounding
    with np.errstate(all="ignore"):
        freedom = np.fmin(HEAVY, noise**2 / (spread**2 / (others - 1) + change**2 / changes))
    told = same | ((others >= 2) & (changes > 0))
    residual = np.where(told, np.where(same, difference, difference - center), np.nan)
    return Differences(residual, np.sqrt(np.where(same, rounding, noise)), np.where(same, HEAVY, freedom))


def _between_steps(values: Array) -> tuple[Array, Array]:
    """Variance of a difference of two runs, by how a layer changes against the others from step to step.

    Args:
        values: scaled values (2, layers, steps).

    Returns:
        The variance and its degrees of freedom, (layers, 1) each.
    """
    change = np.diff(values - _median(values), axis=2)
    given = np.isfinite(change)
    changes = given.sum(axis=(0, 2))[:, None]
    squares: Array = (np.where(given, change, 0.0) ** 2).sum(axis=(0, 2))[:, None]
    variance: Array = squares / np.maximum(changes, 1)  # a change has twice the variance of a value, as two runs do
    return variance, changes


def _of_features(aligned: AlignedRuns, measure: Measure) -> Array:
    """Squared relative error of a feature update by rounding, (layers, steps); 0 for what needs no feature update."""
    if not measure.quantity.guarded:
        return np.zeros((len(aligned.layers), len(aligned.steps)))
    with np.errstate(all="ignore"):
        error: Array = (aligned.values("noise_floor") / aligned.values("relative_update")).max(axis=0)
    most = np.sqrt(np.finfo(float).max)
    squared: Array = np.nan_to_num(error, nan=most, posinf=most) ** 2  # without a noise floor, nothing is told
    return squared


def _without_each(difference: Array) -> tuple[Array, Array, Array]:
    """Standard deviation, mean and number of the other layers, for each layer; each of shape (layers, steps)."""
    given = np.isfinite(difference)
    values = np.where(given, difference, 0.0)
    values = values - _mean(values, given) * given  # sums of squares stay accurate
    shift = np.where(given, difference, 0.0) - values
    others = given.sum(axis=0) - given
    with np.errstate(all="ignore"):
        center = (values.sum(axis=0) - values) / others
        squares = (values**2).sum(axis=0) - values**2 - others * center**2
        spread = np.sqrt(np.maximum(squares, 0.0) / (others - 1))
    return np.where(others >= 2, spread, 0.0), center + shift, others


def _mean(values: Array, given: Array) -> Array:
    mean: Array = values.sum(axis=0, keepdims=True) / np.maximum(given.sum(axis=0, keepdims=True), 1)
    return mean


def of_replicates(aligned: AlignedRuns, measure: Measure, sides: Array) -> Differences:
    """Compares two groups of runs, by the variance between the runs of a group.

    Args:
        aligned: the runs.
        measure: what to compare.
        sides: (runs,), whether a run belongs to the second group. One of the groups has at least two runs.

    Returns:
        The differences, with a last row for the median over layers.
    """
    values = with_median(measure.scaled(measure.raw(aligned)))
    groups = [values[~sides], values[sides]]
    counts = [np.isfinite(group).sum(axis=0) for group in groups]
    means = [
        np.where(np.isfinite(group), group, 0).sum(axis=0) / np.maximum(n, 1)
        for group, n in zip(groups, counts, strict=True)
    ]
    squares = sum(np.nansum((group - mean) ** 2, axis=0) for group, mean in zip(groups, means, strict=True))
    freedom = counts[0] + counts[1] - 2.0
    with np.errstate(all="ignore"):
        within = squares / freedom
        within[~np.isfinite(within)] = np.nan
        noise = np.fmax(within, _median(within[None, :-1])[0]) * (1 / counts[0] + 1 / counts[1])
        variance = noise + _ROUNDING**2 + with_median(_of_features(aligned, measure)[None])[0]
        freedom = freedom * (variance / noise) ** 2
    tested = (counts[0] > 0) & (counts[1] > 0) & (counts[0] + counts[1] > 2)
    freedom = np.where(tested, np.fmin(freedom, 1e6), np.nan)
    return Differences(np.where(tested, means[1] - means[0], np.nan), np.sqrt(variance), freedom)


def with_median(values: Array) -> Array:
    """Appends the median over layers to values (runs, layers, steps)."""
    return np.concatenate([values, _median(values)], axis=1)


def _median(values: Array) -> Array:
    """Median over layers, (runs, 1, steps); NaN where no layer has a value."""
    given = np.isfinite(values).any(axis=1, keepdims=True)
    complete = bool(np.isfinite(values).all())  # then the median is much faster
    of = np.median if complete else np.nanmedian
    median: Array = of(np.where(given, values, 0.0), axis=1, keepdims=True)
    return np.where(given, median, np.nan)
