"""The sink for MLflow, with a local store that is read back."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from fastfs.monitor import MlflowSink, Sink
from tests.helpers.record_cases import LAYERS, alert, head, measured, recorder, until
from tests.helpers.small_training import STEPS, same, train

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("local_trackers")


def points(run: Any, key: str) -> list[tuple[int, float]]:
    return [(one.step, one.value) for one in MlflowClient().get_metric_history(run.info.run_id, key)]


def tags(run: Any) -> dict[str, str]:
    found: dict[str, str] = MlflowClient().get_run(run.info.run_id).data.tags
    return {name: value for name, value in found.items() if not name.startswith("mlflow.")}


@pytest.mark.parametrize("flush_seconds", [0.0, 60.0])
def test_every_step_of_a_training_is_there(flush_seconds: float) -> None:
    alone, _ = train()
    rows: list[Any] = []
    with mlflow.start_run() as run:
        options = {"sinks": ["mlflow", rows.extend], "flush_seconds": flush_seconds}
        beside, monitor = train(lambda step: mlflow.log_metric("loss", step), **options)
        monitor.close()
    assert same(alone, beside)
    group = [(row["step"], row["angle"]) for row in rows if row["kind"] == "measured" and row["name"] == "linear"]
    assert points(run, "fastfs/angle/linear") == group
    assert len(group) == STEPS
    assert [step for step, _ in points(run, "fastfs/relative_update/median")] == list(range(STEPS))
    assert len(points(run, "loss")) == STEPS
    assert len([key for key in MlflowClient().get_run(run.info.run_id).data.metrics if key != "loss"]) <= 64
    assert tags(run)["fastfs.optimizer"] == "SGD"
    assert tags(run)["fastfs.run"] == rows[0]["run"]


def test_steps_times_and_many_points_are_kept() -> None:
    with mlflow.start_run() as run:
        sink = MlflowSink(max_keys=60)
        assert isinstance(sink, Sink)
        sink.open(head())
        sink.write([measured(step) for step in range(100)])  # thousands of points, in several batches
        sink.close()
    history = MlflowClient().get_metric_history(run.info.run_id, "fastfs/angle/median")
    assert [(one.step, one.timestamp) for one in history] == [(step, 1000 * (100 + step)) for step in range(100)]
    assert [one.value for one in history] == [measured(step).columns["angle"][1] for step in range(100)]
    assert "fastfs/rank_angle_sd/max" in tags(run)["fastfs.left_out"]
    with pytest.raises(ValueError, match="this sink is closed"):
        sink.write([measured(0)])


def test_more_keys_than_a_batch_takes() -> None:
    groups = {f"group {i}": LAYERS for i in range(300)}
    with mlflow.start_run() as run:
        sink = MlflowSink(max_keys=10_000)
        sink.open(head(groups=groups))
        sink.write([measured(step, groups=300) for step in range(2)])
    assert len(points(run, "fastfs/angle/group 299")) == 2
    assert len(MlflowClient().get_run(run.info.run_id).data.metrics) > 1000


@pytest.mark.parametrize("names", [["a*b", "a?b", "a/b"], ["..", "."], ["é", "x" * 300, "x" * 299]])
def test_names_of_groups_become_names_that_mlflow_takes(names: list[str]) -> None:
    with mlflow.start_run() as run:
        one = recorder(MlflowSink())
        sink = one._writer.queues[0].sink
        sink.open(head(groups=dict.fromkeys(names, LAYERS)))
        sink.write([measured(0, groups=len(names))])
        one.close()
    metrics = MlflowClient().get_run(run.info.run_id).data.metrics
    values = [metrics[key] for key in metrics if re.fullmatch(r"fastfs/angle/(?!median|min|max).*", key)]
    assert sorted(values) == measured(0, groups=len(names)).columns["angle"][3:]


def test_alerts_are_tags() -> None:
    with mlflow.start_run() as run:
        one = recorder(MlflowSink(prefix="gan/d"))
        for step in (1, 2):
            one.put(alert(step, "blocks.0"))
        one.close()
    assert tags(run)["gan/d.alert.nonfinite"] == "step 2: blocks.0: 2 entries are NaN or infinite"


def test_the_run_may_end_first_and_the_thread_may_be_another() -> None:
    with mlflow.start_run() as run:
        _, monitor = train(sinks=["mlflow"], flush_seconds=60.0)
    monitor.close()
    assert [step for step, _ in points(run, "fastfs/angle/median")] == list(range(STEPS))

    def elsewhere() -> None:
        train(sinks=[MlflowSink(run.info.run_id, prefix="other")])[1].close()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(points(run, "other/angle/median")) == STEPS


def test_a_server_that_fails_for_a_while_gets_each_point_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = MlflowClient.log_batch, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) % 3 == 0:
            raise MlflowException("the connection was reset")
        return real(*args, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    with mlflow.start_run() as run:
        one = recorder(MlflowSink())
        for step in range(100):
            one.put(measured(step))
        with pytest.warns(RuntimeWarning, match="MlflowSink failed at step .* connection was reset"):
            until(one.flush)
        one.close()
    assert [step for step, _ in points(run, "fastfs/angle/median")] == list(range(100))
    assert len(calls) > 5


def test_there_has_to_be_a_run() -> None:
    with pytest.raises(ValueError, match=r"expected an active run in this thread: call mlflow.start_run\(\) before"):
        train(sinks=["mlflow"])
    with pytest.warns(RuntimeWarning, match="Run 'unknown' not found"):
        train(sinks=[MlflowSink("unknown")])[1].close()
    with pytest.raises(ValueError, match="max_keys: expected an integer >= 1, got 0"):
        MlflowSink(max_keys=0)


def test_repeated_requests_do_not_change_the_random_numbers_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens at the port, so that every request is repeated."""
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    sink = MlflowSink("0" * 32)
    sink.open(head())
    state = random.getstate()
    with pytest.raises(OSError, match="Connection refused"):
        sink.write([measured(0)])
    assert random.getstate() == state
    assert os.environ.pop("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER") == "0"


SCRIPT = """
import sys, mlflow
from tests.helpers.small_training import train
mlflow.set_tracking_uri(sys.argv[1])
run = mlflow.start_run()
print(run.info.run_id)
_, monitor = train(sinks=["mlflow"], flush_seconds=60.0)
"""


def test_a_script_that_closes_nothing_loses_nothing() -> None:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", SCRIPT, mlflow.get_tracking_uri()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    history = MlflowClient().get_metric_history(done.stdout.split()[0], "fastfs/angle/median")
    assert [one.step for one in history] == list(range(STEPS))
