"""How far predicted speeds can be trusted: by what factor the formula was off at the measured steps of the same layer.

A predicted step takes its angle from a measured step before. At a measured step everything is known, so the record
itself tells how good a prediction would have been there: the formula with the last angle before that was valid and
linear, ``D / (cos(angle before) |b|)``, against the measured speed. With the residual ``r = 1 - D / (cos(angle) |b|
|df|)``, the ratio of measured to predicted speed is ``cos(angle before) / ((1 - r) cos(angle))``. How much speeds
change from one step to the next is no part of it.

The factor of a layer is one within which the next comparison lies with a probability of at least 80 %, if it comes from
the same distribution as the recent ones (conformal prediction: Vovk, Gammerman and Shafer, *Algorithmic Learning in a
Random World*, 2005). ``docs/validity.md`` states the rule.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

__all__ = ["LARGEST_FACTOR", "SHARE", "Backtest", "factor", "factors", "overall_factor"]

Array = np.ndarray[Any, Any]

SHARE = 0.8
"""Probability with which the speed is meant to be within the factor of its prediction."""

WINDOW = 20
"""Number of measured steps whose comparisons count, up to the last one before the prediction."""

LARGEST_FACTOR = 3.0
"""Predictions with a larger factor are withheld."""

_BLOCK = 512  # measured steps at a time, for the memory


class Backtest:
    """Compares measured steps, one after the other, with the predictions that the angle before would have given."""

    def __init__(self) -> None:
        self._before: Array | None = None
        self._recent: deque[Array] = deque(maxlen=WINDOW)

    def add(self, cosine: Array, residual: Array, valid: Array, linear: Array) -> Array:
        """Adds a measured step.

        Args:
            cosine: cosines of the angles (rows,), NaN where a value is missing.
            residual: residuals of the formula (rows,), NaN where a value is missing.
            valid: whether each row is valid (rows,).
            linear: whether first order describes the step (rows,).

        Returns:
            Measured over predicted speed (rows,); NaN where there is nothing to compare: no valid measurement, no angle
            before, or a decrease that is not positive, of which no speed is predicted.
        """
        cosine, residual = cosine.astype(np.float64), residual.astype(np.float64)
        before = np.full(len(cosine), np.nan) if self._before is None else self._before
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio: Array = before / ((1.0 - residual) * cosine)
            ratio[~(valid & (before > 0) & (ratio > 0) & np.isfinite(ratio))] = np.nan
        self._before = np.where(valid & linear & np.isfinite(cosine), cosine, before)
        self._recent.append(ratio)
        return ratio

    def factors(self) -> Array:
        """The factors (rows,) of predictions after the steps that were added, as :func:`factor` gives them."""
        return factor(np.stack(self._recent, axis=1)) if self._recent else np.empty(0)


def factor(ratios: Array) -> Array:
    """The factor that follows from comparisons.

    Args:
        ratios: measured over predicted speed (rows, comparisons), NaN for none.

    Returns:
        (rows,): at least 1; NaN with fewer than 4 comparisons, from which nothing follows with 80 %.
    """
    off = np.sort(np.abs(np.log(ratios)), axis=1)  # NaN comes last
    count = np.isfinite(off).sum(axis=1)
    rank = np.ceil(SHARE * (count + 1)).astype(np.int64)
    found = np.full(len(off), np.nan)
    enough = rank <= count
    found[enough] = np.exp(off[enough, rank[enough] - 1])
    return found


def factors(ratios: Array, steps: Array, at: Array) -> Array:
    """The factors of predictions.

    Args:
        ratios: measured over predicted speed (rows, measured steps).
        steps: the measured steps, ascending.
        at: steps of the predictions, ascending.

    Returns:
        (rows, predictions): :func:`factor` of the comparisons at the last measured steps before each of them.
    """
    last = np.searchsorted(steps, at) - 1
    found = np.full((len(ratios), len(at)), np.nan)
    padded = np.pad(ratios, ((0, 0), (WINDOW, 0)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW, axis=1)
    for end in np.array_split(np.unique(last[last >= 0]), max(1, len(steps) // _BLOCK)):
        of_steps = factor(windows[:, end + 1].reshape(-1, WINDOW)).reshape(len(ratios), len(end))
        which = np.isin(last, end)
        found[:, which] = of_steps[:, np.searchsorted(end, last[which])]
    return found


def overall_factor(ratios: Array) -> tuple[float, int]:
    """The factor within which 80 % of all comparisons are, and their number; NaN if there are none."""
    off = np.abs(np.log(ratios[np.isfinite(ratios)]))
    return (float(np.exp(np.quantile(off, SHARE, method="higher"))) if off.size else math.nan), int(off.size)
