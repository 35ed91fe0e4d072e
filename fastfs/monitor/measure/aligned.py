"""The aligned decrease of every layer, from gradients and the optimizer's own update: no extra forward.

D_l = - sum of <g, dw> over the parameters upstream of layer l (section 2, identity). g is the gradient as
``backward()`` computed it and dw what the optimizer really did. In between a loop may scale all gradients by one
factor: clipping by norm, a gradient scaler. :class:`GradientFactor` finds it, and D_l fits the backward vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastfs.functional import update_stats
from fastfs.monitor.capture.taps import OFF, Hook, Switch
from fastfs.monitor.measure.incidence import Incidence
from fastfs.stats import ParameterStats

__all__ = ["Aligned", "GradientFactor", "Incidence", "LossScale", "aligned"]

_WITNESSES = 2  # of each kind
_NUMBERS = 4096  # of each
_PARALLEL = 1e-4  # 1 - cos^2 up to which two gradients are one direction: rounding to 16 bits moves it by 1e-6


class _Witness(Hook):
    """Copies a parameter's gradient whenever a backward has added to it."""

    def __init__(self, switch: Switch, always: bool, index: int, seen: dict[int, Tensor]) -> None:
        self.switch = switch
        self.always = always
        self.index = index
        self.seen = seen

    def __call__(self, parameter: Tensor) -> None:
        if (self.always or self.switch.level != OFF) and parameter.grad is not None:
            self.seen[self.index] = _part(parameter.grad).clone()


class GradientFactor:
    """By which factor the gradients that the optimizer sees differ from those that ``backward()`` computed.

    The smallest vectors and matrices are witnesses: their gradients are copied when they come, and compared before the
    step. What happens to others alone is not seen.

    Args:
        parameters: those that the optimizers update.
        switch: nothing is copied while it is off.
        always: copy all the same, so that steps that a gradient scaler skips are seen.
    """

    def __init__(self, parameters: Sequence[Tensor], switch: Switch, *, always: bool) -> None:
        self._switch = switch
        self._always = always
        self._parameters: list[Tensor] = []
        self._seen: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self.watch(parameters)

    def watch(self, parameters: Sequence[Tensor]) -> None:
        """Choose witnesses among these: of vectors and of matrices, since loops treat them differently."""
        self.close()
        own = sorted((p for p in parameters if p.requires_grad and p.is_leaf), key=lambda p: p.numel())
        vectors, matrices = [p for p in own if p.dim() < 2 and p.numel() > 1], [p for p in own if p.dim() > 1]
        self._parameters = [*vectors[:_WITNESSES], *matrices[:_WITNESSES]] or own[:_WITNESSES]
        self._handles = [
            p.register_post_accumulate_grad_hook(_Witness(self._switch, self._always, i, self._seen))
            for i, p in enumerate(self._parameters)
        ]

    @property
    def waiting(self) -> bool:
        """Whether a backward has been seen since :meth:`clear`."""
        return bool(self._seen)

    def thrown_away(self) -> bool:
        """Whether a backward was seen whose gradients are gone: ``zero_grad()`` without a step."""
        return self.waiting and all(self._parameters[i].grad is None for i in self._seen)

    def take(self, device: torch.device) -> Tensor:
        """The factor, float64 0-d: 1 if nothing happened to the gradients, nan if it was no common factor."""
        pairs = [(seen, self._parameters[index].grad) for index, seen in self._seen.items()]
        parts = [(old, _part(new)) for old, new in pairs if new is not None]
        found = [(old, new) for old, new in parts if new.shape == old.shape]
        if not found:  # in the backward gradients go before they can be asked; else nobody has witnessed anything
            within = torch._C._current_graph_task_id() != -1
            return torch.full((), 1.0 if within else torch.nan, dtype=torch.float64, device=device)
        stats = update_stats([old.to(device) for old, _ in found], [new.to(device) for _, new in found])
        dot, now, before = stats.sums[:, :3].sum(dim=0).unbind()
        factor = torch.where(before > 0, dot / before, 1.0)
        return torch.where(dot.square() >= (1.0 - _PARALLEL) * before * now, factor, torch.nan)

    def clear(self) -> None:
        self._seen.clear()

    def close(self) -> None:
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _part(gradient: Tensor) -> Tensor:
    """The first numbers of a gradient: a factor is common to all."""
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return dense.detach().reshape(-1)[:_NUMBERS]


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


def aligned(stats: ParameterStats, incidence: Incidence, factor: Tensor) -> Aligned:
    """Sums over parameters to sums over layers.

    Args:
        stats: of every parameter, shape (P,).
        incidence: of L layers and P parameters.
        factor: what the gradients in ``stats`` have to be divided by.
    """
    gradients = factor.square()
    own = incidence.own(torch.stack([stats.parameter_sq, stats.update_sq, stats.gradient_sq / gradients], dim=1))
    decrease = torch.where(incidence.known, -incidence.upstream(stats.dot[:, None])[:, 0] / factor, torch.nan)
    return Aligned(decrease, *own.sqrt().unbind(dim=1))
