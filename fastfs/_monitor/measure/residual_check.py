"""The residual of the feature speed formula, as a check of a measured step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfs._monitor.measure.kappa import TARGET
from fastfs._monitor.measure.update_estimates import CentralProbe
from fastfs._stats import FeatureStats

__all__ = ["RESIDUAL", "probe_residual_is_large", "rms_residual"]

RESIDUAL = 0.01
"""Largest residual, as a root mean square over the cuts, of a step that can be trusted."""

LEAST_COSINE = 0.1  # the residual is relative to <b, df>, or to this times |b| |df|


def probe_residual_is_large(
    plain: FeatureStats, probe: CentralProbe, aligned_decrease: Tensor | None, dot_margin: Tensor | None
) -> Tensor:
    """Returns whether the residual is too large, computed with the odd part of the probe's dot product: 0-d bool.

    Steps that are large themselves (kappa = 1) may have a residual of the order of the square of their move.

    Args:
        plain: The plain replay.
        probe: The probe.
        aligned_decrease: See :func:`fastfs._monitor.measure.trust.assess`.
        dot_margin: See :func:`fastfs._monitor.measure.trust.assess`.
    """
    kappa = probe.kappa.to(torch.float64)
    dot = (probe.plus.update_dot_backward - probe.minus.update_dot_backward) / (2 * kappa)
    update_sq = probe.central.update_sq / (2 * kappa).square()
    residual, cut = rms_residual(plain, dot, update_sq, aligned_decrease, dot_margin)
    moves = torch.where(cut, probe.central.update_sq / (4 * plain.before_sq), 0.0).sum() / cut.sum().clamp_min(1)
    return ~(residual <= RESIDUAL + (moves - (2 * TARGET) ** 2).clamp_min(0.0))


def rms_residual(
    stats: FeatureStats, dot: Tensor, update_sq: Tensor, aligned_decrease: Tensor | None, dot_margin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the root mean square over the cuts of the residual 1 - D / -<b, df>, and the cuts: 0-d, bool (L,).

    Args:
        stats: Of the features.
        dot: <b, df>, (L,).
        update_sq: |df|^2, (L,).
        aligned_decrease: See :func:`fastfs._monitor.measure.trust.assess`.
        dot_margin: See :func:`fastfs._monitor.measure.trust.assess`.
    """
    if aligned_decrease is None:
        return torch.zeros((), dtype=torch.float64, device=stats.device), torch.zeros_like(dot, dtype=torch.bool)
    scale = torch.maximum(dot.abs(), LEAST_COSINE * (update_sq * stats.backward_sq).sqrt())
    cut = ~aligned_decrease.isnan() & (scale > 0)
    squares = ((dot + aligned_decrease) / scale).square()
    if dot_margin is not None:  # what the sample of rows explains is no error of the measurement
        squares = (squares - (dot_margin * dot / scale).square()).clamp_min(0.0)
    squares = torch.where(cut, squares, 0.0)
    return (squares.sum() / cut.sum().clamp_min(1)).sqrt(), cut
