"""Optimizers that can be given by name."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

__all__ = ["named"]

_NAMED: dict[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def named(name: str) -> type[Optimizer]:
    """Return the optimizer class of the given name.

    Args:
        name: ``"sgd"``, ``"adam"`` or ``"adamw"``.

    Returns:
        The class.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in _NAMED:
        raise ValueError(f"optimizer: expected one of {', '.join(_NAMED)}, got {name!r}")
    return _NAMED[name]
