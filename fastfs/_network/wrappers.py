"""Known wrappers around modules, module names without their prefixes, and modules without a forward."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn

__all__ = ["clean_name", "has_forward", "inner_module", "prefixes", "unwrapped"]

_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Classes whose forward is that of their only child. Given by name, because importing their modules takes seconds: no
# instance exists before the module has been imported.
_AROUND_MODELS = (
    ("torch._dynamo.eval_frame", "OptimizedModule"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch.nn.parallel.data_parallel", "DataParallel"),
)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of torch.compile and data-parallel wrappers, which an extra forward runs.

    Wrappers are recognized by class. User-defined wrappers are kept because their forward may do more, and so is FSDP,
    whose forward gathers the parameters.
    """
    while isinstance(model, _known(_AROUND_MODELS)):
        model = next(model.children())
    return model


def prefixes(model: nn.Module) -> int:
    """Return how many leading ``module`` parts of a name stand for wrappers, for :func:`clean_name`.

    This counts known wrappers and one user-defined wrapper: a module whose only child is called ``module``.
    """
    count = 0
    own = False
    known = _known(_AROUND_MODELS)
    while True:
        children = [name for name, _ in model.named_children()]
        if children == ["module"]:
            if not isinstance(model, known):
                if own:
                    return count
                own = True
            count += 1
        elif len(children) != 1 or children[0] not in _PARTS:
            return count
        model = next(model.children())


def clean_name(name: str, wrapped: int = 0) -> str:
    """Return a module name without wrapper prefixes: ``module.blocks.0._orig_mod.attn`` -> ``blocks.0.attn``.

    Args:
        name: name as in ``model.named_modules()`` or ``model.named_parameters()``.
        wrapped: number of leading ``module`` parts to remove.

    Returns:
        The name as the user knows it.
    """
    parts = [part for part in name.split(".") if part not in _PARTS]
    while wrapped > 0 and parts and parts[0] == "module":
        parts = parts[1:]
        wrapped -= 1
    return ".".join(parts)


def inner_module(module: nn.Module) -> nn.Module:
    """Return the module inside of the wrappers around a part of a model: torch.compile, FSDP, checkpoint wrappers."""
    while len(module._modules) == 1:
        ((name, child),) = module._modules.items()
        if name not in _PARTS or child is None:
            break
        module = child
    return module


def has_forward(module: nn.Module) -> bool:
    """Whether the module has a forward, unlike ``ModuleList``, ``ModuleDict`` and the like."""
    if "forward" in vars(module):
        return True
    return inspect.getattr_static(type(module), "forward", None) is not inspect.getattr_static(nn.Module, "forward")


def _known(classes: tuple[tuple[str, str], ...]) -> tuple[type[Any], ...]:
    found = ((sys.modules.get(module), name) for module, name in classes)
    return tuple(getattr(module, name) for module, name in found if module is not None)
