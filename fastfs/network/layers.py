"""Which modules to watch: names as the user knows them, without the prefixes that wrappers add."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

__all__ = ["AUTO", "Layer", "Selection", "clean_name", "parameter_names", "select_groups", "select_layers", "unwrapped"]

AUTO = "auto"
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_SHOWN = 60

Selection: TypeAlias = (
    str | Sequence[str] | Callable[[str, nn.Module], bool] | type[nn.Module] | tuple[type[nn.Module], ...]
)
"""What ``layers=`` takes."""


@dataclass(frozen=True)
class Layer:
    """A watched module: its position in the record, its name there, and itself."""

    index: int
    name: str
    module: nn.Module


def clean_name(name: str, wrapped: bool = False) -> str:
    """The name of a module without wrapper prefixes: ``module.blocks.0._orig_mod.attn`` -> ``blocks.0.attn``.

    Args:
        name: as in ``model.named_modules()`` or ``model.named_parameters()``.
        wrapped: the model is a data-parallel wrapper, whose only child is called ``module``: strip that as well.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if wrapped and parts and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile and data-parallel wrappers."""
    while True:
        children = [name for name, _ in model.named_children()]
        if children == ["_orig_mod"] or (children == ["module"] and not any(True for _ in model.parameters(False))):
            model = next(model.children())
        else:
            return model


def is_wrapped(model: nn.Module) -> bool:
    """Whether the model is a data-parallel wrapper (inside of torch.compile or not)."""
    while [name for name, _ in model.named_children()] == ["_orig_mod"]:
        model = next(model.children())
    return [name for name, _ in model.named_children()] == ["module"]


def parameter_names(model: nn.Module, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Names of the parameters that the optimizers update, in their order."""
    wrapped = is_wrapped(model)
    names = {id(p): clean_name(name, wrapped) for name, p in model.named_parameters()}
    return {names.get(id(p), f"(parameter {i}, not the model's)"): p for i, p in enumerate(parameters)}


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Cleaned names of all modules below the model; of a wrapper and what it wraps, the wrapper."""
    wrapped = is_wrapped(model)
    named: dict[str, nn.Module] = {}
    for raw, module in model.named_modules():
        name = clean_name(raw, wrapped)
        if name:
            named.setdefault(name, module)
    return named


def select_layers(model: nn.Module, layers: Selection) -> tuple[Layer, ...]:
    r"""The modules to watch, in the order of ``model.named_modules()``.

    Args:
        model: the network.
        layers: one of

            - ``"auto"``: the blocks of the model, which are the members of its outermost lists of alike modules
              (``blocks.0``, ``blocks.1``, ...; their outputs are the residual stream in most architectures), or where
              there are none, every module with parameters of its own;
            - a regular expression, searched for in every module's name (``r"blocks\.\d+$"``);
            - a list of exact names;
            - a module type, or a tuple of them;
            - a function of name and module that says whether to watch it.

    Raises:
        TypeError: ``layers`` is none of these.
        ValueError: no module matches, or a name is unknown; the message lists the candidates.
    """
    named = _named(model)
    chosen, problem = _choose(model, named, layers)
    if problem or not chosen:
        what = problem or f"{_shown(layers)} matches no module"
        raise ValueError(f"layers: {what} of {type(unwrapped(model)).__name__}. {_candidates(named)}")
    return tuple(Layer(index, name, named[name]) for index, name in enumerate(chosen))


def select_groups(layers: Sequence[Layer], groups: dict[str, str] | None) -> dict[str, list[int]]:
    """Groups of watched layers whose totals are recorded beside them.

    Args:
        layers: the watched layers.
        groups: name of the group -> regular expression, searched for in the names of the watched layers.

    Returns:
        name -> indices of the layers in it.

    Raises:
        TypeError: not a dictionary of strings.
        ValueError: an expression that is none, or that matches no watched layer.
    """
    if groups is None:
        return {}
    if not isinstance(groups, dict) or not all(isinstance(x, str) for item in groups.items() for x in item):
        raise TypeError(f"groups: expected a dictionary of name -> regular expression, got {groups!r}")
    found: dict[str, list[int]] = {}
    for name, expression in groups.items():
        pattern = _pattern("groups", expression)
        found[name] = [layer.index for layer in layers if pattern.search(layer.name)]
        if not found[name]:
            names = ", ".join(layer.name for layer in layers[:_SHOWN])
            raise ValueError(f"groups: {name!r} ({expression!r}) matches no watched layer. Watched: {names}")
    return found


def _choose(model: nn.Module, named: dict[str, nn.Module], layers: Any) -> tuple[list[str], str | None]:
    """The names that are selected, and what is wrong with the selection."""
    if isinstance(layers, str) and layers == AUTO:
        return _blocks(model, named) or [name for name, module in named.items() if module._parameters], None
    if isinstance(layers, str):
        pattern = _pattern("layers", layers)
        return [name for name in named if pattern.search(name)], None
    if isinstance(layers, type) and issubclass(layers, nn.Module):
        layers = (layers,)
    if isinstance(layers, tuple) and layers and all(isinstance(t, type) and issubclass(t, nn.Module) for t in layers):
        return [name for name, module in named.items() if isinstance(_inside(module), layers)], None
    if callable(layers) and not isinstance(layers, type):
        return [name for name, module in named.items() if layers(name, _inside(module))], None
    if isinstance(layers, Sequence) and all(isinstance(name, str) for name in layers):
        unknown = [name for name in layers if name not in named]
        problem = f"unknown names {unknown}" if unknown else None if layers else "an empty list"
        return [name for name in named if name in set(layers)], problem
    raise TypeError(
        'layers: expected "auto", a regular expression, a list of module names, a module type or a function of name '
        f"and module, got {layers!r}"
    )


def _blocks(model: nn.Module, named: dict[str, nn.Module]) -> list[str]:
    """Members of the outermost containers of which at least two, and half, are of one type; those with parameters."""
    names = {module: name for name, module in reversed(named.items())}
    order = list(named)
    return sorted((names[block] for block in _blocks_below(unwrapped(model)) if block in names), key=order.index)


def _blocks_below(module: nn.Module) -> list[nn.Module]:
    inside = _inside(module)
    members = [child for child in inside.children() if any(True for _ in child.parameters())]
    kinds = [type(_inside(child)) for child in members]
    usual, times = Counter(kinds).most_common(1)[0] if kinds else (nn.Module, 0)
    alike = isinstance(inside, _CONTAINERS) and times > 1 and 2 * times >= len(kinds)
    if alike and usual not in _CONTAINERS:  # a class of one's own that inherits from one is a block
        return members
    below = [block for child in members for block in _blocks_below(child)]
    # Sequences in a list are stages that hold blocks, or, where those would be single operations, the blocks.
    if alike and usual is nn.Sequential and not any(_parts(block) for block in below):
        return members
    return below


def _parts(module: nn.Module) -> list[nn.Module]:
    return list(_inside(module).children())


def _inside(module: nn.Module) -> nn.Module:
    """What a wrapper wraps."""
    while len(children := dict(module.named_children())) == 1 and next(iter(children)) in _WRAPPERS:
        module = next(iter(children.values()))
    return module


def _pattern(argument: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"{argument}: {expression!r} is not a regular expression: {error}") from None


def _shown(layers: Any) -> str:
    if isinstance(layers, tuple):
        return " or ".join(t.__name__ for t in layers)
    return getattr(layers, "__name__", None) or repr(layers)


def _candidates(named: dict[str, nn.Module]) -> str:
    names = list(named)
    if not names:
        return "It has no submodules to watch."
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return f"Candidates: {', '.join(names[:_SHOWN])}{more}"
