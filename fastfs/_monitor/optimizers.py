"""Finds the optimizers that update the parameters, inside the objects whose ``step`` the training loop calls.

A loop may call a wrapper: Accelerate's, schedule-free's, a lookahead, a class of its own. The update that counts is
that of the outermost ``step``, for the parameters in the groups of an optimizer somewhere within it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastfs._network.fully_sharded import optimized_parameters

__all__ = ["CombinedOptimizer", "TrainingOptimizer", "TrainingState", "check_optimizers", "has_hooks"]

_EXPECTED = "a torch.optim.Optimizer, an object with a step() that holds one, or a list of them"
_DELEGATES = frozenset({("accelerate.optimizer", "AcceleratedOptimizer")})  # wrappers whose step only delegates
_DEPTH = 4  # of nested wrappers


class CombinedOptimizer:
    """Presents several optimizers, or one that is no ``torch.optim.Optimizer``, as one optimizer to measure.

    Args:
        sources: Objects with ``param_groups``.
    """

    def __init__(self, sources: Sequence[Any]) -> None:
        self.sources = list(sources)
        self.state: dict[Tensor, dict[str, Any]] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for source in self.sources for group in source.param_groups]

    @property
    def grad_scale(self) -> Tensor | None:
        return next((s.grad_scale for s in self.sources if getattr(s, "grad_scale", None) is not None), None)

    @property
    def found_inf(self) -> Tensor | None:
        return next((s.found_inf for s in self.sources if getattr(s, "found_inf", None) is not None), None)


@dataclass(frozen=True)
class TrainingOptimizer:
    """One optimizer of the training loop.

    Attributes:
        outer: The object whose ``step`` makes the update. For a wrapper that only delegates, what it holds.
        real: The innermost optimizers, without whose ``step`` no update happens; ``outer`` itself if it holds none.
        optimizer: The object whose groups hold the parameters.
        copied: Whether updates have to be computed from copies, because ``outer`` may do more than ``real``.
        name: Name of the class that the user has given.
    """

    outer: Any
    real: tuple[Any, ...]
    optimizer: Any
    copied: bool
    name: str

    @property
    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def has_hooks(optimizer: Any) -> bool:
    """Returns whether torch calls step hooks of this object: it ran the constructor of ``Optimizer``."""
    if not isinstance(optimizer, Optimizer) or not getattr(type(optimizer).step, "hooked", False):
        return False
    hooks = vars(optimizer)
    return "_optimizer_step_pre_hooks" in hooks and "_optimizer_step_post_hooks" in hooks


class TrainingState:
    """What belongs to training; see :class:`fastfs._monitor.capture.replay.OwnedState`.

    Args:
        model: The model.
        optimizers: Its optimizers.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Any]) -> None:
        self._model = model
        self._optimizers = optimizers

    def tensors(self) -> list[Tensor]:
        """Returns parameters, buffers, gradients and the tensors in the optimizers' states."""
        parameters = [p for o in self._optimizers for group in o.param_groups for p in group["params"]]
        states = [x for o in self._optimizers for s in o.state.values() for x in s.values() if isinstance(x, Tensor)]
        gradients = [p.grad for p in parameters if p.grad is not None]
        model = [*self._model.parameters(), *self._model.buffers()]
        return [*parameters, *states, *gradients, *model]

    def containers(self) -> list[Any]:
        """Returns groups with learning rates, and states with counters."""
        return [x for o in self._optimizers for x in (o.param_groups, *o.param_groups, o.state)]


