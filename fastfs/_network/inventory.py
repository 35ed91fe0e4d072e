"""Inventory of what the modules of a model hold: walked once, then compared with the result of that walk.

A walk meets about twenty containers per module, nearly all of them empty or unchanged since the last scan. Every scan
therefore compares all containers by the identity of every key and value, and inspects the contents of unchanged
containers no further. Containers that were found changed, or that hold objects which must not be kept alive, are
inspected in every scan.
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

__all__ = ["INTERNAL", "ITERATORS", "Content", "Inventories", "Inventory", "ScanResult", "put", "same"]

_DEPTH = 4  # levels of nested containers
_MOST = 1000  # largest number of entries of a container that are searched for further containers
_KEPT = 2**20  # bytes of the largest tensor that may be kept alive between scans
_PLAIN = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size}
    | {torch.layout, torch.memory_format}
)
_CONTAINERS = (dict, list, set, deque)
INTERNAL = frozenset(vars(nn.Module())) - {"training", "_buffers", "_parameters"}
"""Attributes that torch keeps per module, such as hooks, and that are not state of its forwards."""

_ITERABLES: tuple[Any, ...] = ([], (), range(1), "", "\u00e9")
ITERATORS: tuple[type[Any], ...] = (itertools.count, itertools.repeat, *map(type, map(iter, _ITERABLES)))
"""Iterators that can be copied."""

_CODE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
# Modules of objects that other threads or processes may share.
_SHARED = frozenset(
    "threading queue multiprocessing concurrent logging asyncio socket ssl subprocess _thread fastfs torch.distributed "
    "torch.multiprocessing torch.utils.data".split()
)

Content = Any
"""A shallow copy of a container: a dictionary, or a list."""

_dictionary = operator.attrgetter("__dict__")


class Slots:
    """The attributes of an object without a ``__dict__``, presented as one container."""

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
    """Return a shallow copy of what a container holds."""
    if isinstance(holder, dict):
        return dict(holder)
    return holder.read() if isinstance(holder, Slots) else list(holder)


def same(holder: Any, content: Content) -> bool:
    """Whether a container holds the same objects as the content, in the same order."""
    if isinstance(holder, Slots):
        holder = holder.read()
    if len(holder) != len(content):
        return False
    if isinstance(holder, dict) and not all(map(operator.is_, holder.values(), content.values())):
        return False
    return all(map(operator.is_, holder, content))


def put(holder: Any, content: Content) -> None:
    """Make a container hold the content again, in its order."""
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
    """An object whose state is its ``__dict__`` alone."""


class ScanResult:
    """The result of a scan.

    Attributes:
        empty: containers that are empty.
        contents: containers and their contents, which must not be modified.
        with_tensors: those entries of ``contents`` that may hold iterators, or tensors besides parameters.
        generators: random number generators.
        streams: iterators that a forward would consume and that cannot be copied.
    """

    def __init__(self) -> None:
        self.empty: list[Any] = []
        self.contents: list[tuple[Any, Content]] = []
        self.with_tensors: list[tuple[Any, Content]] = []
        self.generators: list[Any] = []
        self.streams: list[Iterator[Any]] = []

    def merged(self, other: ScanResult) -> ScanResult:
        """Return the concatenation of both results."""
        result = ScanResult()
        for name in vars(result):
            setattr(result, name, [*getattr(self, name), *getattr(other, name)])
        return result

    def restore(self, without: Collection[int] = ()) -> None:
        """Restore the contents of all containers except those with the given ids; may be called repeatedly."""
        if any(self.empty):
            for holder in self.empty:
                if holder:
                    put(holder, {} if isinstance(holder, dict) else [])
        for holder, content in self.contents:
            if not same(holder, content) and id(holder) not in without:
                put(holder, content)


class _Walk:
    """A walk over the containers that modules hold, containers nested in them, and generators, without duplicates.

    Results are divided into ``steady``, which may be kept for the next scan, and ``fresh``.

    Args:
        without: attributes of modules that are skipped.
        volatile: ids of containers that change repeatedly.
        known: ids of containers that have been visited already.
    """

    def __init__(self, without: frozenset[str], volatile: set[int], known: set[int]) -> None:
        self.steady, self.fresh = ScanResult(), ScanResult()
        self.owners: list[Any] = []  # objects that may be kept and whose dictionaries are among the containers
        self.roots: list[tuple[Any, int, bool]] = []  # starts of the next scan: container, depth, whether of a module
        self._without = without
        self._volatile = volatile
        self._known = known
        self._seen: dict[int, bool] = {}  # id -> whether it may be kept
        self._any_tensor = False  # whether tensors of any size may be kept

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
        if not self._inspect(holder, depth, of_module) and not before:
            self.roots.append((holder, depth, of_module))

    def _inspect(self, holder: Any, depth: int, of_module: bool = False) -> bool:
        """Inspect a container once and return whether it may be kept."""
        key = id(holder)
        if key in self._known:
            return True
        if key in self._seen:
            return self._seen[key]
        self._seen[key] = False  # until the inspection ends, because the container may hold itself
        volatile = key in self._volatile
        if not holder and not isinstance(holder, Slots):
            keep = True
            (self.fresh if volatile else self.steady).empty.append(holder)
        else:
            content = _content(holder)
            values: Any = content.values() if isinstance(content, dict) else content
            keep = self._inspect_values(values, len(content), depth) and not isinstance(holder, Slots)
            held = self.steady if keep and not volatile else self.fresh
            held.contents.append((holder, content))
            if not keep or any(isinstance(v, Tensor) and not isinstance(v, nn.Parameter) for v in values):
                held.with_tensors.append((holder, content))
        if keep and volatile:
            self.roots.append((holder, depth, of_module))
        self._seen[key] = keep
        return keep

    def _inspect_values(self, values: Iterable[Any], count: int, depth: int) -> bool:
        if not depth or (count > _MOST and depth < _DEPTH):
            return False
        keep = True
        for value in values:
            kind = type(value)
            if kind in _PLAIN or isinstance(value, nn.Module):
                continue
            if isinstance(value, Tensor):
                if kind is not nn.Parameter and hasattr(kind, "__tensor_flatten__"):
                    keep = False  # the subclass stores its data in attributes
                elif self._inspect(value.__dict__, depth - 1) and (kind is nn.Parameter or self._may_keep(value)):
                    self.owners.append(value)
                else:
                    keep = False
            elif isinstance(value, _CONTAINERS):
                keep &= self._inspect(value, depth - 1)
            elif isinstance(value, tuple):
                keep &= self._inspect_values(value, len(value), depth - 1)
            else:
                keep &= self._inspect_object(value, depth)
        return keep

    def _may_keep(self, tensor: Tensor) -> bool:
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_meta or tensor.requires_grad:
            return False
        return self._any_tensor or tensor.nbytes <= _KEPT

    def _inspect_object(self, value: Any, depth: int) -> bool:
        """Inspect an object that is neither a tensor nor a container."""
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
        elif depth >= _DEPTH - 1:  # held by a module itself or directly in one of its containers
            entries = getattr(value, "__dict__", None)
            names = _slots(type(value))
            if isinstance(entries, dict):
                keep = self._inspect(entries, min(depth - 1, 2)) and type(value).__basicsize__ <= _Bare.__basicsize__
            if names:
                self._inspect(Slots(value, names), min(depth - 1, 2))
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
    """Whether the object may be shared with other threads, processes or models."""
    name = type(value).__module__
    return (
        name.partition(".")[0] in _SHARED
        or ".".join(name.split(".")[:2]) in _SHARED
        or name.startswith("torch.utils.data")
    )


class _Baseline:
    """The steady part of a walk, and how changes to it are detected."""

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
        """Return the ids of containers whose contents have changed."""
        found = [id(holder) for holder in self.held.empty if holder] if any(self.held.empty) else []
        return found + [id(holder) for holder, content in self.held.contents if not same(holder, content)]

    def replaced(self) -> bool:
        """Whether the ``__dict__`` of an object was replaced."""
        return not all(map(operator.is_, map(_dictionary, self.owners), self.dictionaries))


class Inventory:
    """Scans what modules hold, any number of times.

    Args:
        without: attributes of modules that are skipped.
    """

    def __init__(self, without: frozenset[str] = frozenset()) -> None:
        self.walks = 0
        self._without = without
        self._known: _Baseline | None = None
        self._volatile: set[int] = set()

    def scan(self, modules: Sequence[nn.Module], others: Iterable[Any] = ()) -> ScanResult:
        """Return the current contents.

        Args:
            modules: modules of the model.
            others: additional containers.

        Returns:
            The contents of all containers, and generators and iterators.
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
                return known.held.merged(walk.steady.merged(walk.fresh))
            self._volatile.update(changed)
        self.walks += 1
        self._known = None
        walk = _Walk(self._without, self._volatile, set())
        walk.begin(modules, others)
        self._known = _Baseline(list(modules), others, walk)
        return walk.steady.merged(walk.fresh)


class Inventories:
    """The inventories of a model: ``state`` covers what its forward may read, ``everything`` all that is restored."""

    def __init__(self) -> None:
        self.state = Inventory(INTERNAL)
        self.everything = Inventory()


def _identical(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(map(operator.is_, first, second))
