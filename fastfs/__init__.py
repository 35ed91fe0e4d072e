"""fastfs: how fast each layer's features move in training, and how that is aligned with the backward pass."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastfs import reference
from fastfs._version import __version__
from fastfs.functional import feature_stats, update_stats
from fastfs.stats import FeatureStats, ParameterStats, UpdateStats

if TYPE_CHECKING:
    from fastfs.monitor import Monitor
    from fastfs.report.read import load

__all__ = [
    "FeatureStats",
    "Monitor",
    "ParameterStats",
    "UpdateStats",
    "__version__",
    "feature_stats",
    "load",
    "reference",
    "update_stats",
]


# At first use: the stateless measurements need none of it.
_LAZY = {"Monitor": "fastfs.monitor", "load": "fastfs.report.read"}
_ROOMS = ("formula", "monitor", "scaling", "spectrum")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"fastfs.{name}")
    raise AttributeError(f"module 'fastfs' has no attribute {name!r}")
