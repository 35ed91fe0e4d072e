"""Measure how fast the features of each layer move in training, and how that is aligned with the backward pass.

The public interface is what ``fastfs``, ``fastfs.formula``, ``fastfs.integrations``, ``fastfs.models``,
``fastfs.monitor``, ``fastfs.reference``, ``fastfs.scaling`` and ``fastfs.spectrum`` list in ``__all__``. Modules and
packages with a leading underscore are internal and change without notice.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastfs._utils.lazy import lazy_attribute
from fastfs._version import __version__

if TYPE_CHECKING:
    from fastfs import formula, integrations, models, monitor, reference, scaling, spectrum
    from fastfs._compare.compare import compare
    from fastfs._compare.result import Parting, RunComparison
    from fastfs._core.optimizer_rules import OptimizerRule
    from fastfs._functional import feature_stats, optimizer_stats, update_stats
    from fastfs._record.reading.load import load
    from fastfs._stats import FeatureStats, ParameterStats, UpdateStats
    from fastfs.monitor import Monitor

__all__ = [
    "FeatureStats",
    "Monitor",
    "OptimizerRule",
    "ParameterStats",
    "Parting",
    "RunComparison",
    "UpdateStats",
    "__version__",
    "compare",
    "feature_stats",
    "formula",
    "integrations",
    "load",
    "models",
    "monitor",
    "optimizer_stats",
    "reference",
    "scaling",
    "spectrum",
    "update_stats",
]

# Imported at first use: `fastfs --help` and the completion of the shell need not wait for torch, the stateless
# measurements need no monitor. The ops in `torch.ops.fastfs` are registered then, too.
_LAZY_OBJECTS = {
    "FeatureStats": "fastfs._stats",
    "Monitor": "fastfs.monitor",
    "OptimizerRule": "fastfs._core.optimizer_rules",
    "ParameterStats": "fastfs._stats",
    "Parting": "fastfs._compare.result",
    "RunComparison": "fastfs._compare.result",
    "UpdateStats": "fastfs._stats",
    "compare": "fastfs._compare.compare",
    "feature_stats": "fastfs._functional",
    "load": "fastfs._record.reading.load",
    "optimizer_stats": "fastfs._functional",
    "update_stats": "fastfs._functional",
}
_LAZY_MODULES = ("formula", "integrations", "models", "monitor", "reference", "scaling", "spectrum")


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"fastfs.{name}")
    return lazy_attribute(__name__, _LAZY_OBJECTS, name)
