"""Measure, during training, how far the features of each layer move and how that update is aligned with the loss.

:class:`fastfs.Monitor` attaches to a model and its optimizer. The other names configure it: a :class:`Schedule` says
which optimizer steps are measured, a :class:`Probe` names a fixed batch to measure on, sinks receive one
:class:`Record` per step, and alerts examine each record.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastfs._monitor.measure.probe import Probe
from fastfs._monitor.monitor import Monitor
from fastfs._monitor.schedule import Every, Schedule
from fastfs._record.reading.load import load_details
from fastfs._record.record import Record
from fastfs._record.sinks.callable_sink import CallableSink
from fastfs._record.sinks.jsonl_sink import JsonlSink
from fastfs._record.sinks.logging_sink import LoggingSink
from fastfs._record.sinks.protocol import PartlyWrittenError, Sink
from fastfs._record.sinks.targets import OPTIONAL_SINKS
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
    from fastfs._record.sinks.mlflow_sink import MlflowSink
    from fastfs._record.sinks.opentelemetry_sink import OpenTelemetrySink
    from fastfs._record.sinks.parquet_sink import ParquetSink
    from fastfs._record.sinks.prometheus_sink import PrometheusSink
    from fastfs._record.sinks.tensorboard_sink import TensorBoardSink
    from fastfs._record.sinks.trackio_sink import TrackioSink
    from fastfs._record.sinks.wandb_sink import WandbSink

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
    "MlflowSink",
    "Monitor",
    "NonFinite",
    "OpenTelemetrySink",
    "ParquetSink",
    "PartlyWrittenError",
    "Probe",
    "PrometheusSink",
    "RankApart",
    "Record",
    "ResidualLarge",
    "Schedule",
    "Sink",
    "TensorBoardSink",
    "TrackioSink",
    "UpdateAbove",
    "WandbSink",
    "default_alerts",
    "load_details",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in OPTIONAL_SINKS:
        return getattr(import_module(f"fastfs._record.sinks.{OPTIONAL_SINKS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
