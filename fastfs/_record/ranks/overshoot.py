"""How far beyond first order a step goes: the curvature of the loss along it, relative to its aligned decrease."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastfs._record import decrease_reasons, row_reasons
from fastfs._record.ranks.stages import MergedStep

__all__ = ["overshoot"]

_SAME = 1e-6  # relative difference up to which ranks that share a batch have the same loss
_OTHER = (*row_reasons.OTHER_FORWARDS, row_reasons.JACOBIAN, row_reasons.OTHER_MASKS)  # dL is not that of the step
_FACTOR = 1.5  # from 1, less than a wrong weight of two batches makes, and more than curvature at most steps
_ERROR = 0.05  # by which rounding may change an overshoot that is recorded


def overshoot(step: MergedStep, reasons: Any, scale: float | None) -> float | None:
    """Returns <dw, H dw> / D = 2 (dL + D) / D, or None if the change of the loss dL or D is not known.

    2 is the edge of stability of gradient descent (J. Cohen et al., arXiv 2103.00065, section 2): for dw = -lr g it is
    lr times the curvature along g, of which 2 leaves the loss as it is.

    Args:
        step: The sums over all ranks. Losses of batches are weighted as their gradients are.
        reasons: Why rows are not valid, codes of ``row_reasons``, (L,).
        scale: By how much gradients are larger than the weights of several batches say, see ``gradient_scale``.
    """
    total, differ = step.parameters.total, step.parameters.reason == decrease_reasons.RANKS_DIFFER
    if not step.whole or step.together[0][0].place.stages > 1 or differ.any() or np.isin(reasons, _OTHER).any():
        return None
    declared = scale is not None and 1.0 / _FACTOR <= scale <= _FACTOR
    if len(step.together) > 1 and not declared:  # D is in the scale of the gradients, and the losses in that of w
        return None
    change = noise = 0.0
    for peers, weight in zip(step.together, step.weights, strict=True):
        found = [part.arrays["loss_change"] for part in peers if "loss_change" in part.arrays]
        if len(found) < len(peers) or not np.allclose(found, found[0], rtol=_SAME, atol=0.0):
            return None
        change, noise = change + weight * float(found[0][0]), noise + weight * float(found[0][1])
    if not total > 0.0 or not 2.0 * noise <= _ERROR * total:
        return None
    return 2.0 * (change + total) / total
