"""What the modules of a model hold, found by walking once: later looks compare with what was found then.

A walk meets some twenty containers per module, nearly all of them empty or the same as at the last look. Whether that
is so is asked by identity of every key and value, of all containers, at every look: then what they hold has not to be
looked into again. A container that was found changed, or that holds what must not be kept alive, is looked into at
every look.
"""

from __future__ import annotations

import itertools
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["INTERNAL", "ITERATORS", "Content", "Held", "Inventories", "Inventory", "put", "same"]

_DEPTH = 4  # of containers in containers
_MOST = 1000  # entries of a container that are looked into for more containers
_KEPT = 2**20  # bytes of a tensor that may be kept alive between looks
_PLAIN = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size}
    | {torch.layout, torch.memory_format}
)
_CONTAINERS = (dict, list, set, deque)
INTERNAL = frozenset(vars(nn.Module())) - {"training", "_buffers", "_parameters"}
"""What torch keeps of a module, hooks say, that is not state of its forwards."""

_ITERABLES: tuple[Any, ...] = ([], (), range(1), "", "\u00e9")
ITERATORS: tuple[type[Any], ...] = (itertools.count, itertools.repeat, *map(type, map(iter, _ITERABLES)))
"""Iterators of which copies can be made."""

_CODE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
# Objects that other threads or processes have a part in.
_SHARED = frozenset(
    "threading queue multiprocessing concurrent logging asyncio socket ssl subprocess _thread fastfs torch.distributed "
    "torch.multiprocessing torch.utils.data".split()
)

Content = Any
"""A shallow copy of a container: a dictionary, or a list."""

_dictionary = operator.attrgetter("__dict__")


class Slots:
    """The attributes of an object without a dictionary, as one."""

    def __init__(self, value: Any, names: Sequence[str]) -> None:
        self.value = value
        self.names = names

    def read(self) -> dict[str, Any]:
        return {name: getattr(self.value, name) for name in self.names if hasattr(self.value, name)}

    def write(self, content: dict[str, Any]) -> None:
        for name in self.names:
            if name in content:
                object.__setattr__(self.value, name, content[name])
            elif hasattr(self.value, name):
                object.__delattr__(self.value, name)


def _content(holder: Any) -> Content:
    """A shallow copy of what a container holds."""
    if isinstance(holder, dict):
        return dict(holder)
    return holder.read() if isinstance(holder, Slots) else list(holder)


def same(holder: Any, content: Content) -> bool:
    """Whether a container holds the very objects of that content, in that order."""
    if isinstance(holder, Slots):
        holder = holder.read()
    if len(holder) != len(content):
        return False
    if isinstance(holder, dict) and not all(map(operator.is_, holder.values(), content.values())):
        return False
    return all(map(operator.is_, holder, content))


def put(holder: Any, content: Content) -> None:
    """Make a container hold that content again, in its order."""
    if isinstance(holder, Slots):
        holder.write(content)
    elif isinstance(holder, dict):
        for key in [key for key in holder if key not in content]:
            del holder[key]
        for key, value in content.items():
            if key not in holder or holder[key] is not value:
                holder[key] = value
        if list(holder) != list(content):
            holder.clear()
            holder.update(content)
    elif isinstance(holder, list):
        holder[:] = content
    else:
        holder.clear()
        (holder.update if isinstance(holder, set) else holder.extend)(content)


class _Bare:
    """An object that consists of its dictionary."""


class Held:
    """What a look has found.

    Attributes:
        empty: containers that are empty.
        contents: containers with what they hold, which nobody may change.
        with_tensors: those of them that may hold tensors besides parameters, or iterators.
        generators: of random numbers.
        streams: iterators that a forward would use up, and of which no copy can be made.
    """

    def __init__(self) -> None:
        self.empty: list[Any] = []
        self.contents: list[tuple[Any, Content]] = []
        self.with_tensors: list[tuple[Any, Content]] = []
        self.generators: list[Any] = []
        self.streams: list[Iterator[Any]] = []

    def together(self, other: Held) -> Held:
        """What either has found."""
        result = Held()
        for name in vars(result):
            setattr(result, name, [*getattr(self, name), *getattr(other, name)])
        return result

    def restore(self, without: Collection[int] = ()) -> None:
        """Make all containers hold what they held, but for those of some ids; may be called any number of times."""
        if any(self.empty):
            for holder in self.empty:
                if holder:
                    put(holder, {} if isinstance(holder, dict) else [])
        for holder, content in self.contents:
            if not same(holder, content) and id(holder) not in without:
                put(holder, content)


