"""Everything that the modules of a model hold: parameters, buffers, attributes, containers and generators in them.

Two snapshots serve a second forward. :class:`Belongings` says what is where, so that all of it can be put back after
a forward that assigns, appends or toggles. :class:`Earlier` holds what a forward found when it began, tensors copied, and
gives it to a second one: a counter has the value that it had then, and a running mean the numbers. Attributes of modules
are looked through, and containers, objects and tensors in these.

Contents of tensors that training owns are not copied to be put back: :mod:`fastfs.network.guard` keeps a forward from
writing to them.
"""

from __future__ import annotations

import copy
import itertools
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfs.network.guard import WriteError

__all__ = ["Belongings", "Earlier"]

_DEPTH = 4  # of containers in containers
_MOST = 1000  # entries of a container that are looked into for more containers
_COPIED = 2**26  # bytes of tensors held by attributes that are copied at a forward
_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type})
_CONTAINERS = (dict, list, set, deque)
# What torch keeps of a module, hooks say, that is not state of its forwards.
_INTERNAL = frozenset(vars(nn.Module())) - {"training", "_buffers", "_parameters"}

_ITERATORS = (itertools.count, itertools.repeat, *(type(iter(x)) for x in ([], (), range(1), "", "\u00e9")))
# Objects that other threads or processes have a part in.
_SHARED = frozenset(
    "threading queue multiprocessing concurrent logging asyncio socket ssl subprocess _thread fastfs torch.distributed "
    "torch.multiprocessing torch.utils.data".split()
)

Content = Any
Generator = torch.Generator | random.Random | Any


class _Slots:
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
    if isinstance(holder, _Slots):
        return holder.read()
    return dict(holder) if isinstance(holder, dict) else list(holder)


def _same(holder: Any, content: Content) -> bool:
    """Whether a container holds the very objects of that content, in that order."""
    if isinstance(holder, _Slots):
        holder = holder.read()
    if len(holder) != len(content):
        return False
    if isinstance(holder, dict):
        return all(map(operator.is_, holder, content)) and all(map(operator.is_, holder.values(), content.values()))
    return all(map(operator.is_, holder, content))


def _put(holder: Any, content: Content) -> None:
    """Make a container hold that content again, in its order."""
    if isinstance(holder, _Slots):
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


def _is_generator(value: Any) -> bool:
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def _generator_state(generator: Generator) -> tuple[Callable[[Any], object], Any]:
    """How to set a generator's state, and the state."""
    if isinstance(generator, torch.Generator):
        return generator.set_state, generator.get_state()
    if isinstance(generator, random.Random):
        return generator.setstate, generator.getstate()
    if hasattr(generator, "bit_generator"):
        bits = generator.bit_generator

        def put(state: Any) -> None:
            bits.state = state

        return put, bits.state
    return generator.set_state, generator.get_state()


class _Walk:
    """The containers that modules hold, those in them, and the generators; each once.

    Args:
        modules: of a model.
        without: attributes of modules that are passed over.
        others: more containers.
    """

    def __init__(
        self, modules: Iterable[nn.Module], without: frozenset[str] = frozenset(), others: Iterable[Any] = ()
    ) -> None:
        self.holders: list[Any] = []
        self.generators: list[Generator] = []
        self.streams: list[Iterator[Any]] = []  # that a forward would use up, and of which no copy can be made
        self._seen: set[int] = set()
        for module in modules:
            entries = module.__dict__
            self._seen.update(id(entries[name]) for name in without & entries.keys())
            self._look(entries, _DEPTH)
        for other in others:
            self._look(other, _DEPTH - 1)

    def _look(self, holder: Any, depth: int) -> None:
        if id(holder) in self._seen:
            return
        self._seen.add(id(holder))
        self.holders.append(holder)
        self._look_into(holder.values() if isinstance(holder, dict) else holder, len(holder), depth)

    def _look_into(self, values: Iterable[Any], count: int, depth: int) -> None:
        if not depth or (count > _MOST and depth < _DEPTH):
            return
        for value in values:
            if type(value) in _PLAIN or isinstance(value, nn.Module):
                continue
            if isinstance(value, Tensor):
                if not hasattr(type(value), "__tensor_flatten__"):  # whose attributes are what it consists of
                    self._look(value.__dict__, depth - 1)
            elif isinstance(value, _CONTAINERS):
                self._look(value, depth - 1)
            elif isinstance(value, tuple):
                self._look_into(value, len(value), depth - 1)
            else:
                self._look_at(value, depth)

    def _look_at(self, value: Any, depth: int) -> None:
        """An object of another kind."""
        if id(value) in self._seen:
            return
        if _is_generator(value):
            self._seen.add(id(value))
            self.generators.append(value)
        elif isinstance(value, Iterator):
            if not isinstance(value, _ITERATORS):
                self._seen.add(id(value))
                self.streams.append(value)
        elif depth >= _DEPTH - 1 and not _is_shared(value):  # held by a module itself, or in a container of its own
            entries = getattr(value, "__dict__", None)
            if isinstance(entries, dict):
                self._look(entries, min(depth - 1, 2))
            names = _slots(type(value))
            if names:
                self._seen.add(id(value))
                slots = _Slots(value, names)
                self.holders.append(slots)
                self._look_into(slots.read().values(), len(names), min(depth - 1, 2))


