"""Estimates of a feature update and of their error, from a plain replay and from the central amplified probe.

The module `trust` explains both, and decides which of the estimates can be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastfs._stats import FeatureStats

__all__ = [
    "CentralProbe",
    "UpdateEstimate",
    "better",
    "curvature",
    "from_probe",
    "from_replay",
    "odd_part",
    "second_difference",
]

# Noise of so many independent directions, at least, that its part along the update averages out of a plain replay: in
# deep ReLU networks all rows are nearly alike, and so is their rounding.
_DIRECTIONS = 64.0


@dataclass(frozen=True)
class CentralProbe:
    """The central amplified probe: sums of unscaled differences, each of shape (L,), against the same backward vectors.

    Attributes:
        minus: Of f(w) and f(w - kappa dw).
        plus: Of f(w) and f(w + kappa dw). With kappa = 1 that is the plain replay.
        central: Of f(w - kappa dw) and f(w + kappa dw).
        kappa: 0-d tensor, at least 1; a power of two, so that parameters in 16 bits are not rounded anew.
    """

    minus: FeatureStats
    plus: FeatureStats
    central: FeatureStats
    kappa: Tensor


@dataclass(frozen=True)
class UpdateEstimate:
    """An estimate of the update by dw; every tensor has shape (L,), except `sums`.

    Attributes:
        sums: Of the update, (L, 9).
        second: Second difference: squared norm of everything that is not first order, mostly noise.
        q: The second difference relative to the update; NaN where nothing moves (frozen layers), which says nothing
            about the layers above.
        noise_error: Relative error by noise.
        error: Relative error in all.
        amplified: Whether the estimate comes from the probe.
    """

    sums: Tensor
    second: Tensor
    q: Tensor
    noise_error: Tensor
    error: Tensor
    amplified: Tensor


def curvature(probe: CentralProbe) -> Tensor:
    """Returns the second-order part of the update relative to its first-order part, including rounding noise: (L,)."""
    kappa = probe.kappa.to(torch.float64)
    return (second_difference(probe) / probe.central.update_sq).sqrt() / kappa


def second_difference(probe: CentralProbe) -> Tensor:
    """Returns |f(w + kappa dw) + f(w - kappa dw) - 2 f(w)|^2: (L,)."""
    doubled = 2 * (probe.plus.update_sq + probe.minus.update_sq)
    return (doubled - probe.central.update_sq).clamp_min(0.0)


def odd_part(plain: FeatureStats, probe: CentralProbe) -> Tensor:
    """Returns what the residual is computed from: <b, df>, |df|^2 and the square of the relative move, (3, L).

    The odd part of the probe is free of curvature to second order.
    """
    kappa = probe.kappa.to(torch.float64)
    dot = (probe.plus.update_dot_backward - probe.minus.update_dot_backward) / (2 * kappa)
    moved_sq = probe.central.update_sq / (4 * plain.before_sq)
    return torch.stack([dot, probe.central.update_sq / (2 * kappa).square(), moved_sq])


def from_probe(plain: FeatureStats, probe: CentralProbe, second: Tensor, entries: Tensor) -> UpdateEstimate:
    """Returns the update from the central difference, with its curvature from the second difference.

    With f(w + k dw) = f + k d + k^2 c / 2 the update is d + c/2: <.,b> and |.|^2 of it follow from the three sums. At
    kappa = 1 this is the plain replay, exactly.

    Args:
        plain: The plain replay.
        probe: The probe.
        second: Its second difference.
        entries: Number of entries with noise of their own.
    """
    kappa = probe.kappa.to(torch.float64)
    odd, even = 1 / (2 * kappa), 1 / (2 * kappa**2)

    def linear(name: str) -> Tensor:
        plus, minus = probe.plus._sum(name), probe.minus._sum(name)
        return odd * (plus - minus) + even * (plus + minus)

    share = odd**2 + 3 * even**2  # of the noise in central, that is S/3 at most
    noise = second / 3 * share
    update_sq = (
        odd**2 * probe.central.update_sq
        + 2 * odd * even * (probe.plus.update_sq - probe.minus.update_sq)
        + even**2 * second
        - noise / 2
    )
    q = second / probe.central.update_sq * (share / odd**2)
    moved = kappa.square() * update_sq / plain.before_sq
    noise_error = q / 4 + _along(q, entries)
    error = noise_error + moved * (1 - 1 / kappa.square())
    columns = {
        "update_dot_backward": linear("update_dot_backward"),
        "update_sq": update_sq,
        "before_dot_update": linear("before_dot_update"),
        "abs_update_dot_backward": odd * probe.central.abs_update_dot_backward,
        "rounding_sq": noise / 2,
        "nonfinite": plain._sum("nonfinite") + probe.plus._sum("nonfinite") + probe.minus._sum("nonfinite"),
    }
    everywhere = torch.ones_like(q, dtype=torch.bool)
    return UpdateEstimate(_replace(plain, columns), second, q, noise_error, error, everywhere)


def from_replay(plain: FeatureStats, second: Tensor, entries: Tensor) -> UpdateEstimate:
    """Returns the update from the plain replay.

    Args:
        plain: The plain replay.
        second: Bound of its noise, as a second difference would show it.
        entries: Number of entries with noise of their own.
    """
    noise = second / 3
    update_sq = plain.update_sq - noise / 2
    q = torch.where(plain.update_sq > 0, second / update_sq.clamp_min(0.0), torch.nan)  # inf: all of it may be noise
    error = q / 4 + torch.maximum((q / (3 * _DIRECTIONS)).sqrt(), _along(q, entries))
    columns = {"update_sq": update_sq, "rounding_sq": noise / 2}
    nowhere = torch.zeros_like(q, dtype=torch.bool)
    return UpdateEstimate(_replace(plain, columns), second, q, error, error, nowhere)


def _along(q: Tensor, entries: Tensor) -> Tensor:
    """Returns noise along the update, relative to it: three standard deviations if every entry is rounded by itself.

    It averages out in layers with many entries; in those with few it is the error of the norm.
    """
    return (3 * q / entries).sqrt()


def better(first: UpdateEstimate, second: UpdateEstimate) -> UpdateEstimate:
    """Returns for each layer the estimate with the smaller error."""
    take = ~(second.error < first.error)
    return UpdateEstimate(
        torch.where(take[:, None], first.sums, second.sums),
        torch.where(take, first.second, second.second),
        torch.where(take, first.q, second.q),
        torch.where(take, first.noise_error, second.noise_error),
        torch.where(take, first.error, second.error),
        torch.where(take, first.amplified, second.amplified),
    )


def _replace(stats: FeatureStats, columns: dict[str, Tensor]) -> Tensor:
    return torch.stack([columns[name] if name in columns else stats._sum(name) for name in stats.names], dim=-1)
