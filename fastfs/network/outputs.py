"""The features in what a layer gives: a tensor, or the first floating-point one in whatever holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["first_floating", "parts", "with_features"]


def first_floating(output: Any) -> Any:
    """The output itself, or the first floating-point tensor in tuples, lists, dictionaries and dataclasses; or None."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    for part in parts(output):
        found = first_floating(part)
        if found is not None:
            return found
    return None


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
