"""The monitor's measurement without a library, as a reference for numbers and cost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Naive:
    """A naive implementation: clone everything, run the forward again, and reduce in float64 with eager torch."""

    def __init__(self, model: nn.Module, layers: list[str]) -> None:
        self.angles: list[Tensor] = []
        self.decrease = torch.zeros(())
        self._model = model
        self._modules = [dict(model.named_modules())[name] for name in layers]
        self._handles = [
            m.register_forward_hook(lambda _m, _args, out, i=i: self._seen(i, out)) for i, m in enumerate(self._modules)
        ]
        self._replaying = False
        self._clear()

    def _clear(self) -> None:
        self._before: list[Tensor] = [torch.empty(0)] * len(self._modules)
        self._after, self._backward = list(self._before), list(self._before)
        self._weights: list[tuple[Tensor, Tensor]] = []

    def _seen(self, index: int, features: Tensor) -> None:
        if self._replaying:
            self._after[index] = features.detach().clone()
            return
        self._before[index] = features.detach().clone()
        features.register_hook(lambda gradient: self._backward.__setitem__(index, gradient.detach().clone()))

    def before_step(self) -> None:
        self._weights = [
            (p.detach().clone(), p.grad.detach().clone()) for p in self._model.parameters() if p.grad is not None
        ]

    @torch.no_grad()
    def after_step(self, forward: Callable[[], object]) -> None:
        self._replaying = True
        forward()
        self._replaying = False
        self.angles = []
        for before, after, backward in zip(self._before, self._after, self._backward, strict=True):
            f, df, b = before.double(), after.double() - before.double(), backward.double()
            cosine = -(df * b).sum() / ((df * df).sum() * (b * b).sum()).sqrt()
            speed, size = df.square().mean().sqrt(), f.square().mean().sqrt()
            self.angles.append(torch.stack([torch.arccos(cosine), speed, speed / size]))
        new = [p for p in self._model.parameters() if p.grad is not None]
        parts = [-(g.double() * (p.double() - w.double())).sum() for p, (w, g) in zip(new, self._weights, strict=True)]
        self.decrease = torch.stack(parts).sum()
        self._clear()
