"""The aligned decrease of every layer, from gradients and the optimizer's own update, without an extra forward.

D_l = - sum of <g, dw> over the parameters upstream of layer l (section 2, identity). g is the gradient as
``backward()`` computed it and dw the update that the optimizer made. The class
:class:`fastfs._monitor.measure.gradient_treatment.GradientFactor` finds what a loop does to gradients in between
(clipping, a gradient scaler), so that D_l is in the scale of the backward vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfs._monitor.measure.incidence import Incidence
from fastfs._monitor.measure.measured_update import MeasuredUpdate
from fastfs._monitor.measure.parameter_sample import SAMPLING
from fastfs._record import decrease_reasons
from fastfs._stats import ParameterStats

__all__ = ["Aligned", "Incidence", "LossScale", "aligned"]


class LossScale:
    """The factor by which a gradient scaler multiplies the loss, read without waiting for the device."""

    def __init__(self, scaler: Any) -> None:
        if scaler is not None and not callable(getattr(scaler, "scale", None)):
            raise TypeError(f"scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}")
        self._scaler = scaler
        self._one: Tensor | None = None

    @property
    def given(self) -> bool:
        """Whether there is a gradient scaler."""
        return self._scaler is not None

    def take(self, device: torch.device) -> Tensor:
        """Returns the factor, float64 0-d; 1 without a scaler."""
        if self._scaler is not None:
            scaled: Tensor = self._scaler.scale(torch.ones((), device=device))
            return scaled.to(torch.float64)
        if self._one is None or self._one.device != device:
            self._one = torch.ones((), dtype=torch.float64, device=device)
        return self._one


@dataclass(frozen=True)
class Aligned:
    """What one optimizer step did for each of L layers: sums, which those of other ranks are added to.

    Attributes:
        sums: float64 (C, L, 4), for C kinds of parameters: D_l in units of the loss, over the parameters upstream of
            the layer, NaN where it is not known; and |w|^2, |dw|^2, |g|^2 over those between this layer and the watched
            ones before: its own.
        dots: float64 (C, L, 2): <g, dw> in units of the loss, and <w, dw> with w after the step, over the layer's own
            parameters. NaN where only a sample of these was read, since their error is not known.
        reason: int64 (L,), why the decrease is not known: a code of :mod:`fastfs._record.decrease_reasons`, 0 where it
            is known.
        total: The decrease over all parameters, float64 (C,).
        variance: Variance of the decrease that comes from the sample of elements, float64 (C, L); 0 where all elements
            of the parameters were read. None if that holds for all layers. The norms are estimates from the same
            sample.
    """

    sums: Tensor
    dots: Tensor
    reason: Tensor
    total: Tensor
    variance: Tensor | None = None

    @property
    def decrease(self) -> Tensor:
        """D_l of the parameters of this rank, float64 (L,)."""
        return self.sums[:, :, 0].sum(dim=0)

    @classmethod
    def unknown(cls, layers: int, device: torch.device, kinds: int = 1) -> Aligned:
        """Returns the result for a step whose structure is not known."""
        nothing = torch.full((kinds, layers, 4), torch.nan, dtype=torch.float64, device=device)
        code = torch.full((layers,), decrease_reasons.STRUCTURE, dtype=torch.int64, device=device)
        return cls(nothing, nothing[:, :, :2], code, nothing[:, 0, 0])


def aligned(found: MeasuredUpdate, incidence: Incidence, factor: Tensor | None, kinds: Tensor | None = None) -> Aligned:
    """Returns the sums over each layer of what a step did to the parameters.

    Args:
        found: What the step did to every parameter, shape (P,).
        incidence: Of L layers and P parameters.
        factor: By what the gradients have to be divided; None for 1.
        kinds: Which parameters are of each kind, bool (P, C); None if all are of one.
    """
    columns = [found.stats.sums[:, column] for column in _COLUMNS]
    if found.sampling is not None:
        columns += found.sampling[:, [_VARIANCE, _SAMPLED]].unbind(dim=1)
    values, width = torch.stack(columns, dim=1), len(columns)
    if factor is not None:
        one, square = torch.ones_like(factor), factor.square()
        values = values / torch.stack([factor, one, one, square, one, square, one][:width])
    if kinds is not None:
        values = torch.where(kinds[:, :, None], values[:, None, :], 0.0).flatten(1)
    if incidence.columns > len(values):  # inputs of a pipeline stage, which stand for the parameters of those before
        values = torch.nn.functional.pad(values, (0, 0, 0, incidence.columns - len(values)))
    total = -values[:, ::width].sum(dim=0)
    upstream, own = (x.unflatten(1, (-1, width)).transpose(0, 1) for x in incidence.both(values))
    decrease = -upstream[:, :, 0]
    dots, variance = own[:, :, [0, 4]], None
    if found.sampling is not None:
        variance = upstream[:, :, 5]
        dots = torch.where(own[:, :, 6:] > 0, torch.nan, dots)
    if found.fine and incidence.everywhere:
        reason = torch.zeros(decrease.shape[1], dtype=torch.int64, device=decrease.device)
    else:
        decrease = torch.where(incidence.known, decrease, torch.nan)
        codes = torch.arange(1, len(decrease_reasons.REASONS), device=found.reason.device)
        bad = (found.reason[:, None] == codes).to(torch.float64)
        counts = incidence.upstream(torch.nn.functional.pad(bad, (0, 0, 0, incidence.columns - len(bad))))
        first = torch.where(counts > 0, codes, len(decrease_reasons.REASONS)).amin(dim=1)
        reason = torch.where(first < len(decrease_reasons.REASONS), first, decrease_reasons.FINE)
        reason = torch.where(incidence.known, reason, decrease_reasons.NOTHING)
        reason = torch.where(decrease.isnan().any(dim=0), reason, decrease_reasons.FINE)
    return Aligned(torch.cat([decrease[:, :, None], own[:, :, 1:4]], dim=2), dots, reason, total, variance)


_NAMES = ("dot", "parameter_sq", "update_sq", "gradient_sq", "parameter_dot_update")
_COLUMNS = list(map(ParameterStats.names.index, _NAMES))
_VARIANCE, _SAMPLED = map(SAMPLING.index, ("dot_variance", "sampled"))
