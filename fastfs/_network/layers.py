"""Selection of the modules to watch, and their names without the prefixes that wrappers add."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

from torch import Tensor, nn

from fastfs._network.blocks import blocks
from fastfs._network.fully_sharded import optimized_parameters
from fastfs._network.wrappers import clean_name, has_forward, inner_module, prefixes, unwrapped

__all__ = ["AUTO", "Layer", "Selection", "clean_name", "parameter_names", "select_groups", "select_layers", "unwrapped"]

AUTO = "auto"
_SHOWN = 60

Selection: TypeAlias = (
    str | Sequence[str] | Callable[[str, nn.Module], bool] | type[nn.Module] | tuple[type[nn.Module], ...]
)
"""The types that ``layers=`` accepts."""


@dataclass(frozen=True)
class Layer:
    """A watched module with its position and name in the record."""

    index: int
    name: str
    module: nn.Module


def parameter_names(model: nn.Module, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the parameters that the optimizers update, in their order, by unique names."""
    wrapped = prefixes(model)
    names: dict[int, str] = {}
    taken: set[str] = set()
    for raw, parameter in optimized_parameters(model):
        name = clean_name(raw, wrapped)
        if name in taken:  # a wrapper has a parameter of the same name
            name = clean_name(raw)
        names[id(parameter)] = name
        taken.add(name)
    return {names.get(id(p), f"(parameter {i}, not the model's)"): p for i, p in enumerate(parameters)}


def select_layers(model: nn.Module, layers: Selection, trained: Collection[Tensor] | None = None) -> tuple[Layer, ...]:
    r"""Return the modules to watch, in the order of ``model.named_modules()``.

    The model itself can be a layer too. Its name is that of its class (in parentheses if a submodule has this name),
    and ``""``, as in ``named_modules()``, denotes it in a list of names. It is the only candidate if no submodule has a
    forward; otherwise it is selected only by name.

    Args:
        model: the network.
        layers: one of

            - ``"auto"``: the repeated blocks on the main path of the model (:mod:`fastfs._network.blocks`). If there
              are none, every module with parameters of its own, or else the model itself;
            - a regular expression, searched for in the name of every module (``r"blocks\.\d+$"``);
            - a list of exact names;
            - a module type, or a tuple of module types;
            - a function of name and module that returns whether to watch the module.

            Modules without a forward (``ModuleList``, ``ModuleDict``) cannot be watched.
        trained: parameters that the optimizers update, for ``"auto"``, which omits modules that are not trained; None
            means the parameters that require a gradient.

    Returns:
        The selected layers, numbered from 0.

    Raises:
        TypeError: ``layers`` is none of these.
        ValueError: no module matches, a name is unknown, or a named module has no forward. The message lists the
            candidates.
    """
    modules = _Modules(model)
    chosen = _choose(modules, layers, trained)
    can_run = [name for name in chosen if has_forward(inner_module(chosen[name]))]
    if not can_run and chosen:
        raise ValueError(
            f"layers: {_shown(layers)} matches only modules without a forward ({_some(chosen)}) of "
            f"{modules.kind}. {modules.candidates(tuple(chosen))}"
        )
    if not can_run:
        raise ValueError(f"layers: {_shown(layers)} matches no module of {modules.kind}. {modules.candidates()}")
    return tuple(Layer(index, name, chosen[name]) for index, name in enumerate(can_run))


