"""Snapshots of what the modules of a model hold: parameters, buffers, attributes, nested containers and generators.

Two kinds of snapshots serve a second forward. :class:`ModuleContents` holds references, so that everything can be
restored after a forward that assigns, appends or toggles. :class:`ContentsCopy` holds what a forward found when it
began, with copies of tensors, and loads it for a second forward: counters and running means have their values of that
time. Both include the attributes of modules, and containers, objects and tensors nested in them.

The values of tensors that belong to training are not copied: :mod:`fastfs._network.guard` keeps a forward from writing
to them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._network.guard import WriteError
from fastfs._network.inventory import ITERATORS, Content, Inventories, put, same
from fastfs._network.placements import local

__all__ = ["ContentsCopy", "ModuleContents"]

_COPIED = 2**26  # bytes of tensors in attributes that are copied per forward

Generator = torch.Generator | random.Random | Any


def _generator_state(generator: Generator) -> tuple[Callable[[Any], object], Any]:
    """Return the function that sets a generator's state, and the state."""
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


class ModuleContents:
    """References to what the modules of a model hold; :meth:`restore` may be called any number of times.

    Args:
        modules: modules of the model.
        parameters: further tensors whose gradients, flags and memory are included; those of the modules always are.
        others: additional containers, such as the groups and the state of an optimizer.
        inventories: inventories of the model from earlier snapshots.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        parameters: Iterable[Tensor] = (),
        others: Iterable[Any] = (),
        inventories: Inventories | None = None,
    ) -> None:
        self._held = (inventories or Inventories()).everything.scan(modules, others)
        self._generators = [_generator_state(generator) for generator in self._held.generators]
        tensors = {id(p): p for p in parameters}
        for module in modules:
            for p in module._parameters.values():
                if p is not None:
                    tensors[id(p)] = p
        self._tensors = [(p, p.data, _memory(p), p.grad, p.requires_grad) for p in tensors.values()]

    def restore(self) -> None:
        self._held.restore()
        for set_state, state in self._generators:
            set_state(state)
        for p, data, memory, gradient, flag in self._tensors:
            if p.requires_grad != flag:
                p.requires_grad_(flag)
            if _memory(p) != memory:
                p.data = data
            if p.grad is not gradient:
                p.grad = gradient


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Return the address and layout of a tensor."""
    try:
        own = local(tensor)
        return own.data_ptr(), own.shape, own.stride()
    except RuntimeError:  # a tensor without memory of its own
        return (tensor.shape,)


class ContentsCopy:
    """Copies of what the modules of a model held when a forward began, for a second forward.

    Buffers are copied, and so are tensors in attributes and containers, up to 64 MiB of the latter, without duplicates.
    Tensors that share memory with a parameter are not copied: the second forward uses their current values.

    Args:
        modules: modules of the model.
        owned: returns the storages (``untyped_storage()._cdata``) of the parameters.
        inventories: inventories of the model from earlier snapshots.

    Raises:
        WriteError: the model holds an iterator that cannot be copied.
    """

    def __init__(
        self, modules: Sequence[nn.Module], owned: Callable[[], set[int]], inventories: Inventories | None = None
    ) -> None:
        held = (inventories or Inventories()).state.scan(modules)
        if held.streams:
            names = ", ".join(sorted({type(stream).__name__ for stream in held.streams}))
            raise WriteError(f"a {names} that the model holds can be consumed only once", inputs=False)
        self._held = held
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # id -> tensor, kept so that the id stays unique, and copy
        self._iterators: dict[int, tuple[Any, Any]] = {}
        self._replaced: set[int] = set()  # dictionaries that torch.func.functional_call fills for this forward alone
        if held.with_tensors:
            self._copy(modules, owned())
        self._generators = [_generator_state(generator) for generator in held.generators]

    def _copy(self, modules: Sequence[nn.Module], owned: set[int]) -> None:
        left = _COPIED
        buffers = {id(module._buffers) for module in modules}
        self._replaced = {id(m._parameters) for m in modules if any(map(_stands_in, m._parameters.values()))}
        for holder, content in self._held.with_tensors:
            if id(holder) in self._replaced:
                continue
            for value in content.values() if isinstance(content, dict) else content:
                if isinstance(value, ITERATORS):
                    self._iterators[id(value)] = value, copy.copy(value)
                if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or id(value) in self._copies:
                    continue
                is_buffer = id(holder) in buffers
                if not (is_buffer or (_is_constant(value) and value.nbytes <= left)) or _storage(value) in owned:
                    continue
                left -= 0 if is_buffer else value.nbytes
                self._copies[id(value)] = value, value.detach().clone()

    def cast(self, cast: Callable[[Tensor], Tensor]) -> ContentsCopy:
        """Return a snapshot with the copies cast."""
        other = object.__new__(ContentsCopy)
        other._held, other._generators = self._held, self._generators
        other._iterators, other._replaced = self._iterators, self._replaced
        other._copies = {key: (value, cast(kept)) for key, (value, kept) in self._copies.items()}
        return other

    def load(self) -> list[Tensor]:
        """Load the snapshot into the modules, with new copies of the tensors, which the forward may write to.

        Returns:
            The new copies.
        """
        fresh: dict[int, Any] = {key: kept.clone() for key, (_, kept) in self._copies.items()}
        copies: list[Tensor] = list(fresh.values())
        fresh |= {key: copy.copy(kept) for key, (_, kept) in self._iterators.items()}
        self._held.restore(without=self._replaced)
        for holder, content in self._held.with_tensors if fresh else ():
            if id(holder) in self._replaced:
                continue
            if isinstance(content, dict):
                new: Content = {key: fresh.get(id(value), value) for key, value in content.items()}
            else:
                new = [fresh.get(id(value), value) for value in content]
            if not same(holder, new):
                put(holder, new)
        for set_state, state in self._generators:
            set_state(state)
        return copies


def _stands_in(value: Tensor | None) -> bool:
    return value is not None and not isinstance(value, nn.Parameter)


def _is_constant(value: Tensor) -> bool:
    """Whether the value is a plain tensor without a graph; ``grad_fn`` is not read, as it raises for some views."""
    return type(value) is Tensor and value.layout == torch.strided and not value.is_meta and not value.requires_grad


def _storage(value: Tensor) -> int:
    try:
        return int(value.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse ones have none
        return 0
