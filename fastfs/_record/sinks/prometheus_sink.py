"""Records as gauges of Prometheus. Needs the extra ``prometheus``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastfs._record.columns import BY_NAME
from fastfs._record.record import Record
from fastfs._record.sinks.metrics import MAX_KEYS, STATISTICS, Metric, Metrics

try:
    from prometheus_client import REGISTRY, CollectorRegistry, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.metrics_core import Metric as Family
    from prometheus_client.registry import Collector
except ImportError as missing:
    raise ImportError(
        'fastfs: a Prometheus sink needs prometheus-client: pip install "fastfs[prometheus]"'
    ) from missing

__all__ = ["PrometheusSink"]


class PrometheusSink(Collector):
    """Shows the last measured step as gauges, and counts alerts.

    A gauge ``fastfs_<quantity>`` has the label ``group`` for a group's value and the label ``statistic`` (``median``,
    ``min``, ``max``) for one of all layers, see ``docs/trackers.md``; ``fastfs_step`` is the step. A value that
    the last measured step does not have disappears. ``fastfs_alerts_total`` counts alerts by ``rule``.

    Args:
        registry: of prometheus_client, by default its global one. The metrics are removed from it at the end.
        port: of an HTTP server that is started for the registry; none by default.
        address: that the server listens on.
        max_keys: largest number of values.
        prefix: first part of the names; different for monitors that share a registry.

    Raises:
        ValueError: ``max_keys`` or ``port`` is out of range.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        port: int | None = None,
        *,
        address: str = "0.0.0.0",
        max_keys: int = MAX_KEYS,
        prefix: str = "fastfs",
    ) -> None:
        Metrics({}, max_keys)
        if port is not None and (type(port) is not int or not 0 < port < 65536):
            raise ValueError(f"PrometheusSink: port: expected an integer from 1 to 65535, got {port!r}")
        self._registry = REGISTRY if registry is None else registry
        self._port = port
        self._address = address
        self._max_keys = max_keys
        self._prefix = prefix
        self._metrics = Metrics({}, 1)
        self._last: tuple[int, dict[Metric, float]] | None = None
        self._alerts: Counter[str] = Counter()
        self._registered = False
        self._server: Any = None

    def open(self, header: Mapping[str, Any]) -> None:
        """Registers the metrics and starts the server.

        Args:
            header: The header of the run.

        Raises:
            OSError: The port is in use.
            ValueError: The registry has metrics of these names already.
        """
        self._metrics = Metrics(header, self._max_keys)
        if self._registered:  # the run is resumed
            return
        if self._port is not None:
            self._server = start_http_server(self._port, self._address, self._registry)
        try:
            self._registry.register(self)
        except BaseException as error:
            self.close()
            if isinstance(error, ValueError):
                raise ValueError(
                    f"PrometheusSink: the registry has metrics named {self._prefix!r} already, of another monitor for "
                    f"instance: give each a prefix, for example sinks=[PrometheusSink(prefix={self._prefix + '_2'!r})] "
                    f"({error})"
                ) from error
            raise
        self._registered = True

    def describe(self) -> Iterable[Family]:
        """Returns the names of the metrics, which the registry keeps unique."""
        quantities = dict.fromkeys(metric.quantity for metric in self._metrics.metrics)
        return [self._step(), *map(self._gauge, quantities), self._counter()]

    def collect(self) -> Iterable[Family]:
        """Returns the metrics with the values of the last measured step."""
        counter = self._counter()
        for rule, number in sorted(self._alerts.items()):
            counter.add_metric([rule], number)
        if self._last is None:
            return [counter]
        step, values = self._last
        gauges: dict[str, GaugeMetricFamily] = {}
        for metric, value in values.items():
            gauge = gauges.setdefault(metric.quantity, self._gauge(metric.quantity))
            statistic = metric.label in STATISTICS
            gauge.add_metric(["", metric.label] if statistic else [metric.label, ""], value)
        return [self._step(step), *gauges.values(), counter]

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            if record.kind == "measured":
                self._last = record.step, self._metrics.of(record)
            elif record.kind == "alert":
                self._alerts[str(record.scalars.get("rule"))] += 1

    def close(self) -> None:
        """Removes the metrics from the registry and stops the server."""
        if self._registered:
            self._registered = False
            self._registry.unregister(self)
        if self._server is not None:
            (server, thread), self._server = self._server, None
            server.shutdown()
            server.server_close()
            thread.join()

    def _step(self, step: int | None = None) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"{self._prefix}_step", "last measured optimizer step", value=step)

    def _gauge(self, quantity: str) -> GaugeMetricFamily:
        column = BY_NAME.get(quantity)
        about = column.meaning + (f" [{column.unit}]" if column.unit else "") if column else "share of layers"
        return GaugeMetricFamily(f"{self._prefix}_{quantity}", about, labels=["group", "statistic"])

    def _counter(self) -> CounterMetricFamily:
        return CounterMetricFamily(f"{self._prefix}_alerts", "alerts", labels=["rule"])
