"""The sink for OpenTelemetry, with the SDK's reader in memory."""

from __future__ import annotations

import io
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, InMemoryMetricReader, PeriodicExportingMetricReader

from fastfs.monitor import OpenTelemetrySink, Sink
from tests.helpers.record_cases import alert, head, measured, predicted
from tests.helpers.small_training import STEPS, same, train


def collected(reader: InMemoryMetricReader) -> dict[Any, Any]:
    """Values by name and attributes, and units by name."""
    data = reader.get_metrics_data()
    metrics = (
        [one for found in data.resource_metrics for scope in found.scope_metrics for one in scope.metrics]
        if data
        else []
    )
    values: dict[Any, Any] = {
        (metric.name, *sorted(point.attributes.items())): point.value
        for metric in metrics
        for point in metric.data.data_points
    }
    return {**values, **{metric.name: metric.unit for metric in metrics}}


def test_gauges_have_the_values_of_a_step_and_no_older_ones() -> None:
    reader = InMemoryMetricReader()
    sink = OpenTelemetrySink(MeterProvider([reader]))
    assert isinstance(sink, Sink)
    sink.open(head())
    assert collected(reader) == {}
    sink.write([measured(4), predicted(5), alert(5)])
    values = collected(reader)
    assert values["fastfs.step",] == 4
    assert values["fastfs.angle", ("fastfs.group", "all")] == measured(4).columns["angle"][3]
    assert values["fastfs.angle", ("fastfs.statistic", "median")] == measured(4).columns["angle"][1]
    assert values["fastfs.loss",] == 0.5
    assert values["fastfs.alerts", ("fastfs.rule", "nonfinite")] == 1
    units = {name: unit for name, unit in values.items() if isinstance(name, str)}
    assert units["fastfs.angle"] == "rad"
    assert units["fastfs.overhead_seconds"] == "s"
    assert units["fastfs.relative_update"] == "1"
    assert not [unit for unit in units.values() if "/" in unit]
    sink.write([measured(7, valid=False)])
    values = collected(reader)
    assert values["fastfs.step",] == 7
    assert not [key for key in values if key[0] == "fastfs.angle"]
    sink.close()


def test_a_training_is_the_same_and_its_last_step_is_there() -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    alone, _ = train()
    for _ in range(2):  # one run after the other
        beside, monitor = train(sinks=[OpenTelemetrySink(provider)])
        assert same(alone, beside)
        monitor.flush()
        assert collected(reader)["fastfs.step",] == STEPS - 1
        monitor.close()
        collected(reader)  # what the reader got when the monitor closed
        assert collected(reader) == {}


def test_an_exporter_gets_the_last_step_when_the_monitor_closes() -> None:
    text = io.StringIO()
    reader = PeriodicExportingMetricReader(ConsoleMetricExporter(out=text), export_interval_millis=1e9)
    provider = MeterProvider([reader])
    train(sinks=[OpenTelemetrySink(provider)])[1].close()
    (exported,) = text.getvalue().split("\n}\n")[:1]
    assert '"fastfs.angle"' in exported
    assert '"fastfs.run"' in exported
    provider.shutdown()


def test_a_resumed_run_has_one_value() -> None:
    reader = InMemoryMetricReader()
    sink = OpenTelemetrySink(MeterProvider([reader]))
    for run in ("b", "a", "a"):
        sink.open(head(run))
    sink.write([measured(3)])
    assert collected(reader)["fastfs.step",] == 3


def test_without_a_provider_nothing_happens() -> None:
    train(sinks=["opentelemetry"])[1].close()
