"""Optimizers that are given by name, as instances, or as functions that create them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from fastfs._network.linearization import Linearization
from fastfs.formula._parameter_updates import check_plain_step
from fastfs.scaling._rendering import some

__all__ = ["OptimizerLike", "factory", "has_all", "label", "made", "named"]

OptimizerLike: TypeAlias = str | Optimizer | Callable[..., Optimizer]
"""``"sgd"``, ``"adam"``, ``"adamw"``, an optimizer, or a function that creates one from parameter groups and ``lr``."""

_NAMED: dict[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def named(name: str) -> type[Optimizer]:
    """Return the optimizer class of the given name.

    Args:
        name: ``"sgd"``, ``"adam"`` or ``"adamw"``.

    Returns:
        The class.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in _NAMED:
        raise ValueError(f"optimizer: expected one of {', '.join(_NAMED)}, got {name!r}")
    return _NAMED[name]


def factory(optimizer: str | Callable[..., Optimizer], groups: list[dict[str, Any]]) -> Optimizer:
    """Create an optimizer with a learning rate of 1.

    Args:
        optimizer: a name, or a function of parameter groups and ``lr``.
        groups: the parameter groups.

    Returns:
        The optimizer.

    Raises:
        TypeError: the function returns something else.
    """
    create: Callable[..., Optimizer] = named(optimizer) if isinstance(optimizer, str) else optimizer
    created = create(groups, lr=1.0)
    if not isinstance(created, Optimizer):
        raise TypeError(f"optimizer: expected a function that returns an optimizer, got {type(created).__name__}")
    return created


def has_all(optimizers: Sequence[Optimizer], lin: Linearization) -> None:
    """Check that the optimizers have all parameters that train.

    Args:
        optimizers: the optimizers.
        lin: the linearized model.

    Raises:
        ValueError: a parameter is missing.
    """
    mine = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in zip(lin.names, lin.originals, strict=True) if id(p) not in mine]
    if missing:
        raise ValueError(f"optimizer: it does not have {some(missing)}")


def made(optimizer: OptimizerLike | Sequence[Optimizer], lin: Linearization) -> list[Optimizer]:
    """Return optimizers of the parameters that train.

    Args:
        optimizer: a name, an optimizer, several, or a function of parameter groups and ``lr``.
        lin: the linearized model.

    Returns:
        The optimizers that were given, or a new one.

    Raises:
        TypeError: it is none of these, or a step needs a closure.
        ValueError: a parameter is missing.
    """
    label(optimizer)
    if isinstance(optimizer, Sequence) and not isinstance(optimizer, str):
        found = list(optimizer)
    elif isinstance(optimizer, Optimizer):
        found = [optimizer]
    else:
        found = [factory(optimizer, [{"params": list(lin.originals)}])]
    for one in found:
        check_plain_step(one)
    has_all(found, lin)
    return found


def label(optimizer: OptimizerLike | Sequence[Optimizer]) -> str:
    """Return the name of an optimizer for messages.

    Args:
        optimizer: a name, an optimizer, several, or a function that creates one.

    Returns:
        The name.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(optimizer, str):
        return named(optimizer).__name__
    if isinstance(optimizer, Optimizer):
        return type(optimizer).__name__
    if isinstance(optimizer, Sequence) and optimizer and all(isinstance(x, Optimizer) for x in optimizer):
        return " and ".join(dict.fromkeys(type(x).__name__ for x in optimizer))
    if callable(optimizer):
        return str(getattr(optimizer, "__name__", type(optimizer).__name__))
    raise TypeError(
        f"optimizer: expected a name, an optimizer, several, or a function that returns one, got {optimizer!r}"
    )