def select_groups(layers: Sequence[Layer], groups: dict[str, str] | None) -> dict[str, list[int]]:
    """Return the groups of watched layers whose totals are recorded in addition.

    Args:
        layers: the watched layers.
        groups: group name -> regular expression, searched for in the names of the watched layers.

    Returns:
        Group name -> indices of its layers.

    Raises:
        TypeError: ``groups`` is not a dictionary of strings.
        ValueError: an expression is invalid or matches no watched layer.
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


class _Modules:
    """The modules of a model by name. Of a wrapper around a part of the model, the wrapper stands for its content.

    Attributes:
        model: the model without the wrappers that torch.compile and data parallelism add around it.
        below: its submodules.
        own_name: name of the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrapped(model)
        self.below: dict[str, nn.Module] = {}
        wrapped = prefixes(model)
        around = {id(self.model)}
        wrapper = model
        while wrapper is not self.model:
            around.add(id(wrapper))
            wrapper = next(wrapper.children())
        for raw, module in model.named_modules():
            name = clean_name(raw, wrapped)
            if not name and id(module) not in around:  # the content of a user-defined wrapper
                name = clean_name(raw, wrapped - 1)
            if name:
                self.below.setdefault(name, module)
        self.own_name = self.kind
        while self.own_name in self.below:
            self.own_name = f"({self.own_name})"

    @property
    def kind(self) -> str:
        return type(inner_module(self.model)).__name__

    @property
    def searched(self) -> dict[str, nn.Module]:
        """The modules that selections other than by name consider: the model itself only if no submodule can run."""
        return (
            self.below
            if any(has_forward(inner_module(m)) for m in self.below.values())
            else {self.own_name: self.model}
        )

    def candidates(self, inside_of: tuple[str, ...] = ()) -> str:
        """Return a sentence for an error message that lists the candidates, below the given modules if possible."""
        names = [name for name, module in self.searched.items() if has_forward(inner_module(module))]
        held = [name for name in names if name.startswith(tuple(f"{outer}." for outer in inside_of))]
        return f"Candidates: {_some(held or names)}" if names else "Nothing in it has a forward."


def _choose(modules: _Modules, layers: Any, trained: Collection[Tensor] | None) -> dict[str, nn.Module]:
    """Return the selected modules in the order of the model, including modules without a forward."""
    searched = modules.searched
    if isinstance(layers, str) and layers == AUTO:
        chosen = {id(m) for m in blocks(modules.model, modules.below.values(), trained)}
        own = {modules.own_name: modules.model}
        return {name: m for name, m in {**own, **modules.below}.items() if id(m) in chosen}
    if isinstance(layers, str):
        pattern = _pattern("layers", layers)
        return {name: m for name, m in searched.items() if pattern.search(name)}
    if isinstance(layers, type) and issubclass(layers, nn.Module):
        layers = (layers,)
    if isinstance(layers, tuple) and layers and all(isinstance(t, type) and issubclass(t, nn.Module) for t in layers):
        return {name: m for name, m in searched.items() if isinstance(inner_module(m), layers)}
    if callable(layers) and not isinstance(layers, type):
        return {name: m for name, m in searched.items() if layers(name, inner_module(m))}
    if isinstance(layers, Sequence) and all(isinstance(name, str) for name in layers):
        return _by_name(modules, layers)
    raise TypeError(
        'layers: expected "auto", a regular expression, a list of module names, a module type or a function of name '
        f"and module, got {layers!r}"
    )


def _by_name(modules: _Modules, names: Sequence[str]) -> dict[str, nn.Module]:
    wanted = {name or modules.own_name for name in names}
    known = {modules.own_name: modules.model, **modules.below}
    unknown = [name for name in names if name and name not in known]
    if unknown or not names:
        problem = f"unknown names {unknown}" if unknown else "an empty list"
        raise ValueError(f"layers: {problem} of {modules.kind}. {modules.candidates()}")
    never = [name for name in known if name in wanted and not has_forward(inner_module(known[name]))]
    if never:
        raise ValueError(
            f"layers: {never[0]!r} is a {type(inner_module(known[never[0]])).__name__}, which has no forward and so no "
            f"features. {modules.candidates((never[0],))}"
        )
    return {name: module for name, module in known.items() if name in wanted}


def _pattern(argument: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"{argument}: {expression!r} is not a regular expression: {error}") from None


def _shown(layers: Any) -> str:
    if isinstance(layers, tuple):
        return " or ".join(t.__name__ for t in layers)
    return getattr(layers, "__name__", None) or repr(layers)


def _some(names: Collection[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(islice(names, _SHOWN)) + more
