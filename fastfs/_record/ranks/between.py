"""What differs between the ranks of a run: a rank that stands apart, and gradients that are not scaled as declared."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from fastfs._record.ranks.merging import MergedRows
from fastfs._record.ranks.part import Array, RankPart
from fastfs._stats import FeatureStats

__all__ = ["Comparison", "common_factor", "gradient_scale"]

_LEAST = 4  # batches below which none can stand apart
_WINDOW = 8  # measured steps from which the scatter of batches is known
_CHANCE = 3e-3  # probability that chance sets the farthest batch of a step apart, for each layer and quantity
_BEYOND = 1.3  # times as far as any other batch in these steps, since their distributions may have heavy tails
_LEAST_AWAY = np.array([0.1, 0.25, 0.25, 0.25])  # of angle (radians) and logarithms of speed, backward and features
_NOTHING = 10.0  # logarithm of how much smaller than others a size of 0 is
_SAME = 1e-3  # relative difference up to which ranks multiply gradients alike
_LEAST_COSINE = 0.02  # below which <b, df> is mostly what cancels

_NAMES = FeatureStats.names
_DOT, _UPDATE, _BACKWARD, _BEFORE, _COUNT = (
    _NAMES.index(name) for name in ("update_dot_backward", "update_sq", "backward_sq", "before_sq", "count")
)


class Comparison:
    """Compares the batches of each measured step with one another.

    A batch stands apart if it differs from the mean of the others by more than chance explains: by a Student's t-test
    with the scatter of the others in the last measured steps, and by more than batches of a healthy run may. Four
    batches say little about their scatter, so that the first steps of a small run name only what is far apart.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[list[int], Array]] = deque(maxlen=_WINDOW)  # ranks, and what they differ by

    def columns(self, rows: MergedRows) -> dict[str, list[Any]]:
        """Returns the standard deviation of the angles of the batches, and the rank that stands apart, by layer."""
        sums = rows.by_batch
        cosine = -sums[:, :, _DOT] / np.sqrt(sums[:, :, _UPDATE] * sums[:, :, _BACKWARD])
        angle = np.arccos(np.clip(cosine, -1.0, 1.0))
        sizes = [np.log(sums[:, :, column] / sums[:, :, _COUNT]) / 2 for column in (_UPDATE, _BACKWARD, _BEFORE)]
        several = np.sum(~np.isnan(angle), axis=0) > 1
        spread = np.array([np.nanstd(angle[:, i]) if several[i] else np.nan for i in range(angle.shape[1])])
        values = _centered(np.stack([angle, *sizes], axis=2))
        if self._kept and self._kept[-1][1].shape[1:] != values.shape[1:]:
            self._kept.clear()
        self._kept.append((rows.first, values.astype(np.float32)))
        return {"rank_angle_sd": spread.tolist(), "rank_apart": self._apart(rows.first, values)}

    def _apart(self, ranks: list[int], values: Array) -> list[int | None]:
        """Returns for each layer the rank that stands farthest apart, None if none does: (B, L, 4) -> (L,)."""
        known = np.isfinite(values)
        number = np.abs(np.where(known, values, 0.0)).argmax(axis=0)  # (L, 4)
        value = np.take_along_axis(np.where(known, values, 0.0), number[None], axis=0)[0]
        others = known.sum(axis=0) - 1
        away = np.abs(value - (np.where(known, values, 0.0).sum(axis=0) - value) / np.maximum(others, 1))
        rank = np.array(ranks)[number]
        squares, freedom, farthest = np.zeros_like(away), np.zeros_like(away), np.zeros_like(away)
        for earlier, kept in self._kept:
            counted = np.isfinite(kept) & (np.array(earlier)[:, None, None] != rank)
            count = counted.sum(axis=0)
            each = np.where(counted, kept, 0.0).astype(np.float64)
            squares += np.maximum((each**2).sum(axis=0) - each.sum(axis=0) ** 2 / np.maximum(count, 1), 0.0)
            freedom += np.maximum(count - 1, 0)
            farthest = np.maximum(farthest, np.abs(each).max(axis=0))
        deviation = np.sqrt(squares / np.maximum(freedom, 1) * (1.0 + 1.0 / np.maximum(others, 1)))
        least = np.maximum(_quantile(others + 1, freedom) * deviation, np.maximum(_BEYOND * farthest, _LEAST_AWAY))
        times = np.where((others + 1 >= _LEAST) & (freedom > 0), away / least, 0.0)
        which = times.argmax(axis=1)
        found = np.arange(len(which))
        return [int(rank[i, j]) if times[i, j] > 1.0 else None for i, j in zip(found, which, strict=True)]


def _centered(values: Array) -> Array:
    """Subtracts the median of the batches; one whose features, or gradients, are 0 differs from the others by much."""
    finite = np.where(np.isfinite(values), values, np.nan)
    some = np.isfinite(values).any(axis=0)
    middle = np.nanmedian(np.where(some, finite, 0.0), axis=0)
    return np.where(values == -np.inf, -_NOTHING, finite - middle)


def _quantile(batches: Any, freedom: Any) -> Any:
    """Returns how many standard deviations the farthest of so many batches is away by chance in `_CHANCE` of cases.

    Wallace's approximation of the quantiles of Student's distribution by those of the normal one, "Bounds on normal
    approximations to Student's and the chi-square distributions", 1959.
    """
    normal = NormalDist()
    numbers = np.unique(batches)
    known = {int(n): -normal.inv_cdf(_CHANCE / (2 * max(int(n), 1))) for n in numbers}
    z = np.vectorize(known.__getitem__, otypes=[float])(batches)
    freedom = np.maximum(freedom, 1)
    corrected = z * (8 * freedom + 3) / (8 * freedom + 1)
    return np.sqrt(freedom * np.expm1(np.minimum(corrected**2 / freedom, 500.0)))


def gradient_scale(residual: Array, sums: Array, valid: Any) -> float | None:
    """Returns by how much the gradients are larger than declared: the median over the cuts of D / -<b, df>.

    Section 2, identity: D = -<b, df> to first order, if b is weighted as the gradients are.

    Args:
        residual: 1 - D / -<b, df>, NaN where there is none, (L,).
        sums: Merged sums, (L, 9).
        valid: Layers that count, bool (L,).
    """
    cosine = np.abs(sums[:, _DOT]) / np.sqrt(sums[:, _UPDATE] * sums[:, _BACKWARD])
    usable = valid & np.isfinite(residual) & (cosine >= _LEAST_COSINE)
    return float(np.median(1.0 - residual[usable])) if usable.any() else None


def common_factor(parts: Sequence[RankPart]) -> float | None:
    """Returns by what the ranks have multiplied their gradients after the backward; None if it is not one factor."""
    found = [part.scalars.get("gradient_factor", 1.0) for part in parts]
    alike = all(abs(factor - found[0]) <= _SAME * abs(found[0]) for factor in found)  # NaN is not alike
    return float(found[0]) if alike else None
