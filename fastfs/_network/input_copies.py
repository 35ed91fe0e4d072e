"""Copies of a forward's arguments, for a second forward on the same values.

Arguments that cannot be copied completely are rejected: a second forward would consume an iterator and so change
training, and an unknown container could change between the forwards, which would make the result wrong.
"""

from __future__ import annotations

import copy as copy_module
import dataclasses
import enum
import functools
import sys
from collections import UserDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

__all__ = ["UnknownArgumentError", "copy_arguments", "tensors_in"]

_IMMUTABLE = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.Size,
    torch.layout,
    torch.memory_format,
)


class UnknownArgumentError(TypeError):
    """An argument holds an object that cannot be copied."""


def copy_arguments(arguments: Any, copy_tensor: Callable[[Tensor], Tensor]) -> Any:
    """Copy nested containers together with their contents.

    Args:
        arguments: tensors, numbers, strings and the like, NumPy arrays, packed sequences, dataclasses without further
            attributes, and all containers that ``torch.utils._pytree`` knows.
        copy_tensor: copies a tensor.

    Returns:
        New containers of the same structure.

    Raises:
        UnknownArgumentError: the arguments hold anything else; nothing has been consumed.
    """
    # A nested recursive function would be a reference cycle that keeps copy_tensor alive until garbage collection.
    return tree_map(functools.partial(_copy, copy_tensor, {}), arguments)


def tensors_in(arguments: Any) -> list[Tensor]:
    """Return the tensors that :func:`copy_arguments` would copy, without duplicates."""
    found: list[Tensor] = []

    def see(x: Tensor) -> Tensor:
        found.append(x)
        return x

    copy_arguments(arguments, see)
    return found


def _copy(copy_tensor: Callable[[Tensor], Tensor], copies: dict[int, Tensor], leaf: Any) -> Any:
    copy = functools.partial(_copy, copy_tensor, copies)
    if isinstance(leaf, Tensor):
        if id(leaf) not in copies:  # keep the identity of repeated tensors: self-attention compares its inputs
            copies[id(leaf)] = copied = copy_tensor(leaf)
            _copy_attributes(copy, leaf, copied)
        return copies[id(leaf)]
    if isinstance(leaf, _IMMUTABLE):
        return leaf
    if isinstance(leaf, slice):
        return slice(copy(leaf.start), copy(leaf.stop), copy(leaf.step))
    if isinstance(leaf, PackedSequence):
        return PackedSequence(*(copy(part) for part in leaf))
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(leaf, (numpy.ndarray, numpy.generic)) and not leaf.dtype.hasobject:
        return leaf.copy()
    if isinstance(leaf, UserDict) and vars(leaf).keys() >= {"data"}:  # tokenizers return these
        new = copy_module.copy(leaf)
        new.data = tree_map(copy, leaf.data)
        return new
    if _is_plain_dataclass(leaf):
        new = object.__new__(type(leaf))
        for name, value in vars(leaf).items():
            object.__setattr__(new, name, tree_map(copy, value))  # also for frozen dataclasses
        return new
    kind = type(leaf)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    raise UnknownArgumentError(
        f"an argument of type {name}, which cannot be copied. Pass tensors, or containers of them that are "
        "registered with torch.utils._pytree"
    )


def _copy_attributes(copy: Callable[[Any], Any], tensor: Tensor, new: Tensor) -> None:
    """Copy attributes that a program attached to a tensor, except those that the copy already has."""
    if new is tensor or not vars(tensor):
        return
    for name, value in vars(tensor).items():
        if name not in vars(new):
            setattr(new, name, tree_map(copy, value))


def _is_plain_dataclass(value: Any) -> bool:
    """Whether the value is a dataclass instance without other attributes than its fields."""
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and type(value).__new__ is object.__new__  # no dict or tuple underneath
        and hasattr(value, "__dict__")
        and vars(value).keys() == {field.name for field in dataclasses.fields(value)}
    )
