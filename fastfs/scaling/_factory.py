"""The input of a scaling check: a function of width and depth that returns everything needed for one step."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from fastfs._network.linearization import LossFunction
from fastfs.scaling._optimizers import named

__all__ = ["Factory", "FactoryError", "Parts", "load_factory", "make"]

Factory: TypeAlias = Callable[[int, int], Any]
"""``factory(width, depth) -> (model, loss_fn, batch, optimizer)``; see :func:`fastfs.scaling.check`."""


class FactoryError(ValueError):
    """The factory cannot be found, fails, or returns something unexpected."""


class Parts(NamedTuple):
    """Model, loss function, batch and optimizer for one step."""

    model: nn.Module
    loss_fn: LossFunction
    batch: Any
    optimizer: Optimizer


def load_factory(target: str) -> Factory:
    """Import the function that ``module:attribute`` or ``path/to/file.py:attribute`` names.

    Modules are also searched for in the current folder.

    Args:
        target: the name.

    Returns:
        The function.

    Raises:
        FactoryError: there is no such file, module or attribute, importing it fails, or it is not callable.
    """
    place, colon, attribute = target.rpartition(":")
    if not (colon and place and attribute):
        raise FactoryError(f"expected module:attribute or path/to/file.py:attribute, got {target!r}")
    if place.endswith(".py"):
        module = _from_file(Path(place))
    else:
        added = str(Path.cwd())
        sys.path.insert(0, added)
        try:
            module = importlib.import_module(place)
        except (Exception, SystemExit) as error:  # a script may exit
            raise FactoryError(f"importing {place} failed: {type(error).__name__}: {error}") from error
        finally:
            sys.path.remove(added)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = ", ".join(n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n)))
            raise FactoryError(f"{place} has no attribute {attribute!r}. It has: {names or 'nothing to call'}")
        found = getattr(found, part)
    if not callable(found):
        raise FactoryError(f"{target}: expected a function of width and depth, got {type(found).__name__}")
    factory: Factory = found
    return factory


def make(factory: Factory, width: int, depth: int, seed: int, optimizer: str | None, lr: float | None) -> Parts:
    """Call the factory with torch's generator seeded, and create the optimizer if it returns none.

    Args:
        factory: the function.
        width: its first argument.
        depth: its second argument.
        seed: seed of torch's generator.
        optimizer: name of the optimizer to create; None means ``"sgd"``.
        lr: learning rate of groups that have none.

    Returns:
        Model, loss function, batch and optimizer.

    Raises:
        FactoryError: the factory fails, returns anything but model, loss function, batch and optimizer, or returns an
            optimizer or learning rates that are also given here.
    """
    where = f"factory(width={width}, depth={depth})"
    torch.manual_seed(seed)
    try:
        made = factory(width, depth)
    except (Exception, SystemExit) as error:  # a script may exit
        raise FactoryError(f"{where} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, tuple) or len(made) != 4:
        got = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise FactoryError(f"{where}: expected (model, loss_fn, batch, optimizer), got {got}")
    model, loss_fn, batch, last = made
    if not isinstance(model, nn.Module):
        raise FactoryError(f"{where}: the first item should be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss_fn):
        raise FactoryError(f"{where}: the second item should be loss_fn(model, batch), got {type(loss_fn).__name__}")
    if isinstance(last, Optimizer):
        if lr is not None:
            raise FactoryError(f"{where} returns an optimizer, which has its own learning rates: do not pass lr")
        if optimizer is not None:
            raise FactoryError(f"{where} returns an optimizer, {type(last).__name__}: do not pass {optimizer!r}")
        return Parts(model, loss_fn, batch, last)
    groups = [{"params": list(model.parameters())}] if last is None else last
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "params" in group for group in groups):
        raise FactoryError(
            f"{where}: the fourth item should be an optimizer, a list of parameter groups or None, got "
            f"{type(last).__name__}"
        )
    if lr is not None and groups and all("lr" in group for group in groups):
        raise FactoryError(f"{where} returns parameter groups with their own learning rates: do not pass lr")
    if lr is None and not all("lr" in group for group in groups):
        raise FactoryError(f"{where} returns no optimizer and no learning rate for some parameters: pass lr")
    try:
        rate: dict[str, Any] = {} if lr is None else {"lr": lr}
        made = named(optimizer or "sgd")(groups, **rate)
    except (TypeError, ValueError) as error:
        raise FactoryError(f"{where}: cannot create {optimizer or 'sgd'} with its parameter groups: {error}") from error
    return Parts(model, loss_fn, batch, made)


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FactoryError(f"{path}: no such file")
    name = f"_fastfs_factory_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FactoryError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up the module there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script may exit
        raise FactoryError(f"{path}: {type(error).__name__}: {error}") from error
    return module
