"""The aligned decrease of every layer, from gradients and the optimizer's own update: no extra forward.

D_l = - sum of <g, dw> over the parameters upstream of layer l (section 2, identity). g is the gradient as
``backward()`` computed it and dw what the optimizer really did. What a loop does to gradients in between (clipping, a
gradient scaler) is found by :class:`fastfs.monitor.measure.gradients.GradientFactor`, so that D_l fits the backward
vector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfs.stats import ParameterStats

__all__ = ["Aligned", "Incidence", "LossScale", "aligned"]


class LossScale:
    """What a gradient scaler multiplies the loss with, asked without waiting for the device."""

    def __init__(self, scaler: Any) -> None:
        if scaler is not None and not callable(getattr(scaler, "scale", None)):
            raise TypeError(f"scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}")
        self._scaler = scaler

    @property
    def given(self) -> bool:
        return self._scaler is not None

    def take(self, device: torch.device) -> Tensor:
        """float64 0-d: 1 without a scaler."""
        one = torch.ones((), device=device)
        scaled = one if self._scaler is None else self._scaler.scale(one)
        return scaled.to(torch.float64)


class Aligned:
    """What one optimizer step did, per layer: float64 tensors (L,) on the device of the parameters.

    Attributes:
        decrease: D_l, in units of the loss; nan while the structure is not known.
        parameter_norm, update_norm, gradient_norm: of the parameters between this layer and the watched ones before.
    """

    __slots__ = ("decrease", "gradient_norm", "parameter_norm", "update_norm")

    def __init__(self, decrease: Tensor, parameter_norm: Tensor, update_norm: Tensor, gradient_norm: Tensor) -> None:
        self.decrease = decrease
        self.parameter_norm = parameter_norm
        self.update_norm = update_norm
        self.gradient_norm = gradient_norm

    @classmethod
    def unknown(cls, layers: int, device: torch.device) -> Aligned:
        return cls(*(torch.full((layers,), torch.nan, dtype=torch.float64, device=device) for _ in range(4)))


class Incidence:
    """Which parameters count for which layer, as matrices on the device."""

    def __init__(self, upstream: Tensor, own: Tensor, device: torch.device) -> None:
        def matrix(bits: Tensor) -> Tensor:
            return bits.to(torch.float64).to(device, non_blocking=True)

        self.upstream = matrix(upstream)
        self.own = matrix(own)
        # Without any parameter upstream nothing is known: the layer did not run, or is hidden from the graph.
        self.known = self.upstream.any(dim=1)


def aligned(stats: ParameterStats, incidence: Incidence, factor: Tensor) -> Aligned:
    """Sums over parameters to sums over layers.

    Args:
        stats: of every parameter, shape (P,).
        incidence: of L layers and P parameters.
        factor: what the gradients in ``stats`` have to be divided by.
    """
    gradients = factor.square()
    own = incidence.own @ torch.stack([stats.parameter_sq, stats.update_sq, stats.gradient_sq / gradients], dim=1)
    decrease = torch.where(incidence.known, -(incidence.upstream @ stats.dot) / factor, torch.nan)
    return Aligned(decrease, *own.sqrt().unbind(dim=1))
