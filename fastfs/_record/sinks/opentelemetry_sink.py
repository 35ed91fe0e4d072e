"""Records as metrics of OpenTelemetry. Needs the extra ``opentelemetry``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastfs._record.columns import BY_NAME
from fastfs._record.record import Record
from fastfs._record.sinks.metrics import MAX_KEYS, STATISTICS, Metrics
from fastfs._version import __version__

try:
    from opentelemetry.metrics import Meter, MeterProvider, get_meter_provider
except ImportError as missing:
    text = 'fastfs: an OpenTelemetry sink needs opentelemetry-sdk: pip install "fastfs[opentelemetry]"'
    raise ImportError(text) from missing

__all__ = ["OpenTelemetrySink"]

_UNITS = {"rad": "rad", "s": "s"}


class OpenTelemetrySink:
    """Sets a gauge ``fastfs.<quantity>`` per quantity at each measured step, and counts alerts.

    A gauge has the attribute ``fastfs.group`` for a group's value and ``fastfs.statistic`` (``median``, ``min``,
    ``max``) for one of all layers, see ``docs/trackers.md``; ``fastfs.step`` is the step. The counter ``fastfs.alerts``
    has the attribute ``fastfs.rule``. Exporters of the meter provider send them, with the time of the export.

    Args:
        meter_provider: by default the global one. Without one, OpenTelemetry ignores the values.
        max_keys: largest number of values.

    Raises:
        ValueError: ``max_keys`` is out of range.
    """

    def __init__(self, meter_provider: MeterProvider | None = None, *, max_keys: int = MAX_KEYS) -> None:
        Metrics({}, max_keys)
        self._provider = meter_provider
        self._max_keys = max_keys
        self._metrics = Metrics({}, 1)
        self._meter: Meter | None = None
        self._gauges: dict[str, Any] = {}
        self._alerts: Any = None

    def open(self, header: Mapping[str, Any]) -> None:
        """Creates the instruments.

        Args:
            header: The header of the run.
        """
        self._metrics = Metrics(header, self._max_keys)
        meter = (self._provider or get_meter_provider()).get_meter("fastfs", __version__)
        self._gauges = {"step": meter.create_gauge("fastfs.step", "{step}", "last measured optimizer step")}
        for quantity in dict.fromkeys(metric.quantity for metric in self._metrics.metrics):
            column = BY_NAME.get(quantity)
            unit, about = (_UNITS.get(column.unit, "1"), column.meaning) if column else ("1", "share of layers")
            self._gauges[quantity] = meter.create_gauge(f"fastfs.{quantity}", unit, about)
        self._alerts = meter.create_counter("fastfs.alerts", "{alert}", "alerts")

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            if record.kind == "alert":
                self._alerts.add(1, {"fastfs.rule": str(record.scalars.get("rule"))})
            elif record.kind == "measured":
                self._gauges["step"].set(record.step)
            for metric, value in self._metrics.of(record).items():
                kind = "fastfs.statistic" if metric.label in STATISTICS else "fastfs.group"
                self._gauges[metric.quantity].set(value, {kind: metric.label} if metric.label else {})

    def close(self) -> None:
        pass
