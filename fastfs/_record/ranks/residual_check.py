"""The residual of the feature speed formula, as a check of a measured step."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RESIDUAL", "SINGLE_SPACING", "TARGET", "residual_is_large", "rms_residual"]

RESIDUAL = 0.01
"""Largest residual, as a root mean square over the cuts, of a step that can be trusted."""

TARGET = 6e-2
"""Relative move of the features that an amplified probe aims at in bf16."""

SINGLE_SPACING = 2.0**-20
"""Precisions of this spacing at 1 and finer accumulate in themselves and leave the Jacobian as it is: a residual is
then curvature."""

LEAST_COSINE = 0.1  # the residual is relative to <b, df>, or to this times |b| |df|


def residual_is_large(
    dot: Tensor,
    update_sq: Tensor,
    backward_sq: Tensor,
    aligned_decrease: Tensor | None,
    dot_margin: Tensor | None,
    moved_sq: Tensor,
) -> Tensor:
    """Returns whether the residual of an amplified probe is too large: 0-d bool.

    Steps that are large themselves (kappa = 1) may have a residual of the order of the square of their move.

    Args:
        dot: <b, df> by the odd part of the probe, (L,).
        update_sq: |df|^2 by it, (L,).
        backward_sq: |b|^2, (L,).
        aligned_decrease: See :func:`fastfs._monitor.measure.trust.assess`.
        dot_margin: See :func:`fastfs._monitor.measure.trust.assess`.
        moved_sq: Square of the relative move of the probe to each side, (L,).
    """
    residual, cut = rms_residual(dot, update_sq, backward_sq, aligned_decrease, dot_margin)
    moves = torch.where(cut, moved_sq, 0.0).sum() / cut.sum().clamp_min(1)
    return ~(residual <= RESIDUAL + (moves - (2 * TARGET) ** 2).clamp_min(0.0))


def rms_residual(
    dot: Tensor,
    update_sq: Tensor,
    backward_sq: Tensor,
    aligned_decrease: Tensor | None,
    dot_margin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns the root mean square over the cuts of the residual 1 - D / -<b, df>, and the cuts: 0-d, bool (L,).

    Args:
        dot: <b, df>, (L,).
        update_sq: |df|^2, (L,).
        backward_sq: |b|^2, (L,).
        aligned_decrease: See :func:`fastfs._monitor.measure.trust.assess`.
        dot_margin: See :func:`fastfs._monitor.measure.trust.assess`.
    """
    if aligned_decrease is None:
        return torch.zeros((), dtype=torch.float64, device=dot.device), torch.zeros_like(dot, dtype=torch.bool)
    scale = torch.maximum(dot.abs(), LEAST_COSINE * (update_sq * backward_sq).sqrt())
    cut = ~aligned_decrease.isnan() & (scale > 0)
    squares = ((dot + aligned_decrease) / scale).square()
    if dot_margin is not None:  # what the sample of rows explains is no error of the measurement
        squares = (squares - (dot_margin * dot / scale).square()).clamp_min(0.0)
    squares = torch.where(cut, squares, 0.0)
    return (squares.sum() / cut.sum().clamp_min(1)).sqrt(), cut
