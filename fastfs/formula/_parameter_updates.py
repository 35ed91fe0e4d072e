"""Parameter updates of a step that is not taken: plain gradient descent, or any optimizer."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastfs._network.learning_rates import LearningRates, resolve
from fastfs._network.state import RandomState

__all__ = ["check_plain_step", "copied_optimizer", "gradient_descent", "optimizer_update"]


def gradient_descent(lr: LearningRates, names: Sequence[str], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return dw = -lr g for every parameter.

    Args:
        lr: learning rate, or regular expression -> learning rate: a number, or a tensor with one rate per entry.
        names: names of the parameters.
        gradients: gradients of the parameters.

    Returns:
        Updates of the shapes and dtypes of the gradients.

    Raises:
        TypeError: ``lr`` is neither a number nor a mapping.
        ValueError: a name matches no or several expressions, an expression is invalid or matches no name, or a rate is
            negative, not finite or of a shape that does not broadcast.

    Source: gradient descent as in section 2 of "The Feature Speed Formula", arXiv 2311.18718.
    """
    return [-rate * gradient for rate, gradient in zip(resolve(lr, names, gradients), gradients, strict=True)]


def optimizer_update(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Return what the next step of an optimizer would add to the parameters, given their gradients.

    A copy of the optimizer, with its state, steps on copies of the parameters. The originals are not modified, and
    hooks of the optimizer are not called. The update includes momentum, preconditioning, weight decay and the learning
    rates of parameter groups.

    Args:
        optimizer: an optimizer of any type whose step needs no closure.
        parameters: parameters whose updates are returned; zero for those that the optimizer does not have.
        gradients: gradients of these parameters, in any floating-point dtype.
        dtype: dtype to which parameters and state are cast for the step. None takes the actual step, including the
            rounding of the parameters, in which small updates are lost.

    Returns:
        w_after - w_before of each parameter, in the dtype of the step or float32, whichever is wider.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or its step needs a closure.
        ValueError: the optimizer has none of the parameters, or parameters and gradients differ in number.
    """
    check_plain_step(optimizer)
    if len(parameters) != len(gradients):
        raise ValueError(f"optimizer_update: got {len(parameters)} parameters and {len(gradients)} gradients")
    own = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in own for p in parameters):
        raise ValueError(f"optimizer: this {type(optimizer).__name__} has none of the parameters of the model")
    clones: dict[int, Tensor] = {
        key: p.detach().to(dtype or p.dtype, copy=True).requires_grad_(p.requires_grad) for key, p in own.items()
    }
    clone = copied_optimizer(optimizer, clones)
    if dtype is not None:
        _cast(clone, dtype)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if id(parameter) in clones:
            clones[id(parameter)].grad = gradient.detach().to(dtype or parameter.dtype, copy=True)
    step: Any = type(clone).step
    if getattr(step, "hooked", False):  # torch wraps the step to call hooks, including global ones
        step = step.__wrapped__
    randomness = RandomState.take({p.device for p in own.values() if p.device.type != "cpu"})
    try:
        with torch.enable_grad():  # optimizers disable gradients themselves where they need none
            step(clone)
    finally:
        randomness.restore()
    return [_difference(clones.get(id(p)), p) for p in parameters]


def check_plain_step(optimizer: Optimizer) -> None:
    """Check that an optimizer has a step for the gradients of one backward.

    Args:
        optimizer: the optimizer.

    Raises:
        TypeError: it is not an optimizer, or its step needs a closure.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if isinstance(optimizer, torch.optim.LBFGS) or (closure is not None and closure.default is closure.empty):
        name = type(optimizer).__name__
        raise TypeError(f"optimizer: {name} evaluates the loss in its step and so has no update for a single gradient")


def copied_optimizer(optimizer: Optimizer, clones: dict[int, Tensor]) -> Optimizer:
    """Return a copy of the optimizer with its state, for other parameters and without hooks.

    Args:
        optimizer: the optimizer.
        clones: the other parameters, by the ids of those that the optimizer has.

    Returns:
        The copy.
    """
    kept = {
        name: value
        for name, value in vars(optimizer).items()
        if "_hooks" not in name and name != "step"  # learning rate schedulers replace the step of the instance
    }
    clone: Optimizer = object.__new__(type(optimizer))
    memo = dict(clones)
    vars(clone).update(copy.deepcopy(kept, memo))
    for name in vars(optimizer):
        if "_hooks" in name:
            setattr(clone, name, OrderedDict())
    return clone


def _cast(optimizer: Optimizer, dtype: torch.dtype) -> None:
    """Cast per-entry state to a dtype, also of nested optimizers; step counters keep theirs."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
                state[name] = value.to(dtype)
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer):
            _cast(value, dtype)


def _difference(after: Tensor | None, before: Tensor) -> Tensor:
    dtype = torch.promote_types(before.dtype if after is None else after.dtype, torch.float32)
    if after is None:
        return torch.zeros_like(before, dtype=dtype)
    return after.detach().to(dtype) - before.detach().to(dtype)
