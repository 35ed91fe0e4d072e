"""Which modules to watch: names as the user knows them, without the prefixes that wrappers add."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

__all__ = ["Layer", "clean_name", "select_layers"]

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_SHOWN = 60


@dataclass(frozen=True)
class Layer:
    """A watched module: its position in the record, its name there, and itself."""

    index: int
    name: str
    module: nn.Module


def clean_name(name: str, wrapped: bool = False) -> str:
    """The name of a module without wrapper prefixes: ``module.blocks.0._orig_mod.attn`` -> ``blocks.0.attn``.

    Args:
        name: as in ``model.named_modules()``.
        wrapped: the model is a data-parallel wrapper, whose only child is called ``module``: strip that as well.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if wrapped and parts and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Cleaned names of all modules below the model; of a wrapper and what it wraps, the wrapper."""
    inner = model
    while [name for name, _ in inner.named_children()] == ["_orig_mod"]:
        inner = next(inner.children())
    wrapped = [name for name, _ in inner.named_children()] == ["module"]
    named: dict[str, nn.Module] = {}
    for raw, module in model.named_modules():
        name = clean_name(raw, wrapped)
        if name:
            named.setdefault(name, module)
    return named


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _check_not_compiled(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Hooks inside a compiled module are not called; those on the ``torch.compile(module)`` object itself are."""
    hidden: set[nn.Module] = set()
    for module in model.modules():
        if _is_compiled(module):
            hidden.update(child for child in module.modules() if child is not module)
            if getattr(module, "_compiled_call_impl", None) is not None:
                hidden.add(module)
    for layer in layers:
        if layer.module in hidden:
            raise ValueError(
                f"layer {layer.name!r} is inside a part of the model that torch.compile has compiled, where this "
                "monitor's hooks are not called. Compile the watched blocks one by one instead (before attaching: "
                "model.blocks[i] = torch.compile(model.blocks[i])), or attach to the model without torch.compile"
            )


def select_layers(model: nn.Module, layers: str | Sequence[str]) -> tuple[Layer, ...]:
    r"""The modules to watch, in the order of ``model.named_modules()``.

    Args:
        model: the network.
        layers: a regular expression, searched for in every module's name (``r"blocks\.\d+$"``), or exact names.

    Raises:
        TypeError: ``layers`` is neither.
        ValueError: no module matches, or a name is unknown (the message lists the candidates); or a matching module
            is inside a compiled one, where hooks do not run.
    """
    named = _named(model)
    if isinstance(layers, str):
        try:
            pattern = re.compile(layers)
        except re.error as error:
            raise ValueError(f"layers: {layers!r} is not a regular expression: {error}") from None
        chosen = [name for name in named if pattern.search(name)]
        if not chosen:
            raise ValueError(f"layers: {layers!r} matches no module of {type(model).__name__}. {_candidates(named)}")
    elif isinstance(layers, Sequence) and all(isinstance(name, str) for name in layers):
        unknown = [name for name in layers if name not in named]
        if unknown or not layers:
            problem = f"unknown names {unknown}" if unknown else "an empty list"
            raise ValueError(f"layers: {problem} for {type(model).__name__}. {_candidates(named)}")
        chosen = [name for name in named if name in set(layers)]
    else:
        raise TypeError(f"layers: expected a regular expression or a list of module names, got {layers!r}")
    found = tuple(Layer(index, name, named[name]) for index, name in enumerate(chosen))
    _check_not_compiled(model, found)
    return found


def _candidates(named: dict[str, nn.Module]) -> str:
    names = list(named)
    if not names:
        return "It has no submodules to watch."
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return f"Candidates: {', '.join(names[:_SHOWN])}{more}"
