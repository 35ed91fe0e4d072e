"""Everything that the modules of a model hold: parameters, buffers, attributes, containers and generators in them.

Two snapshots serve a second forward. :class:`Belongings` says what is where, so that all of it can be put back after
a forward that assigns, appends or toggles. :class:`Earlier` holds what a forward found when it began, tensors copied, and
gives it to a second one: a counter has the value that it had then, and a running mean the numbers.

Contents of tensors that training owns are not copied to be put back: :mod:`fastfs.network.guard` keeps a forward from
writing to them.
"""

from __future__ import annotations

import dataclasses
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Belongings", "Earlier"]

_DEPTH = 4  # of containers in containers
_MOST = 1000  # entries of a container that are looked into for more containers
_COPIED = 2**26  # bytes of tensors held by attributes that are copied at a forward
_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type})
_CONTAINERS = (dict, list, set, deque)
# What torch keeps of a module, hooks say, that is not state of its forwards.
_INTERNAL = frozenset(vars(nn.Module())) - {"training", "_buffers", "_parameters"}

Content = Any
Generator = torch.Generator | random.Random | Any


def _content(holder: Any) -> Content:
    """A shallow copy of what a container holds."""
    return dict(holder) if isinstance(holder, dict) else list(holder)


def _same(holder: Any, content: Content) -> bool:
    """Whether a container holds the very objects of that content, in that order."""
    if len(holder) != len(content):
        return False
    if isinstance(holder, dict):
        return all(map(operator.is_, holder, content)) and all(map(operator.is_, holder.values(), content.values()))
    return all(map(operator.is_, holder, content))


def _put(holder: Any, content: Content) -> None:
    """Make a container hold that content again, in its order."""
    if isinstance(holder, dict):
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
    """The containers that modules hold, those in them, and the generators; each once."""

    def __init__(self, modules: Iterable[nn.Module], without: frozenset[str] = frozenset()) -> None:
        self.holders: list[Any] = []
        self.generators: list[Generator] = []
        self._seen: set[int] = set()
        for module in modules:
            entries = module.__dict__
            self._seen.update(id(entries[name]) for name in without & entries.keys())
            self._look(entries, _DEPTH)

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
            kind = type(value)
            if kind in _PLAIN or isinstance(value, (Tensor, nn.Module)):
                continue
            if isinstance(value, _CONTAINERS):
                self._look(value, depth - 1)
            elif isinstance(value, tuple):
                self._look_into(value, len(value), depth - 1)
            elif _is_generator(value):
                if id(value) not in self._seen:
                    self._seen.add(id(value))
                    self.generators.append(value)
            elif _holds_state(value):
                self._look(value.__dict__, depth - 1)


def _holds_state(value: Any) -> bool:
    """An object that holds tensors or generators itself, or is plain data: not a trainer, a logger or a function."""
    entries = getattr(value, "__dict__", None)
    if not isinstance(entries, dict) or isinstance(value, (type, types.ModuleType, types.FunctionType)):
        return False
    if type(value).__module__.partition(".")[0] == "fastfs":  # hooks of a monitor
        return False
    if isinstance(value, types.SimpleNamespace) or dataclasses.is_dataclass(value):
        return True
    return any(isinstance(entry, (Tensor, torch.Generator)) for entry in entries.values())


class Belongings:
    """What is where in the modules of a model, and what :meth:`restore` puts back: any number of times.

    Args:
        modules: of the model.
        parameters: whose gradients, flags and memory belong, too; those of the modules in any case.
    """

    def __init__(self, modules: Sequence[nn.Module], parameters: Iterable[Tensor] = ()) -> None:
        walk = _Walk(modules)
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
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the tensor, which keeps the id taken, and its copy
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
        other._copies = {key: (value, cast(copy)) for key, (value, copy) in self._copies.items()}
        return other

    def give(self) -> list[Tensor]:
        """Put it into the modules, with new copies of the tensors, which the forward may write to.

        Returns:
            These copies.
        """
        fresh = {key: copy.clone() for key, (_, copy) in self._copies.items()}
        for holder, content in self._contents:
            if isinstance(content, dict):
                new: Content = {key: fresh.get(id(value), value) for key, value in content.items()}
            else:
                new = [fresh.get(id(value), value) for value in content]
            if not _same(holder, new):
                _put(holder, new)
        for put, state in self._generators:
            put(state)
        return list(fresh.values())


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
