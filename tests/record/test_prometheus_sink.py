"""The sink for Prometheus, read as a scraper does."""

from __future__ import annotations

import socket
import urllib.request
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fastfs.monitor import PrometheusSink, Sink
from tests.helpers.record_cases import alert, head, measured, predicted
from tests.helpers.small_training import STEPS, same, train


def parsed(text: str) -> dict[tuple[str, ...], float]:
    """Values by name, group and statistic (or rule)."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(one.name, *(value for _, value in sorted(one.labels.items()))): one.value for one in samples}


def scraped(registry: Any) -> dict[tuple[str, ...], float]:
    return parsed(generate_latest(registry).decode())


def test_the_last_measured_step_is_shown_and_nothing_older() -> None:
    registry = CollectorRegistry()
    sink = PrometheusSink(registry)
    assert isinstance(sink, Sink)
    sink.open(head(groups={'a "quoted" /group': ["blocks.0"]}))
    assert scraped(registry) == {}
    sink.write([measured(4), predicted(5)])
    values = scraped(registry)
    assert values["fastfs_step",] == 4
    assert values["fastfs_angle", 'a "quoted" /group', ""] == measured(4).columns["angle"][3]
    assert values["fastfs_angle", "", "median"] == measured(4).columns["angle"][1]
    assert values["fastfs_loss", "", ""] == 0.5
    sink.write([measured(7, valid=False), alert(7), alert(8)])
    values = scraped(registry)
    assert values["fastfs_step",] == 7
    assert not [key for key in values if key[0] == "fastfs_angle"]
    assert values["fastfs_valid_share", "", ""] == 0
    assert values["fastfs_alerts_total", "nonfinite"] == 2
    sink.close()
    sink.close()
    assert scraped(registry) == {}


def test_a_server_shows_a_training() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    alone, _ = train()
    registry = CollectorRegistry()
    beside, monitor = train(sinks=[PrometheusSink(registry, port, address="127.0.0.1")])
    assert same(alone, beside)
    monitor.flush()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        values = parsed(response.read().decode())
    assert values["fastfs_step",] == STEPS - 1
    assert values["fastfs_angle", "linear", ""] > 0
    monitor.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")


def test_the_global_registry_by_name_and_port() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        mine = PrometheusSink(port=taken.getsockname()[1])
        for sink in (f"prometheus:{taken.getsockname()[1]}", mine):
            with pytest.raises(OSError, match="in use"):
                train(sinks=[sink])
    assert REGISTRY.get_sample_value("fastfs_step") is None
    _, monitor = train(sinks=["prometheus"])
    monitor.flush()
    assert REGISTRY.get_sample_value("fastfs_step") == STEPS - 1
    for again in ("prometheus", PrometheusSink()):
        with pytest.raises(ValueError, match=r"give each a prefix.*Duplicated timeseries"):
            train(sinks=[again])
    _, other = train(sinks=[PrometheusSink(prefix="other")])
    other.flush()
    assert REGISTRY.get_sample_value("other_step") == STEPS - 1
    other.close()
    monitor.close()
    assert REGISTRY.get_sample_value("fastfs_step") is None


@pytest.mark.parametrize("sink", ["prometheus:0", "prometheus:99999"])
def test_a_port_that_does_not_exist_is_named(sink: str) -> None:
    with pytest.raises(ValueError, match=r"port: expected an integer from 1 to 65535, got"):
        train(sinks=[sink])


def test_a_resumed_run_is_registered_once_and_names_of_the_user_are_kept() -> None:
    registry = CollectorRegistry(auto_describe=True)
    mine = Gauge("fastfs_angle_of_mine", "mine", registry=registry)
    mine.set(3)
    sink = PrometheusSink(registry)
    sink.open(head())
    sink.open(head(resumed_at=3))
    sink.write([measured(3)])
    assert scraped(registry)["fastfs_angle_of_mine",] == 3
    sink.close()
    assert set(scraped(registry)) == {("fastfs_angle_of_mine",)}
