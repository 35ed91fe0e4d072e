"""What a measured step has shown of the features, and what follows from it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastfs._monitor.capture.passes import Pass
from fastfs._monitor.measure import trust
from fastfs._monitor.measure.row_sums import LayerSums
from fastfs._stats import FeatureStats

__all__ = ["Look", "changed_choices", "graphs_of", "is_linear", "reported", "unscaled", "without_update"]


@dataclass
class Look:
    """What a measured step has shown of the features.

    Attributes:
        verdict: per layer.
        sums: that standard errors and quantiles come from.
        eps, depth: of the layers, as for :func:`fastfs._monitor.measure.trust.assess`.
        absent: per layer why it has no rows, 0 where it has.
        curvature: second-order part of the update relative to the first, at most; None where it was not seen.
        choices: integer results of top-k and argmax in the second forward, of each pass.
    """

    verdict: trust.AssessedUpdate
    sums: LayerSums
    eps: Tensor
    depth: Tensor
    absent: list[int]
    curvature: Tensor | None = None
    choices: list[list[Tensor]] = field(default_factory=list)


_LINEAR = 0.1  # residual, or curvature, up to which first order describes a step


def is_linear(residual: Tensor, residual_se: Tensor, curvature: Tensor | None) -> Tensor:
    """Whether first order describes the step: float64 (L,), 1 or 0, nan where nothing tells."""
    by_residual = (residual.abs() <= _LINEAR + 2 * residual_se.nan_to_num(0.0)).to(torch.float64)
    unknown = torch.full_like(residual, torch.nan)
    other = unknown if curvature is None else torch.where(curvature.isnan(), unknown, (curvature <= _LINEAR).double())
    return torch.where(residual.isnan(), other, by_residual)


def changed_choices(
    first: Sequence[Sequence[Tensor]], second: Sequence[Sequence[Tensor]], device: torch.device
) -> tuple[Tensor, int]:
    """How many discrete choices of a forward differ in the second one, float64 (), and how many there are."""
    pairs = [pair for ours, theirs in zip(first, second, strict=False) for pair in zip(ours, theirs, strict=False)]
    pairs = [(a, b) for a, b in pairs if a.shape == b.shape]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for a, b in pairs:
        total = total + (a != b).sum().to(device, torch.float64)
    return total, sum(a.numel() for a, _ in pairs)


def graphs_of(passes: Sequence[Pass]) -> Hashable:
    """What tells the forwards of one step from those of another kind."""
    return frozenset(p.signature for p in passes)


def without_update(stats: FeatureStats) -> FeatureStats:
    """Where no second forward was made, nothing is known of the update."""
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
    """The verdict's sums where they come from an enlarged update; else what was seen, with the noise that may be in it.

    What the verdict takes out of a plain replay as noise is a guess: half of the most that it can be.
    """
    seen = plain.sums.clone()
    seen[:, FeatureStats.names.index("rounding_sq")] = verdict.stats.rounding_sq
    return torch.where(verdict.amplified[:, None], verdict.stats.sums, seen)


def unscaled(sums: Tensor, scale: Tensor) -> Tensor:
    """Sums over features with the loss scale taken out of the backward vector."""
    names = FeatureStats.names
    result = sums.clone()
    for name, power in (("update_dot_backward", 1), ("abs_update_dot_backward", 1), ("backward_sq", 2)):
        result[:, names.index(name)] /= scale**power
    return result
