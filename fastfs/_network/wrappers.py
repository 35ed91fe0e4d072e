"""What is put around a module: known wrappers that run it, names without their prefixes, and modules that never run."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn

__all__ = ["clean_name", "inside", "prefixes", "runs", "unwrapped"]

_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Classes whose forward is that of their only child. By name, since importing the module of each takes seconds: as long
# as it has not been imported there is no instance.
_AROUND_MODELS = (
    ("torch._dynamo.eval_frame", "OptimizedModule"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch.nn.parallel.data_parallel", "DataParallel"),
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile and of data-parallel wrappers: what a forward of our own runs.

    Goes by class. A wrapper of the user's own is not looked through, since its forward may do something of its own,
    nor is FSDP, whose forward gathers the parameters.
    """
    while isinstance(model, _known(_AROUND_MODELS)):
        model = next(model.children())
    return model


def prefixes(model: nn.Module) -> int:
    """How many leading parts ``module`` of a name stand for wrappers, for :func:`clean_name`.

    Known wrappers, and one of the user's own: a module whose only child is called ``module``.
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
    """The name of a module without wrapper prefixes: ``module.blocks.0._orig_mod.attn`` -> ``blocks.0.attn``.

    Args:
        name: as in ``model.named_modules()`` or ``model.named_parameters()``.
        wrapped: how many wrappers call what they wrap ``module``: strip that as often.
    """
    parts = [part for part in name.split(".") if part not in _PARTS]
    while wrapped > 0 and parts and parts[0] == "module":
        parts = parts[1:]
        wrapped -= 1
    return ".".join(parts)


def inside(module: nn.Module) -> nn.Module:
    """What the wrappers around a part of a model wrap: torch.compile, FSDP, activation checkpoints."""
    while len(module._modules) == 1:
        ((name, child),) = module._modules.items()
        if name not in _PARTS or child is None:
            break
        module = child
    return module


def runs(module: nn.Module) -> bool:
    """Whether the module has a forward: ``ModuleList``, ``ModuleDict`` and the like have none and never run."""
    if "forward" in vars(module):
        return True
    return inspect.getattr_static(type(module), "forward", None) is not inspect.getattr_static(nn.Module, "forward")


def _known(classes: tuple[tuple[str, str], ...]) -> tuple[type[Any], ...]:
    found = ((sys.modules.get(module), name) for module, name in classes)
    return tuple(getattr(module, name) for module, name in found if module is not None)
