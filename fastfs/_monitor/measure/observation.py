"""What a capture mode has observed of the features at a measured step, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastfs._monitor.measure import trust
from fastfs._monitor.measure.details import StepDetails
from fastfs._monitor.measure.loss_change import LossChange
from fastfs._monitor.measure.row_sums import LayerSums
from fastfs._stats import FeatureStats

__all__ = ["FeatureObservation", "changed_choices", "reported", "unscaled", "without_update"]


@dataclass(frozen=True)
class FeatureObservation:
    """What a capture mode has observed of the features of L layers.

    Attributes:
        verdict: Whether each layer's sums can be trusted.
        sums: The sums, with standard errors and quantiles.
        eps: Spacing at 1 of the coarsest numbers in each layer, float64 (L,).
        absent: Per layer why it has no rows, a code of ``row_reasons``; 0 where it has.
        curvature: Second-order part of the update relative to the first, at most, float64 (L,); None if unknown.
        choices: Integer results of top-k and argmax in the second forward, per forward.
        checked_choices: The same in the check before the step; empty if there was no check.
        nonlinear: Sums over df - J dw and df, float64 (L, 6), see ``_record/ranks/nonlinear.py``; None if unknown.
        loss: What the step did to the loss of the backward vectors; None if that is unknown.
        details: What the second forwards have shown of the inside of layers; None if nobody has looked.
    """

    verdict: trust.AssessedUpdate
    sums: LayerSums
    eps: Tensor
    absent: list[int]
    curvature: Tensor | None = None
    choices: Sequence[Sequence[Tensor]] = field(default_factory=tuple)
    checked_choices: Sequence[Sequence[Tensor]] = field(default_factory=tuple)
    loss: LossChange | None = None
    nonlinear: Tensor | None = None
    details: StepDetails | None = None


def changed_choices(
    first: Sequence[Sequence[Tensor]], second: Sequence[Sequence[Tensor]], device: torch.device
) -> tuple[Tensor, int]:
    """Returns how many discrete choices differ between two forwards, float64 (), and how many there are."""
    pairs = [pair for ours, theirs in zip(first, second, strict=False) for pair in zip(ours, theirs, strict=False)]
    pairs = [(a, b) for a, b in pairs if a.shape == b.shape]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for a, b in pairs:
        total = total + (a != b).sum().to(device, torch.float64)
    return total, sum(a.numel() for a, _ in pairs)


def without_update(stats: FeatureStats) -> FeatureStats:
    """Returns the sums with nan for all that needs a second forward."""
    known = ("before_sq", "backward_sq", "count", "nonfinite")
    columns = [stats._sum(name) for name in stats.names]
    return FeatureStats(
        torch.stack(
            [
                x if name in known else torch.full_like(x, torch.nan)
                for name, x in zip(stats.names, columns, strict=True)
            ],
            dim=-1,
        )
    )


def reported(verdict: trust.AssessedUpdate, plain: FeatureStats) -> Tensor:
    """Returns the sums for the record, float64 (L, 9).

    Where an enlarged update was measured, these are the verdict's sums. Elsewhere they are the plain sums, with the
    rounding noise that they may contain: what the verdict subtracts as noise is only half of an upper bound.
    """
    sums = plain.sums.clone()
    sums[:, FeatureStats.names.index("rounding_sq")] = verdict.stats.rounding_sq
    return torch.where(verdict.amplified[:, None], verdict.stats.sums, sums)


def unscaled(sums: Tensor, scale: Tensor) -> Tensor:
    """Returns sums over features with the loss scale divided out of the backward vector."""
    names = FeatureStats.names
    result = sums.clone()
    for name, power in (("update_dot_backward", 1), ("abs_update_dot_backward", 1), ("backward_sq", 2)):
        result[:, names.index(name)] /= scale**power
    return result
