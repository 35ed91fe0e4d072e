"""Optimizers and wrappers whose steps are watched, and a listener that notes what it is told."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastfs._monitor.optimizers import check_optimizers
from fastfs._monitor.steps import OptimizerSteps

__all__ = ["MAKERS", "ONE", "Accumulating", "Deeper", "Log", "Mine", "Plain", "Slow", "give", "watch"]


class Log:
    """A listener."""

    def __init__(self, broken: str = "") -> None:
        self.calls: list[str] = []
        self.broken = broken

    def _say(self, what: str) -> None:
        self.calls.append(what)
        if what == self.broken:
            raise ZeroDivisionError(what)

    def enter(self, optimizer: int) -> None:
        self._say("enter")

    def evaluate(self, optimizer: int) -> None:
        self._say("evaluate")

    def before(self, optimizer: int, first: bool) -> None:
        self._say(f"before{optimizer}{'!' if first else ''}")

    def after(self, optimizer: int) -> None:
        self._say(f"after{optimizer}")

    def finish(self) -> None:
        self._say("finish")

    def failed(self, error: Exception) -> None:
        self.calls.append(f"failed {type(error).__name__}")

    def take(self) -> list[str]:
        taken, self.calls = self.calls, []
        return taken


class Mine(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Deeper(Mine):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Plain:
    """A class of the loop's own."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step() if closure is None else self.inner.step(closure)

    def zero_grad(self) -> None:
        self.inner.zero_grad()


class Slow(torch.optim.Optimizer):
    """A lookahead: the base optimizer, and every second step half of the way back. Its hooks are never called."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()  # as timm does, without Optimizer.__init__
        self._optimizer_step_post_hooks = OrderedDict()
        self.base = base
        self.param_groups = base.param_groups
        self.defaults = base.defaults
        self.state = base.state
        self.slow = [p.detach().clone() for group in base.param_groups for p in group["params"]]
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for p, slow in zip((p for g in self.param_groups for p in g["params"]), self.slow, strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


class Accumulating(Plain):
    """Steps every second time only."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return self.inner.step() if self.count % 2 == 0 else None


def watch(model: nn.Module, optimizer: Any, broken: str = "") -> tuple[Log, OptimizerSteps]:
    log = Log(broken)
    return log, OptimizerSteps(check_optimizers(model, optimizer), log)


def give(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)


ONE = ["before0!", "after0", "finish"]
MAKERS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "super": lambda ps: Mine(ps),
    "three levels": lambda ps: Deeper(ps),
    "wrapper": lambda ps: Plain(torch.optim.SGD(ps, lr=0.1)),
    "wrapper of a subclass": lambda ps: Plain(Deeper(ps)),
    "wrapper in a wrapper": lambda ps: Plain(Plain(torch.optim.SGD(ps, lr=0.1))),
    "lookahead": lambda ps: Slow(torch.optim.SGD(ps, lr=0.1)),
    "lookahead in a wrapper": lambda ps: Plain(Slow(torch.optim.SGD(ps, lr=0.1))),
}
