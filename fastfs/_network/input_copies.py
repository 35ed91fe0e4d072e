"""Copies of a forward's arguments, for a second forward on the same values.

What is not known to be copied in full is refused: an iterator would be consumed by the second forward and change
training, an unknown container could be changed between the two and make the numbers wrong.
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
    """An argument holds something of which no copy can be made."""


def copy_arguments(arguments: Any, copy_tensor: Callable[[Tensor], Tensor]) -> Any:
    """The same nested containers, new, with copies of what they hold.

    Args:
        arguments: tensors, numbers, strings and the like, NumPy arrays, and of these packed sequences, dataclasses
            without further attributes, and all containers that ``torch.utils._pytree`` knows.
        copy_tensor: makes the copy of a tensor.

    Raises:
        UnknownArgumentError: anything else is in them; nothing has been consumed.
    """

    # No function of its own that calls itself: it would keep what copy_tensor holds until the garbage is collected.
    return tree_map(functools.partial(_copy, copy_tensor, {}), arguments)


def tensors_in(arguments: Any) -> list[Tensor]:
    """The tensors that :func:`copy_arguments` would copy, each once."""
    found: list[Tensor] = []

    def see(x: Tensor) -> Tensor:
        found.append(x)
        return x

    copy_arguments(arguments, see)
    return found


def _copy(copy_tensor: Callable[[Tensor], Tensor], copies: dict[int, Tensor], leaf: Any) -> Any:
    copy = functools.partial(_copy, copy_tensor, copies)
    if isinstance(leaf, Tensor):
        if id(leaf) not in copies:  # the same tensor twice is one: attention of x to itself asks for identity
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
    if isinstance(leaf, UserDict) and vars(leaf).keys() >= {"data"}:  # what tokenizers give
        new = copy_module.copy(leaf)
        new.data = tree_map(copy, leaf.data)
        return new
    if _is_plain_dataclass(leaf):
        new = object.__new__(type(leaf))
        for name, value in vars(leaf).items():
            object.__setattr__(new, name, tree_map(copy, value))  # frozen ones, too
        return new
    kind = type(leaf)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    raise UnknownArgumentError(
        f"an argument of type {name}, of which no copy can be made. Pass tensors, or containers of them that are "
        "registered with torch.utils._pytree"
    )


def _copy_attributes(copy: Callable[[Any], Any], tensor: Tensor, new: Tensor) -> None:
    """What a program has attached to a tensor; what a subclass consists of, its copy has already."""
    if new is tensor or not vars(tensor):
        return
    for name, value in vars(tensor).items():
        if name not in vars(new):
            setattr(new, name, tree_map(copy, value))


def _is_plain_dataclass(value: Any) -> bool:
    """A dataclass instance that consists of its fields."""
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and type(value).__new__ is object.__new__  # no dict or tuple underneath
        and hasattr(value, "__dict__")
        and vars(value).keys() == {field.name for field in dataclasses.fields(value)}
    )
