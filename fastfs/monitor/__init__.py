"""Watch how far the features of a network move in each training step, and how that move is aligned with the loss.

Data flows one way: ``schedule`` says when, ``capture`` owns the hooks, ``measure`` is pure, ``record`` moves scalars
to the host, ``sinks`` write. Nothing flows back into training.
"""

from fastfs.monitor.measure.probe import Probe
from fastfs.monitor.monitor import Monitor
from fastfs.monitor.record.alerts import (
    AngleCollapse,
    LayerFrozen,
    NonFinite,
    ResidualLarge,
    UpdateAbove,
    default_alerts,
)
from fastfs.monitor.record.rows import Record
from fastfs.monitor.record.sinks import CallableSink, JsonlSink, Sink
from fastfs.monitor.schedule import Every, Schedule

__all__ = [
    "AngleCollapse",
    "CallableSink",
    "Every",
    "JsonlSink",
    "LayerFrozen",
    "Monitor",
    "NonFinite",
    "Probe",
    "Record",
    "ResidualLarge",
    "Schedule",
    "Sink",
    "UpdateAbove",
    "default_alerts",
]
