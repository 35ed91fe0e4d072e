"""The aligned decrease of every layer, from gradients and the optimizer's own update, without an extra forward.

D_l = - sum of <g, dw> over the parameters upstream of layer l (section 2, identity). g is the gradient as
``backward()`` computed it and dw the update that the optimizer made. The class
:class:`fastfs._monitor.measure.gradient_treatment.GradientFactor` finds what a loop does to gradients in between
(clipping, a gradient scaler), so that D_l is in the scale of the backward vector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfs._monitor.measure import decrease_reasons
from fastfs._monitor.measure.incidence import Incidence
from fastfs._monitor.measure.measured_update import MeasuredUpdate
from fastfs._monitor.measure.parameter_sample import SAMPLING
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


class Aligned:
    """What one optimizer step did for each layer: tensors (L,) on the device of the parameters.

    Attributes:
        decrease: D_l, in units of the loss, float64; NaN where it is not known.
        parameter_norm, update_norm, gradient_norm: Of the parameters between this layer and the watched ones before.
        reason: int64, why the decrease is not known: a code of :mod:`fastfs._monitor.measure.decrease_reasons`, 0 where
            it is known.
        decrease_se: Standard error of the decrease that comes from the sample of elements, in units of the loss,
            float64; 0 where all elements of the parameters were read. None if that holds for all layers. The norms are
            estimates from the same sample.
    """

    __slots__ = ("decrease", "decrease_se", "gradient_norm", "parameter_norm", "reason", "update_norm")

    def __init__(
        self,
        decrease: Tensor,
        parameter_norm: Tensor,
        update_norm: Tensor,
        gradient_norm: Tensor,
        reason: Tensor,
        decrease_se: Tensor | None = None,
    ) -> None:
        self.decrease = decrease
        self.parameter_norm = parameter_norm
        self.update_norm = update_norm
        self.gradient_norm = gradient_norm
        self.reason = reason
        self.decrease_se = None if decrease_se is None else torch.where(decrease.isnan(), torch.nan, decrease_se)

    @classmethod
    def unknown(cls, layers: int, device: torch.device) -> Aligned:
        """Returns the result for a step whose structure is not known."""
        nothing = torch.full((layers,), torch.nan, dtype=torch.float64, device=device)
        code = torch.full((layers,), decrease_reasons.STRUCTURE, dtype=torch.int64, device=device)
        return cls(nothing, nothing, nothing, nothing, code)


def aligned(found: MeasuredUpdate, incidence: Incidence, factor: Tensor | None) -> Aligned:
    """Returns the sums over each layer of what a step did to the parameters.

    Args:
        found: What the step did to every parameter, shape (P,).
        incidence: Of L layers and P parameters.
        factor: By what the gradients have to be divided; None for 1.
    """
    if factor is None and found.fine and incidence.everywhere:
        return _all_known(found, incidence)
    stats = found.stats
    if factor is None:
        factor = torch.ones((), dtype=torch.float64, device=stats.sums.device)
    own = incidence.own(torch.stack([stats.parameter_sq, stats.update_sq, stats.gradient_sq / factor.square()], dim=1))
    codes = torch.arange(1, len(decrease_reasons.REASONS), device=found.reason.device)
    counts = (found.reason[:, None] == codes).to(torch.float64)
    values = [stats.dot[:, None], counts]
    if found.sampling is not None:
        values.append(found.sampling[:, _VARIANCE, None])
    sums = incidence.upstream(torch.cat(values, dim=1))
    error = None if found.sampling is None else sums[:, -1].sqrt() / factor.abs()
    decrease = torch.where(incidence.known, -sums[:, 0] / factor, torch.nan)
    first = torch.where(sums[:, 1 : 1 + len(codes)] > 0, codes, len(decrease_reasons.REASONS)).amin(dim=1)
    reason = torch.where(first < len(decrease_reasons.REASONS), first, decrease_reasons.FINE)
    reason = torch.where(incidence.known, reason, decrease_reasons.NOTHING)
    parameters, updates, gradients = own.sqrt().unbind(dim=1)
    reason = torch.where(decrease.isnan(), reason, decrease_reasons.FINE)
    return Aligned(decrease, parameters, updates, gradients, reason, error)


_DOT, _PARAMETER, _UPDATE, _GRADIENT = (
    ParameterStats.names.index(name) for name in ("dot", "parameter_sq", "update_sq", "gradient_sq")
)


_VARIANCE = SAMPLING.index("dot_variance")


def _all_known(found: MeasuredUpdate, incidence: Incidence) -> Aligned:
    """The same in fewer operations, if the host knows that all updates are known."""
    values = found.stats.sums
    if found.sampling is not None:
        values = torch.cat([values, found.sampling], dim=1)
    upstream, own = incidence.both(values)
    norms = own.sqrt().unbind(dim=1)
    error = None
    if found.sampling is not None:
        error = upstream[:, len(ParameterStats.names) + _VARIANCE].sqrt()
    decrease = -upstream[:, _DOT]
    parameters, updates, gradients = norms[_PARAMETER], norms[_UPDATE], norms[_GRADIENT]
    fine = torch.zeros(len(decrease), dtype=torch.int64, device=decrease.device)
    return Aligned(decrease, parameters, updates, gradients, fine, error)
