"""How much of a feature update its first-order change does not explain, from sums over rows."""

from __future__ import annotations

import numpy as np

from fastfs._record.ranks.part import Array

__all__ = ["nonlinear_columns"]

_NOISE = 0.02  # share of |df - J dw|^2 that may be rounding: 1 % of the norm


def nonlinear_columns(sums: Array) -> dict[str, Array]:
    """Returns |df - J dw| / |df| and its standard error by the sample of rows, NaN where rounding could be mistaken.

    Layers up to this one are lazy if it tends to 0 (N. Dey et al., "Don't be lazy: CompleteP enables compute-efficient
    deep transformers", arXiv 2505.01618, who take one layer at a time).

    Args:
        sums: |df - J dw|^2, |df|^2, their covariances 00, 01, 11 by the sample of rows, and the rounding noise that
            the first may contain, (L, 6).
    """
    rest, update, rest_rest, rest_update, update_update, noise = sums.T
    ratio = np.sqrt(rest / update)
    variance = rest_rest / rest**2 + update_update / update**2 - 2 * rest_update / (rest * update)
    known = (rest > 0.0) & (noise <= _NOISE * rest)
    error = np.where(known, ratio / 2 * np.sqrt(np.maximum(variance, 0.0)), np.nan)
    return {"nonlinear_update": np.where(known, ratio, np.nan), "nonlinear_update_se": error}
