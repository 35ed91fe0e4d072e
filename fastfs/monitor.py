"""Measure, during training, how far the features of each layer move and how that update is aligned with the loss.

:class:`fastfs.Monitor` attaches to a model and its optimizer. The other names configure it: a :class:`Schedule` says
which optimizer steps are measured, a :class:`Probe` names a fixed batch to measure on, sinks receive one
:class:`Record` per step, and alerts examine each record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastfs._monitor.measure.probe import Probe
from fastfs._monitor.monitor import Monitor
from fastfs._monitor.schedule import Every, Schedule
from fastfs._record.record import Record
from fastfs._record.sinks.callable_sink import CallableSink
from fastfs._record.sinks.jsonl_sink import JsonlSink
from fastfs._record.sinks.logging_sink import LoggingSink
from fastfs._record.sinks.protocol import PartlyWrittenError, Sink
from fastfs._record.writing.alert_rules import (
    AlertRule,
    AngleCollapse,
    Finding,
    GradientScale,
    LayerFrozen,
    NonFinite,
    RankApart,
    ResidualLarge,
    UpdateAbove,
    default_alerts,
)

if TYPE_CHECKING:
    from fastfs._record.sinks.parquet_sink import ParquetSink
    from fastfs._record.sinks.tensorboard_sink import TensorBoardSink

__all__ = [
    "AlertRule",
    "AngleCollapse",
    "CallableSink",
    "Every",
    "Finding",
    "GradientScale",
    "JsonlSink",
    "LayerFrozen",
    "LoggingSink",
    "Monitor",
    "NonFinite",
    "ParquetSink",
    "PartlyWrittenError",
    "Probe",
    "RankApart",
    "Record",
    "ResidualLarge",
    "Schedule",
    "Sink",
    "TensorBoardSink",
    "UpdateAbove",
    "default_alerts",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # These two need optional dependencies, and say so when they are imported.
    if name == "ParquetSink":
        from fastfs._record.sinks.parquet_sink import ParquetSink

        return ParquetSink
    if name == "TensorBoardSink":
        from fastfs._record.sinks.tensorboard_sink import TensorBoardSink

        return TensorBoardSink
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
