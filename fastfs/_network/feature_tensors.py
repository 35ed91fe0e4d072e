"""Find the features in the output of a layer: the output tensor, or the first floating-point tensor in a container."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastfs._network.placements import local

__all__ = ["first_floating", "floating", "kinds", "strided", "with_features"]


def strided(features: Tensor) -> Tensor:
    """Return the values in memory: of a jagged tensor one row after the other, of a DTensor the part of this rank.

    Other tensors are returned unchanged.
    """
    return features.values() if features.layout is torch.jagged else local(features)


def first_floating(output: Any) -> Any:
    """Return the first floating-point tensor in an output, searching tuples, lists, mappings and dataclasses."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    for part in parts(output):
        found = first_floating(part)
        if found is not None:
            return found
    return None


def floating(output: Any) -> list[Tensor]:
    """Return all floating-point tensors in an output, at any depth of nesting."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    return [tensor for part in parts(output) for tensor in floating(part)]


def kinds(value: Any) -> list[str]:
    """Return the dtypes and type names in an output, for an error message."""
    if isinstance(value, Tensor):
        return [str(value.dtype)]
    if isinstance(value, (tuple, list, Mapping)) or dataclasses.is_dataclass(value):
        return [kind for part in parts(value) for kind in kinds(part)]
    return [type(value).__name__]


def with_features(output: Any, features: Tensor, new: Tensor) -> Any:
    """Return the output with ``new`` in place of the tensor ``features``.

    Args:
        output: output of a layer.
        features: one of the tensors in it.
        new: its replacement.

    Returns:
        A new container of the same structure.

    Raises:
        TypeError: the tensor is in a container that ``torch.utils._pytree`` does not know.
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
    """Return the members of a container, or an empty list for anything else."""
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, Mapping):
        return list(value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []
