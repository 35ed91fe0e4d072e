"""What differs between the ranks of a run: a rank that stands apart, and gradients that are not scaled as declared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastfs._record.ranks.merging import MergedRows
from fastfs._record.ranks.part import Array, RankPart
from fastfs._stats import FeatureStats

__all__ = ["columns", "common_factor", "gradient_scale"]

_LEAST = 4  # batches below which none can stand apart
_APART = 12.0  # robust standard deviations
_RELATIVE = 0.1  # and at least this much, relative or in radians
_SAME = 1e-3  # relative difference up to which ranks multiply gradients alike
_LEAST_COSINE = 0.02  # below which <b, df> is mostly what cancels

_NAMES = FeatureStats.names
_DOT, _UPDATE, _BACKWARD, _BEFORE, _COUNT = (
    _NAMES.index(name) for name in ("update_dot_backward", "update_sq", "backward_sq", "before_sq", "count")
)


def columns(rows: MergedRows) -> dict[str, list[Any]]:
    """Returns the columns that compare the batches: the standard deviation of their angles, and who stands apart."""
    sums = rows.by_batch
    cosine = -sums[:, :, _DOT] / np.sqrt(sums[:, :, _UPDATE] * sums[:, :, _BACKWARD])
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    scales = [np.log(sums[:, :, column] / sums[:, :, _COUNT]) / 2 for column in (_UPDATE, _BACKWARD, _BEFORE)]
    found: list[int | None] = [None] * sums.shape[1]
    for layer in range(sums.shape[1]):
        apart = [_apart(values[:, layer]) for values in (angle, *scales)]
        numbers = [number for number in apart if number is not None]
        found[layer] = rows.first[numbers[0]] if numbers else None
    several = np.sum(~np.isnan(angle), axis=0) > 1
    spread = np.array([np.nanstd(angle[:, i]) if several[i] else np.nan for i in range(angle.shape[1])])
    return {"rank_angle_sd": spread.tolist(), "rank_apart": found}


def _apart(values: Array) -> int | None:
    """Returns which of several numbers stands apart from the others, if one does."""
    known = values[np.isfinite(values)]
    if len(known) < _LEAST:
        return None
    middle = np.median(known)
    width = 1.4826 * np.median(np.abs(known - middle))
    away = np.where(np.isfinite(values), np.abs(values - middle), 0.0)
    number = int(away.argmax())
    return number if away[number] > max(_APART * width, _RELATIVE) else None


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
