"""Which modules to watch: names as the user knows them, without the prefixes that wrappers add."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

from torch import Tensor, nn

from fastfs._network.blocks import blocks
from fastfs._network.wrappers import clean_name, inside, prefixes, runs, unwrapped

__all__ = ["AUTO", "Layer", "Selection", "clean_name", "parameter_names", "select_groups", "select_layers", "unwrapped"]

AUTO = "auto"
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


def parameter_names(model: nn.Module, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Names of the parameters that the optimizers update, in their order; all different."""
    wrapped = prefixes(model)
    names: dict[int, str] = {}
    taken: set[str] = set()
    for raw, parameter in model.named_parameters():
        name = clean_name(raw, wrapped)
        if name in taken:  # a wrapper with a parameter of its own of the same name
            name = clean_name(raw)
        names[id(parameter)] = name
        taken.add(name)
    return {names.get(id(p), f"(parameter {i}, not the model's)"): p for i, p in enumerate(parameters)}


def select_layers(model: nn.Module, layers: Selection, trained: Collection[Tensor] | None = None) -> tuple[Layer, ...]:
    r"""The modules to watch, in the order of ``model.named_modules()``.

    The model itself can be a layer, too. It is called by the name of its class (in parentheses if a submodule is
    called so), and ``""``, as in ``named_modules()``, stands for it in a list of names. If no submodule can run it is
    the only candidate; else it is watched if it is asked for by name.

    Args:
        model: the network.
        layers: one of

            - ``"auto"``: the repeated blocks on the main path of the model (:mod:`fastfs._network.blocks`), or where
              there are none, every module with parameters of its own, or the model itself;
            - a regular expression, searched for in every module's name (``r"blocks\.\d+$"``);
            - a list of exact names;
            - a module type, or a tuple of them;
            - a function of name and module that says whether to watch it.

            Modules without a forward (``ModuleList``, ``ModuleDict``) never run, so they cannot be watched.
        trained: the parameters that the optimizers update, for ``"auto"``, which leaves out what is not trained; those
            that require a gradient if None.

    Raises:
        TypeError: ``layers`` is none of these.
        ValueError: no module matches, or a name is unknown or that of a module that never runs; the message lists the
            candidates.
    """
    modules = _Modules(model)
    chosen = _choose(modules, layers, trained)
    can_run = [name for name in chosen if runs(inside(chosen[name]))]
    if not can_run and chosen:
        raise ValueError(
            f"layers: {_shown(layers)} matches only what has no forward and never runs itself ({_some(chosen)}) of "
            f"{modules.kind}. {modules.candidates(tuple(chosen))}"
        )
    if not can_run:
        raise ValueError(f"layers: {_shown(layers)} matches no module of {modules.kind}. {modules.candidates()}")
    return tuple(Layer(index, name, chosen[name]) for index, name in enumerate(can_run))


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


class _Modules:
    """The modules of a model by their names; of a wrapper around a part of it and what it wraps, the wrapper.

    Attributes:
        model: without the wrappers around it that torch.compile and data parallelism put there.
        below: its submodules.
        own_name: the name of the model itself.
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
            if not name and id(module) not in around:  # what a wrapper of the user's own wraps
                name = clean_name(raw, wrapped - 1)
            if name:
                self.below.setdefault(name, module)
        self.own_name = self.kind
        while self.own_name in self.below:
            self.own_name = f"({self.own_name})"

    @property
    def kind(self) -> str:
        return type(inside(self.model)).__name__

    @property
    def searched(self) -> dict[str, nn.Module]:
        """What selections other than by name look through: the model itself only if nothing below it can run."""
        return self.below if any(runs(inside(m)) for m in self.below.values()) else {self.own_name: self.model}

    def candidates(self, inside_of: tuple[str, ...] = ()) -> str:
        """A sentence for an error; of modules below certain ones, if there are any."""
        names = [name for name, module in self.searched.items() if runs(inside(module))]
        held = [name for name in names if name.startswith(tuple(f"{outer}." for outer in inside_of))]
        return f"Candidates: {_some(held or names)}" if names else "Nothing in it has a forward."


def _choose(modules: _Modules, layers: Any, trained: Collection[Tensor] | None) -> dict[str, nn.Module]:
    """What is selected, in the order of the model; also modules that never run."""
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
        return {name: m for name, m in searched.items() if isinstance(inside(m), layers)}
    if callable(layers) and not isinstance(layers, type):
        return {name: m for name, m in searched.items() if layers(name, inside(m))}
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
    never = [name for name in known if name in wanted and not runs(inside(known[name]))]
    if never:
        raise ValueError(
            f"layers: {never[0]!r} is a {type(inside(known[never[0]])).__name__}, which never runs itself: it has no "
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
