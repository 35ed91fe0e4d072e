"""The features in what a layer gives: a tensor, or the first floating-point one in whatever holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["first_floating", "floating", "kinds", "strided", "with_features"]


def strided(features: Tensor) -> Tensor:
    """The values of a jagged tensor, one row after the other; other tensors as they are."""
    return features.values() if features.layout is torch.jagged else features


def first_floating(output: Any) -> Any:
    """The output itself, or the first floating-point tensor in tuples, lists, dictionaries and dataclasses; or None."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    for part in parts(output):
        found = first_floating(part)
        if found is not None:
            return found
    return None


def floating(output: Any) -> list[Tensor]:
    """All floating-point tensors in an output, in whatever holds them."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    return [tensor for part in parts(output) for tensor in floating(part)]


def kinds(value: Any) -> list[str]:
    """What an output consists of, for a message."""
    if isinstance(value, Tensor):
        return [str(value.dtype)]
    if isinstance(value, (tuple, list, Mapping)) or dataclasses.is_dataclass(value):
        return [kind for part in parts(value) for kind in kinds(part)]
    return [type(value).__name__]


def with_features(output: Any, features: Tensor, new: Tensor) -> Any:
    """The same output with ``new`` in place of ``features``, which is one of the tensors in it.

    Raises:
        TypeError: they are in a container that ``torch.utils._pytree`` does not know.
    """
    replaced = []

    def replace(leaf: Any) -> Any:
        if leaf is features:
            replaced.append(leaf)
            return new
        return leaf

    changed = tree_map(replace, output)
    if not replaced:
        raise TypeError(
            f"the features are inside of a {type(output).__name__}, where they cannot be replaced: it is not "
            "registered with torch.utils._pytree"
        )
    return changed


def parts(value: Any) -> list[Any]:
    """What a container holds; nothing for anything else."""
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, Mapping):
        return list(value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []
