"""The relations of the feature speed formula: tensors in, tensors out, element by element over layers.

With b = dLoss/df the backward vector, df the feature update and D the aligned decrease of one step, at a cut:

    <b, df> = -D                      identity
    |df|    = D / (cos(angle) |b|)    feature speed formula

Source: section 2 of "The Feature Speed Formula", arXiv 2311.18718, in the form with dw, for any optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfs._functional import update_stats

__all__ = ["aligned_decrease", "decompose", "predicted_update_norm", "residual", "sensitivity"]


def aligned_decrease(gradients: Sequence[Tensor], updates: Sequence[Tensor]) -> Tensor:
    """D = -sum of <g, dw> over parameters: the first-order decrease of the loss. lr |g|^2 summed for gradient descent.

    Args:
        gradients: of the loss, unclipped and unscaled, one per parameter.
        updates: what the optimizer really changed, of the same shapes.

    Returns:
        float64, 0-d, in units of the loss.

    Raises:
        TypeError, ValueError: as :func:`fastfs.update_stats`.
    """
    return update_stats(gradients, updates).aligned_decrease.sum()


def predicted_update_norm(decrease: Tensor, cos_angle: Tensor, backward_norm: Tensor) -> Tensor:
    """|df| = D / (cos(angle) |b|): the feature speed formula. Tensors that broadcast."""
    return decrease / (cos_angle * backward_norm)


def residual(decrease: Tensor, update_dot_backward: Tensor) -> Tensor:
    """r = 1 - D / (-<b, df>): 0 to first order at a cut, else curvature, rounding noise or a bug. Broadcasts."""
    return 1.0 - decrease / -update_dot_backward


def sensitivity(update_rms: Tensor, loss_change: Tensor) -> Tensor:
    """S = rms(df) / |loss change|, for df of the last hidden features: of order 1 where features are learned."""
    return update_rms / loss_change.abs()


def decompose(update: Tensor, backward: Tensor) -> tuple[Tensor, Tensor]:
    """The part of a feature update along -b, which changes the loss, and the orthogonal rest, which does not.

    Args:
        update: df, any shape, floating point.
        backward: b, of the same shape.

    Returns:
        aligned and orthogonal part, in the dtype of ``update``; they add up to it, and |aligned| = |cos(angle)| |df|.
        The aligned part is zero where b is.

    Raises:
        ValueError: different shapes, or not floating point.
    """
    if update.shape != backward.shape or not (update.is_floating_point() and backward.is_floating_point()):
        raise ValueError(
            f"decompose: expected two floating-point tensors of one shape, got {tuple(update.shape)} in {update.dtype} "
            f"and {tuple(backward.shape)} in {backward.dtype}"
        )
    wide, direction = update.detach().to(torch.float64), backward.detach().to(torch.float64)
    square = direction.square().sum()
    factor = torch.where(square > 0, (wide * direction).sum() / square, 0.0)
    aligned = factor * direction
    return aligned.to(update.dtype), (wide - aligned).to(update.dtype)
