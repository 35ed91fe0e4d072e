"""Records as metrics of OpenTelemetry. Needs the extra ``opentelemetry``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fastfs._record.columns import BY_NAME
from fastfs._record.record import Record
from fastfs._record.sinks.metrics import MAX_KEYS, STATISTICS, Metrics
from fastfs._version import __version__

try:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter_provider
except ImportError as missing:
    text = 'fastfs: an OpenTelemetry sink needs opentelemetry-sdk: pip install "fastfs[opentelemetry]"'
    raise ImportError(text) from missing

__all__ = ["OpenTelemetrySink"]

_UNITS = {"rad": "rad", "s": "s"}


class OpenTelemetrySink:
    """Shows the last measured step as observable gauges ``fastfs.<quantity>``, and counts alerts.

    A gauge has the attribute ``fastfs.group`` for a group's value and ``fastfs.statistic`` (``median``, ``min``,
    ``max``) for one of all layers, see ``docs/trackers.md``; ``fastfs.step`` is the step. A value that the
    last measured step does not have is not exported. The counter ``fastfs.alerts`` has the attribute ``fastfs.rule``.
    The scope of the instruments has the attribute ``fastfs.run``, the id of the run.

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
        self._run: str | None = None
        self._last: dict[str, list[Observation]] = {}
        self._alerts: Any = None

    def open(self, header: Mapping[str, Any]) -> None:
        """Creates the instruments.

        Args:
            header: The header of the run.
        """
        self._metrics = Metrics(header, self._max_keys)
        provider = self._provider or get_meter_provider()
        run = self._run = str(header["run"])
        meter = provider.get_meter("fastfs", __version__, attributes={"fastfs.run": run})
        quantities = ["step", *dict.fromkeys(metric.quantity for metric in self._metrics.metrics)]
        for quantity in quantities:
            column = BY_NAME.get(quantity)
            unit = _UNITS.get(column.unit, "1") if column else "1"
            callback = partial(self._observed, run, quantity)
            meter.create_observable_gauge(f"fastfs.{quantity}", [callback], unit, column.meaning if column else "")
        self._alerts = meter.create_counter("fastfs.alerts", "{alert}", "alerts")

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            if record.kind == "alert":
                self._alerts.add(1, {"fastfs.rule": str(record.scalars.get("rule"))})
            elif record.kind == "measured":
                last = {"step": [Observation(record.step)]}
                for metric, value in self._metrics.of(record).items():
                    kind = "fastfs.statistic" if metric.label in STATISTICS else "fastfs.group"
                    attributes = {kind: metric.label} if metric.label else {}
                    last.setdefault(metric.quantity, []).append(Observation(value, attributes))
                self._last = last

    def close(self) -> None:
        """Exports what there is, if the provider can be told to, and ends the gauges."""
        if self._run is not None:
            if (flush := getattr(self._provider or get_meter_provider(), "force_flush", None)) is not None:
                flush()
            self.discard()

    def discard(self) -> None:
        """Ends the gauges."""
        self._run, self._last = None, {}

    def _observed(self, run: str, quantity: str, _options: CallbackOptions) -> list[Observation]:
        return self._last.get(quantity, []) if run == self._run else []
