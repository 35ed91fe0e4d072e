"""fastfs: how fast each layer's features move in training, and how that is aligned with the backward pass."""

from __future__ import annotations

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


def __getattr__(name: str) -> Any:
    if name == "Monitor":  # imported at first use: the stateless measurements do not need it
        from fastfs.monitor import Monitor

        return Monitor
    if name == "load":
        from fastfs.report.read import load

        return load
    raise AttributeError(f"module 'fastfs' has no attribute {name!r}")
