"""The amplification kappa of the central probe (`trust`), chosen on the device without waiting for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastfs._record.ranks.residual_check import TARGET

__all__ = ["KAPPA_MAX", "TARGET", "choose_kappa", "first_kappa", "largest_kappa", "target_for"]

KAPPA_MAX = 2.0**14
"""Largest amplification; updates that need more are too small for 16 bits. See :func:`largest_kappa`."""


def target_for(eps: float) -> float:
    """Returns the relative move that a probe in a precision of spacing ``eps`` aims at: :data:`TARGET` for bf16.

    The relative noise falls with the move and the curvature grows; the best move is proportional to the root of eps.
    """
    return TARGET * math.sqrt(min(eps, 2.0**-7) / 2.0**-7)


def largest_kappa(parameter_eps: float) -> float:
    """Returns the largest sensible kappa for parameters in a precision of spacing ``parameter_eps``: 2^10 for bf16.

    After rounding, a small update consists of a few parameters that have moved by one spacing each. A larger kappa
    would multiply each of them several times, and the features would no longer move linearly.
    """
    return min(KAPPA_MAX, 8 / parameter_eps)


def choose_kappa(
    previous: Tensor, relative_update: Tensor, target: float = TARGET, largest: float = KAPPA_MAX
) -> Tensor:
    """Chooses the amplification of the next probe from the result of the last one.

    The layers are to move by ``target`` in the geometric mean, none by more than twice that. Noise that is measured as
    update makes the next kappa too small, never too large. It grows by a factor of at most 64, so that from a cold
    start it is right after two or three probes.

    Args:
        previous: 0-d tensor: the last kappa, or :func:`first_kappa`.
        relative_update: float64 (L,): |df|/|f| of one unscaled step; layers with 0, NaN or infinity do not count.
        target: See :func:`target_for`.
        largest: See :func:`largest_kappa`.

    Returns:
        0-d float64 tensor: a power of two from 1 to ``largest``; ``previous`` if no layer counts.
    """
    counts = relative_update.isfinite() & (relative_update > 0)
    logarithms = torch.where(counts, relative_update.clamp_min(1e-30).log2(), 0.0)
    mean = logarithms.sum() / counts.sum()
    fastest = torch.where(counts, relative_update, 0.0).amax(dim=0)
    previous = previous.to(torch.float64)
    kappa = torch.exp2((torch.log2(torch.full_like(mean, target)) - mean).round())
    kappa = torch.minimum(kappa, torch.exp2(torch.log2(2 * target / fastest).floor()))
    kappa = torch.minimum(kappa, 64 * previous)
    return torch.where(counts.any(), kappa, previous).clamp(1.0, largest)


def first_kappa(update_norms: Tensor, parameter_norms: Tensor, target: float = TARGET) -> Tensor:
    """Returns a small first kappa from the norms of parameters and their updates.

    Features move relatively more than their parameters, 2 to 30 times as much in the study, as the moves of several
    layers add up. So the first kappa aims at a sixteenth of the target for the parameter that moves most.

    Args:
        update_norms: |dw|, (P,).
        parameter_norms: |w|, (P,); parameters with |w| = 0 (new biases) do not count.
        target: See :func:`target_for`.
    """
    counts = (parameter_norms > 0) & (update_norms > 0)
    ratio = torch.where(counts, update_norms.double() / parameter_norms.double().clamp_min(1e-300), 0.0).amax(dim=0)
    kappa = torch.exp2(torch.log2(target / 16 / ratio).floor())
    return torch.where(counts.any(), kappa, torch.ones_like(kappa)).clamp(1.0, KAPPA_MAX)
