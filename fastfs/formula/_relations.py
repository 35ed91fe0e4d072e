"""The relations of the feature speed formula as functions of tensors, elementwise over layers.

With b = dLoss/df the backward vector, df the feature update and D the aligned decrease of one step, at a cut:

    <b, df> = -D                      identity
    |df|    = D / (cos(angle) |b|)    feature speed formula

Source: section 2 of "The Feature Speed Formula", arXiv 2311.18718, expressed by dw so that it holds for any optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfs._functional import update_stats

__all__ = ["aligned_decrease", "decompose", "predicted_update_norm", "residual", "sensitivity"]


def aligned_decrease(gradients: Sequence[Tensor], updates: Sequence[Tensor]) -> Tensor:
    """Return D = -sum of <g, dw> over parameters, the first-order decrease of the loss.

    For gradient descent, D is the sum of lr |g|^2.

    Args:
        gradients: gradients of the loss, unclipped and unscaled, one per parameter.
        updates: updates of the parameters, of the same shapes.

    Returns:
        float64, 0-d, in units of the loss.

    Raises:
        TypeError: as :func:`fastfs.update_stats`.
        ValueError: as :func:`fastfs.update_stats`.

    Source: section 2 of "The Feature Speed Formula", arXiv 2311.18718.
    """
    return update_stats(gradients, updates).aligned_decrease.sum()


def predicted_update_norm(decrease: Tensor, cos_angle: Tensor, backward_norm: Tensor) -> Tensor:
    """Return the norm of the feature update that the feature speed formula predicts, |df| = D / (cos(angle) |b|).

    Args:
        decrease: D, in units of the loss.
        cos_angle: cosine of the angle between df and -b.
        backward_norm: |b|. The three tensors have to broadcast.

    Returns:
        |df|, in the units of the features.

    Source: section 2 of "The Feature Speed Formula", arXiv 2311.18718.
    """
    return decrease / (cos_angle * backward_norm)


def residual(decrease: Tensor, update_dot_backward: Tensor) -> Tensor:
    """Return r = 1 - D / (-<b, df>): 0 to first order at a cut, otherwise curvature, rounding noise or a bug.

    Args:
        decrease: D, in units of the loss.
        update_dot_backward: <b, df>, in units of the loss, of a shape that broadcasts.

    Returns:
        The dimensionless residual.

    Source: the identity of section 2 of "The Feature Speed Formula", arXiv 2311.18718.
    """
    return 1.0 - decrease / -update_dot_backward


def sensitivity(update_rms: Tensor, loss_change: Tensor) -> Tensor:
    """Return S = rms(df) / |loss change|. For the last hidden features, S is of order 1 if features are learned.

    Args:
        update_rms: rms(df), in the units of the features.
        loss_change: change of the loss, of a shape that broadcasts.

    Returns:
        S, in units of the features per unit of the loss.

    Source: section 4 of "The Feature Speed Formula", arXiv 2311.18718.
    """
    return update_rms / loss_change.abs()


def decompose(update: Tensor, backward: Tensor) -> tuple[Tensor, Tensor]:
    """Split a feature update into a component along -b, which changes the loss, and an orthogonal one, which does not.

    Args:
        update: df, any shape, floating point.
        backward: b, of the same shape.

    Returns:
        The aligned and the orthogonal component, in the dtype of ``update``. They sum to ``update``, and |aligned| =
        |cos(angle)| |df|. The aligned component is zero where b is zero.

    Raises:
        ValueError: the shapes differ, or a tensor is not floating point.

    Source: section 2 of "The Feature Speed Formula", arXiv 2311.18718.
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
