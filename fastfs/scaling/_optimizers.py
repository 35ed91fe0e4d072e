"""The optimizers that have a name here."""

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
    """The type of the optimizer of that name.

    Raises:
        ValueError: another name.
    """
    if name not in _NAMED:
        raise ValueError(f"optimizer: expected one of {', '.join(_NAMED)}, got {name!r}")
    return _NAMED[name]
