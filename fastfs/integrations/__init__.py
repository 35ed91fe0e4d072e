"""Callbacks that attach the monitor to a trainer in one line: Hugging Face Transformers and Lightning.

Each needs its package, and says so when it is imported. ``docs/trainers.md`` has an example of each.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastfs.integrations._huggingface import FastfsCallback
    from fastfs.integrations._lightning import LightningCallback

__all__ = ["FastfsCallback", "LightningCallback"]

_MODULES = {"FastfsCallback": "_huggingface", "LightningCallback": "_lightning"}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