def check_optimizers(model: Any, optimizer: Any) -> list[TrainingOptimizer]:
    """Returns the optimizers that update the model.

    Raises:
        TypeError: The model is no module, or an object is no optimizer and holds none.
        ValueError: An optimizer is LBFGS, two optimizers share a parameter, or none updates a parameter of the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    several = isinstance(optimizer, Sequence) and not isinstance(optimizer, str)
    own = {id(p) for _, p in optimized_parameters(model)}
    found = [_find(each, own) for each in (optimizer if several else [optimizer])]
    parameters = [p for each in found for p in each.parameters]
    if len({id(p) for p in parameters}) != len(parameters):
        raise ValueError("optimizer: expected every parameter in one optimizer, got some in several")
    if not any(id(p) in own for p in parameters):
        what = ", ".join(each.name for each in found) or "an empty list"
        raise ValueError(f"optimizer: {what} updates no parameter of {type(model).__name__}")
    return found


def _find(given: Any, own: set[int]) -> TrainingOptimizer:
    """Looks into what the user has given as an optimizer, for a model with the parameters whose ids are ``own``."""
    name, outer = type(given).__name__, given
    if isinstance(given, LRScheduler) or not callable(getattr(given, "step", None)):
        raise TypeError(f"optimizer: expected {_EXPECTED}, got {name}")
    while (type(outer).__module__, type(outer).__qualname__) in _DELEGATES and len(held := _held(outer)) == 1:
        outer = held[0]
    real = tuple(_innermost(outer, _DEPTH, {id(outer)}))
    for each in (outer, *real):
        if isinstance(each, LBFGS):
            inside = "" if each is given else f", which {name} holds,"
            raise ValueError(
                f"optimizer: LBFGS{inside} evaluates the loss several times in a step; a step cannot be measured"
            )
    if not real:
        if not _has_groups(outer):
            raise TypeError(f"optimizer: expected {_EXPECTED}, got {name}")
        copied = not has_hooks(outer)
        optimizer = outer if isinstance(outer, Optimizer) else CombinedOptimizer([outer])
        return TrainingOptimizer(outer, (outer,), optimizer, copied, name)
    # A wrapper may have groups of its own (shards, other precision); those with the model's parameters count.
    candidates = [outer, *real] if _has_groups(outer) else list(real)
    holders = [each for each in candidates if own & set(map(id, _parameters(each)))] or candidates
    if len(real) == 1 and set(map(id, _parameters(outer))) == set(map(id, _parameters(real[0]))):
        holders = [real[0]]  # its class determines the closed form of the update
    if holders[0] is outer:
        holders = [outer]
    optimizer = holders[0] if len(holders) == 1 and isinstance(holders[0], Optimizer) else CombinedOptimizer(holders)
    return TrainingOptimizer(outer, real, optimizer, True, name)


def _has_groups(thing: Any) -> bool:
    groups = getattr(thing, "param_groups", None)
    return isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups)


def _parameters(thing: Any) -> list[Tensor]:
    return [p for group in thing.param_groups for p in group["params"]] if _has_groups(thing) else []


def _held(thing: Any) -> list[Any]:
    """Returns possible optimizers in an object's attributes, and in lists and dictionaries there."""
    values: list[Any] = []
    for name, value in getattr(thing, "__dict__", {}).items():
        if isinstance(value, (list, tuple)):
            values += value
        elif isinstance(value, dict) and name != "state":
            values += value.values()
        else:
            values.append(value)
    for kind in type(thing).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        values += [getattr(thing, s) for s in ([slots] if isinstance(slots, str) else slots) if hasattr(thing, s)]
    return [value for value in {id(v): v for v in values}.values() if value is not thing and _may_step(value)]


def _may_step(thing: Any) -> bool:
    if isinstance(thing, (type, Tensor, nn.Module, LRScheduler, torch.amp.GradScaler)):
        return False
    return isinstance(thing, Optimizer) or (hasattr(thing, "__dict__") and callable(vars(type(thing)).get("step")))


def _innermost(thing: Any, depth: int, seen: set[int]) -> list[Any]:
    """Returns optimizers within an object that hold no other optimizer."""
    found: list[Any] = []
    for each in _held(thing) if depth else []:
        if id(each) in seen:
            continue
        seen.add(id(each))
        within = _innermost(each, depth - 1, seen)
        found += within or ([each] if isinstance(each, Optimizer) else [])
    return found
