"""The share of a step that a cast of the parameters takes, from sums over samples of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastfs._record.ranks.part import Array

__all__ = ["cast_columns"]

_MOST = 0.3  # relative standard error of |dw|^2 up to which a sample says anything: few of its blocks have moved else


def cast_columns(names: Sequence[str], sums: Array) -> dict[str, Array]:
    """Returns the loss by each cast, and its standard error, NaN where it is not known.

    With the totals A = <dc, dw>, B = |dc|^2 and C = |dw|^2 the loss is 1 - r with r = A^2 / (B C), the error of which
    is that of r (2 dA / A - dB / B - dC / C), to first order.

    Args:
        names: The casts.
        sums: Totals A, B, C and their covariances AA, AB, AC, BB, BC, CC of each cast, (L, 9 for each); (L, 0) if the
            ranks have measured different ones.
    """
    columns: dict[str, Array] = {}
    for name, each in zip(names, np.split(sums, len(names), axis=1) if sums.shape[1] else (), strict=False):
        dot, moved, update = each[:, :3].T
        covariance = np.empty((len(each), 3, 3))
        for place, (i, j) in enumerate(((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))):
            covariance[:, i, j] = covariance[:, j, i] = each[:, 3 + place]
        along = dot > 0.0
        share = np.where(along, dot**2 / (moved * update), 0.0)
        slopes = np.stack([2.0 / dot, -1.0 / moved, -1.0 / update], axis=1)
        variance = np.einsum("li,lij,lj->l", slopes, covariance, slopes)
        error = np.where(along, share * np.sqrt(np.maximum(variance, 0.0)), 0.0)
        known = (update > 0.0) & (covariance[:, 2, 2] <= (_MOST * update) ** 2)
        columns[f"cast_loss_{name}"] = np.where(known, np.maximum(1.0 - share, 0.0), np.nan)
        columns[f"cast_loss_{name}_se"] = np.where(known, error, np.nan)
    return columns
