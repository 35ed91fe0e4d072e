"""Optimizers of generated loops: torch's, subclasses, wrappers, and some that do more than they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Sam", "make_optimizers"]


class Subclass(torch.optim.AdamW):
    """Its step calls the one of the base class, which runs the step hooks twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Signs(torch.optim.Optimizer):
    """No closed form: the sign of a momentum."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 0.3)
                    p.sub_(torch.sgn(momentum), alpha=group["lr"])


class Rewriting(torch.optim.SGD):
    """Divides the gradients in place within its step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(0.1)
        return super().step(closure)


class Projecting(torch.optim.SGD):
    """Clamps the weights after its update."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.clamp_(-0.3, 0.3)
        return loss


class Wrapped:
    """No optimizer, but it holds one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self) -> Any:
        return self.optimizer.step()


class Lookahead(Wrapped):
    """Goes back towards slow weights after every second step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.slow = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> Any:
        loss = self.optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            parameters = [p for group in self.param_groups for p in group["params"]]
            for slow, p in zip(self.slow, parameters, strict=False):
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation that is never asked to ``step``."""

    def __init__(self, parameters: list[Tensor], base: torch.optim.Optimizer) -> None:
        super().__init__(parameters, {})
        self.base = base

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old"] = p.detach().clone()
                    p.add_(p.grad, alpha=0.1)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "old" in self.state[p]:
                    p.copy_(self.state[p].pop("old"))
        self.base.step()


def make_optimizers(kind: str, parameters: list[Tensor], scale: float) -> list[Any]:
    """Of the optimizer axis; ``scale`` is that of the learning rate."""
    large, small = 0.1 * scale, 0.01 * scale
    optim = torch.optim
    makers: dict[str, Callable[[], list[Any]]] = {
        "momentum": lambda: [optim.SGD(parameters, lr=large, momentum=0.9, weight_decay=0.1)],
        "nesterov foreach": lambda: [optim.SGD(parameters, lr=large, momentum=0.9, nesterov=True, foreach=True)],
        "adam": lambda: [optim.Adam(parameters, lr=small, weight_decay=0.1)],
        "adamw": lambda: [optim.AdamW(parameters, lr=small, weight_decay=0.1)],
        "amsgrad": lambda: [optim.Adam(parameters, lr=small, amsgrad=True)],
        "maximize": lambda: [optim.AdamW(parameters, lr=small, maximize=True)],
        "rmsprop": lambda: [optim.RMSprop(parameters, lr=small, momentum=0.5, centered=True)],
        "adamax": lambda: [optim.Adamax(parameters, lr=small)],
        "adagrad": lambda: [optim.Adagrad(parameters, lr=large)],
        "subclass": lambda: [Subclass(parameters, lr=small)],
        "own": lambda: [Signs(parameters, lr=small)],
        "rewriting": lambda: [Rewriting(parameters, lr=large)],
        "projecting": lambda: [Projecting(parameters, lr=large)],
        "wrapped": lambda: [Wrapped(optim.AdamW(parameters, lr=small))],
        "lookahead": lambda: [Lookahead(optim.SGD(parameters, lr=large))],
        "fused": lambda: [optim.AdamW(parameters, lr=small, fused=True)],
        "tensor lr": lambda: [optim.SGD(parameters, lr=torch.tensor(large))],
        "groups": lambda: [
            optim.SGD(
                [{"params": parameters[::2], "lr": large / 2, "momentum": 0.9}, {"params": parameters[1::2]}], lr=large
            )
        ],
        "in backward": lambda: [optim.AdamW([p], lr=small) for p in parameters],
    }
    if kind in ("two", "muon"):
        matrices = [p for p in parameters if p.dim() == 2]
        others = [p for p in parameters if p.dim() != 2]
        first: Any = optim.Muon if kind == "muon" else optim.SGD
        made = [first(matrices, lr=large)] if matrices else []
        return made + ([optim.AdamW(others, lr=small)] if others else [])
    return makers.get(kind, lambda: [optim.SGD(parameters, lr=large)])()