class _Walk:
    """The containers that modules hold, those in them, and the generators; each once.

    What is found divides into ``steady``, which may be kept for the next look, and ``fresh``.

    Args:
        without: attributes of modules that are passed over.
        restless: ids of containers that are found changed again and again.
        known: ids of containers that have been seen already.
    """

    def __init__(self, without: frozenset[str], restless: set[int], known: set[int]) -> None:
        self.steady, self.fresh = Held(), Held()
        self.owners: list[Any] = []  # objects that may be kept, whose dictionaries are among the containers
        self.roots: list[tuple[Any, int, bool]] = []  # where the next look begins: container, depth, of a module
        self._without = without
        self._restless = restless
        self._known = known
        self._seen: dict[int, bool] = {}  # by id, whether it may be kept
        self._any_tensor = False  # kept without regard to its size

    def begin(self, modules: Iterable[nn.Module], others: Iterable[Any]) -> None:
        for module in modules:
            self.owners.append(module)
            self.root(module.__dict__, _DEPTH, True)
        for other in others:
            self.root(other, _DEPTH - 1, False)

    def root(self, holder: Any, depth: int, of_module: bool) -> None:
        if of_module:
            self._seen.update((id(holder[name]), True) for name in self._without & holder.keys())
        self._any_tensor = not of_module
        before = id(holder) in self._seen or id(holder) in self._known
        if not self._look(holder, depth, of_module) and not before:
            self.roots.append((holder, depth, of_module))

    def _look(self, holder: Any, depth: int, of_module: bool = False) -> bool:
        """Look into a container once; whether it may be kept."""
        key = id(holder)
        if key in self._known:
            return True
        if key in self._seen:
            return self._seen[key]
        self._seen[key] = False  # while it is looked into, since it may hold itself
        restless = key in self._restless
        if not holder and not isinstance(holder, Slots):
            keep = True
            (self.fresh if restless else self.steady).empty.append(holder)
        else:
            content = _content(holder)
            values: Any = content.values() if isinstance(content, dict) else content
            keep = self._look_into(values, len(content), depth) and not isinstance(holder, Slots)
            held = self.steady if keep and not restless else self.fresh
            held.contents.append((holder, content))
            if not keep or any(isinstance(v, Tensor) and not isinstance(v, nn.Parameter) for v in values):
                held.with_tensors.append((holder, content))
        if keep and restless:
            self.roots.append((holder, depth, of_module))
        self._seen[key] = keep
        return keep

    def _look_into(self, values: Iterable[Any], count: int, depth: int) -> bool:
        if not depth or (count > _MOST and depth < _DEPTH):
            return False
        keep = True
        for value in values:
            kind = type(value)
            if kind in _PLAIN or isinstance(value, nn.Module):
                continue
            if isinstance(value, Tensor):
                if kind is not nn.Parameter and hasattr(kind, "__tensor_flatten__"):
                    keep = False  # its attributes are what it consists of
                elif self._look(value.__dict__, depth - 1) and (kind is nn.Parameter or self._may_keep(value)):
                    self.owners.append(value)
                else:
                    keep = False
            elif isinstance(value, _CONTAINERS):
                keep &= self._look(value, depth - 1)
            elif isinstance(value, tuple):
                keep &= self._look_into(value, len(value), depth - 1)
            else:
                keep &= self._look_at(value, depth)
        return keep

    def _may_keep(self, tensor: Tensor) -> bool:
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_meta or tensor.requires_grad:
            return False
        return self._any_tensor or tensor.nbytes <= _KEPT

    def _look_at(self, value: Any, depth: int) -> bool:
        """An object of another kind."""
        if isinstance(value, _CODE):
            return True
        key = id(value)
        if key in self._seen:
            return self._seen[key]
        keep = False
        if _is_generator(value):
            self.fresh.generators.append(value)
        elif isinstance(value, Iterator):
            if not isinstance(value, ITERATORS):
                self.fresh.streams.append(value)
        elif _is_shared(value):
            keep = type(value).__module__.partition(".")[0] == "fastfs"
        elif depth >= _DEPTH - 1:  # held by a module itself, or in a container of its own
            entries = getattr(value, "__dict__", None)
            names = _slots(type(value))
            if isinstance(entries, dict):
                keep = self._look(entries, min(depth - 1, 2)) and type(value).__basicsize__ <= _Bare.__basicsize__
            if names:
                self._look(Slots(value, names), min(depth - 1, 2))
            elif keep:
                self.owners.append(value)
            keep = keep and not names
        self._seen[key] = keep
        return keep