def _slots(kind: type) -> list[str]:
    found: list[str] = []
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        found += [names] if isinstance(names, str) else [name for name in names if isinstance(name, str)]
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def _is_shared(value: Any) -> bool:
    """A function, a class, a module, or what is not the model's alone."""
    if isinstance(value, (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)):
        return True
    name = type(value).__module__
    return name.partition(".")[0] in _SHARED or ".".join(name.split(".")[:2]) in _SHARED or name.startswith(
        "torch.utils.data"
    )


class Belongings:
    """What is where in the modules of a model, and what :meth:`restore` puts back: any number of times.

    Args:
        modules: of the model.
        parameters: whose gradients, flags and memory belong, too; those of the modules in any case.
        others: more containers: the groups of an optimizer and its state.
    """

    def __init__(
        self, modules: Sequence[nn.Module], parameters: Iterable[Tensor] = (), others: Iterable[Any] = ()
    ) -> None:
        walk = _Walk(modules, others=others)
        self._contents = [(holder, _content(holder)) for holder in walk.holders]
        self._generators = [_generator_state(generator) for generator in walk.generators]
        tensors = {id(p): p for p in parameters}
        for module in modules:
            for p in module._parameters.values():
                if p is not None:
                    tensors[id(p)] = p
        self._tensors = [(p, p.data, p.grad, p.requires_grad) for p in tensors.values()]

    def restore(self) -> None:
        for holder, content in self._contents:
            if not _same(holder, content):
                _put(holder, content)
        for put, state in self._generators:
            put(state)
        for p, data, gradient, flag in self._tensors:
            if p.requires_grad != flag:
                p.requires_grad_(flag)
            if not _same_memory(p, data):
                p.data = data
            if p.grad is not gradient:
                p.grad = gradient


def _same_memory(first: Tensor, second: Tensor) -> bool:
    try:
        return first.data_ptr() == second.data_ptr() and first.shape == second.shape
    except RuntimeError:  # a tensor without memory of its own
        return first.shape == second.shape


class Earlier:
    """What the modules of a model held when a forward began, for a second forward.

    Buffers are copied, and so are tensors in attributes and containers, up to 64 MiB of the latter; shared ones once.
    Tensors that share memory with a parameter are not: they are meant as they are when the second forward runs.

    Args:
        modules: of the model.
        owned: storages (``untyped_storage()._cdata``) of the parameters.
    """

    def __init__(self, modules: Sequence[nn.Module], owned: set[int]) -> None:
        walk = _Walk(modules, _INTERNAL)
        if walk.streams:
            names = ", ".join(sorted({type(stream).__name__ for stream in walk.streams}))
            raise WriteError(f"a {names} that the model holds can be run through once only", inputs=False)
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the tensor, which keeps the id taken, and its copy
        self._iterators: dict[int, tuple[Any, Any]] = {}
        left = _COPIED
        buffers = {id(module._buffers) for module in modules}
        self._contents: list[tuple[Any, Content]] = []
        replaced = {id(m._parameters) for m in modules if any(map(_stands_in, m._parameters.values()))}
        for holder in walk.holders:
            if id(holder) in replaced:  # by torch.func.functional_call, for this forward alone
                continue
            content = _content(holder)
            self._contents.append((holder, content))
            for value in content.values() if isinstance(content, dict) else content:
                if isinstance(value, _ITERATORS):
                    self._iterators[id(value)] = value, copy.copy(value)
                if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or id(value) in self._copies:
                    continue
                is_buffer = id(holder) in buffers
                if not (is_buffer or (_is_constant(value) and value.nbytes <= left)) or _storage(value) in owned:
                    continue
                left -= 0 if is_buffer else value.nbytes
                self._copies[id(value)] = value, value.detach().clone()
        self._generators = [_generator_state(generator) for generator in walk.generators]

    def cast(self, cast: Callable[[Tensor], Tensor]) -> Earlier:
        """The same with the copies cast."""
        other = object.__new__(Earlier)
        other._contents, other._generators = self._contents, self._generators
        other._iterators = self._iterators
        other._copies = {key: (value, cast(kept)) for key, (value, kept) in self._copies.items()}
        return other

    def give(self) -> list[Tensor]:
        """Put it into the modules, with new copies of the tensors, which the forward may write to.

        Returns:
            These copies.
        """
        fresh: dict[int, Any] = {key: kept.clone() for key, (_, kept) in self._copies.items()}
        copies: list[Tensor] = list(fresh.values())
        fresh |= {key: copy.copy(kept) for key, (_, kept) in self._iterators.items()}
        for holder, content in self._contents:
            if isinstance(content, dict):
                new: Content = {key: fresh.get(id(value), value) for key, value in content.items()}
            else:
                new = [fresh.get(id(value), value) for value in content]
            if not _same(holder, new):
                _put(holder, new)
        for put, state in self._generators:
            put(state)
        return copies


def _stands_in(value: Tensor | None) -> bool:
    return value is not None and not isinstance(value, nn.Parameter)


def _is_constant(value: Tensor) -> bool:
    """A plain tensor outside of any graph. Its ``grad_fn`` is not asked for: of some views that raises."""
    return type(value) is Tensor and value.layout == torch.strided and not value.is_meta and not value.requires_grad


def _storage(value: Tensor) -> int:
    try:
        return int(value.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse ones have none
        return 0
