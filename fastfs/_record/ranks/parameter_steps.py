"""Direction and size of a step in the space of the parameters, from sums over them."""

from __future__ import annotations

import numpy as np
import torch

from fastfs._record.ranks.part import Array
from fastfs._stats import ParameterStats

__all__ = ["step_columns"]

# |w|^2 before the step, relative to that after it, below which it is mostly the rounding of dw in float32.
_NOTHING = 1e-9


def step_columns(norms: Array, dots: Array) -> dict[str, Array]:
    """Returns the columns of a layer that say where a step of its own parameters leads.

    With w before the step, <w, dw> = <w + dw, dw> - |dw|^2 and |w|^2 = |w + dw|^2 - 2 <w + dw, dw> + |dw|^2.

    Args:
        norms: |w + dw|, |dw| and |g|, (L, 3).
        dots: <g, dw> and <w + dw, dw>, (L, 2).

    Returns:
        By name, (L,) each, NaN where a vector is zero or a sum is not known: ``parameter_cos_angle`` between dw and -g,
        ``parameter_rotation`` (R. Wan et al., "Spherical Motion Dynamics", arXiv 2006.08419, angular update;
        A. Kosson et al., "Rotational Equilibrium", arXiv 2305.17212, section 2) and ``parameter_radial_update``.
    """
    after_sq, update_sq, gradient_sq = np.square(norms).T
    dot, after_dot_update = dots.T
    named = {
        "dot": dot,
        "parameter_dot_update": after_dot_update,
        "update_sq": update_sq,
        "gradient_sq": gradient_sq,
        "parameter_sq": after_sq,
    }
    sums = [named.get(name, np.zeros_like(dot)) for name in ParameterStats.names]
    stats = ParameterStats(torch.from_numpy(np.stack(sums, axis=1)))
    before_sq = after_sq - 2 * after_dot_update + update_sq
    some = before_sq > _NOTHING * after_sq
    return {
        "parameter_rotation": np.where(some, stats.rotation.numpy(), np.nan),
        "parameter_radial_update": np.where(some, (after_dot_update - update_sq) / before_sq, np.nan),
        # Of several steps of one optimizer, the norms are not those of their sum.
        "parameter_cos_angle": np.where(np.isnan(after_dot_update), np.nan, stats.cos_angle.numpy()),
    }