def _is_generator(value: Any) -> bool:
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def _slots(kind: type) -> list[str]:
    found: list[str] = []
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        found += [names] if isinstance(names, str) else [name for name in names if isinstance(name, str)]
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def _is_shared(value: Any) -> bool:
    """What is not the model's alone."""
    name = type(value).__module__
    return (
        name.partition(".")[0] in _SHARED
        or ".".join(name.split(".")[:2]) in _SHARED
        or name.startswith("torch.utils.data")
    )


class _Known:
    """The steady part of a walk, and how it is seen to be as it was."""

    def __init__(self, modules: Sequence[nn.Module], others: Sequence[Any], walk: _Walk) -> None:
        self.modules = modules
        self.others = others
        self.held = walk.steady
        self.owners = walk.owners
        self.dictionaries = list(map(_dictionary, walk.owners))
        self.roots = walk.roots
        self.ids = {id(holder) for holder in self.held.empty}
        self.ids.update(id(holder) for holder, _ in self.held.contents)

    def has_same_roots(self, modules: Sequence[nn.Module], others: Sequence[Any]) -> bool:
        return _identical(self.modules, modules) and _identical(self.others, others)

    def changed(self) -> list[int]:
        """Ids of containers that do not hold what they held."""
        found = [id(holder) for holder in self.held.empty if holder] if any(self.held.empty) else []
        return found + [id(holder) for holder, content in self.held.contents if not same(holder, content)]

    def replaced(self) -> bool:
        """Whether an object has another dictionary than it had."""
        return not all(map(operator.is_, map(_dictionary, self.owners), self.dictionaries))


class Inventory:
    """Looks at what modules hold, any number of times.

    Args:
        without: attributes of modules that are passed over.
    """

    def __init__(self, without: frozenset[str] = frozenset()) -> None:
        self.walks = 0
        self._without = without
        self._known: _Known | None = None
        self._restless: set[int] = set()

    def look(self, modules: Sequence[nn.Module], others: Iterable[Any] = ()) -> Held:
        """What is held now.

        Args:
            modules: of a model.
            others: more containers.
        """
        others, known = list(others), self._known
        if known is not None and known.has_same_roots(modules, others) and not known.replaced():
            changed = known.changed()
            if not changed:
                if not known.roots:
                    return known.held
                walk = _Walk(self._without, set(), known.ids)
                for holder, depth, of_module in known.roots:
                    walk.root(holder, depth, of_module)
                return known.held.together(walk.steady.together(walk.fresh))
            self._restless.update(changed)
        self.walks += 1
        self._known = None
        walk = _Walk(self._without, self._restless, set())
        walk.begin(modules, others)
        self._known = _Known(list(modules), others, walk)
        return walk.steady.together(walk.fresh)


class Inventories:
    """Of a model: ``state`` of what a forward may find in its modules, ``everything`` of all that is put back."""

    def __init__(self) -> None:
        self.state = Inventory(INTERNAL)
        self.everything = Inventory()


def _identical(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(map(operator.is_, first, second))
