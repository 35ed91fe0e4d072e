"""The sink for W&B: offline runs, whose files are read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from fastfs._record.record import Record
from fastfs._record.sinks.metrics import MAX_KEYS, Metrics
from fastfs.monitor import Sink, WandbSink
from tests.helpers.record_cases import alert, head, measured, predicted, recorder, until
from tests.helpers.small_training import STEPS, same, train
from tests.helpers.wandb_runs import history, of_kind, offline_run

ROOT = Path(__file__).parents[2]
ANGLE = "fastfs/angle/median"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    one = offline_run(tmp_path)
    yield one
    one.finish()


def points(folder: Path, **options: Any) -> list[int]:
    """Steps of the rows that have an angle."""
    return [row["fastfs/step"] for row in history(folder, **options) if ANGLE in row]


def own(folder: Path, key: str) -> list[tuple[int, Any]]:
    """The loop's values with their W&B steps."""
    return [(row["_step"], row[key]) for row in history(folder) if key in row]


# No value is lost, whichever way the loop logs


def each_step(run: Any) -> Callable[[int], None]:
    def log(step: int) -> None:
        run.log({"loss": step}, step=step)
        run.log({"accuracy": step}, step=step)

    return log


LOOPS: dict[str, Callable[[Any], Callable[[int], object]]] = {
    "step=": each_step,
    "step= with gaps": lambda run: lambda step: run.log({"loss": step, "accuracy": step}, step=100 * step),
    "without": lambda run: lambda step: run.log({"loss": step, "accuracy": step}),
    "commit=False": lambda run: lambda step: (run.log({"loss": step}, commit=False), run.log({"accuracy": step})),
    "seldom": lambda run: lambda step: step % 3 or run.log({"loss": step, "accuracy": step}, step=step),
    "never": lambda run: lambda step: None,
}
LOGGED = {
    "step=": [(step, step) for step in range(STEPS)],
    "step= with gaps": [(100 * step, step) for step in range(STEPS)],
    "without": [(step, step) for step in range(STEPS)],
    "commit=False": [(step, step) for step in range(STEPS)],
    "seldom": [(0, 0), (3, 3)],
    "never": [],
}


@pytest.mark.parametrize("flush_seconds", [0.0, 60.0])
@pytest.mark.parametrize("loop", LOOPS)
def test_neither_the_loops_values_nor_the_monitors_are_lost(
    tmp_path: Path, run: Any, loop: str, flush_seconds: float
) -> None:
    _, monitor = train(LOOPS[loop](run), sinks=["wandb"], flush_seconds=flush_seconds)
    monitor.close()
    run.log({"test": 1.0}, **({"step": 600} if loop.startswith(("step=", "seldom")) else {}))
    run.finish()
    assert sorted(points(tmp_path)) == list(range(STEPS))
    assert own(tmp_path, "loss") == LOGGED[loop]
    assert own(tmp_path, "accuracy") == LOGGED[loop]
    assert len(own(tmp_path, "test")) == 1
    steps = [row["_step"] for row in history(tmp_path)]
    assert steps == sorted(set(steps))


def test_a_writer_that_lags_behind_the_run_loses_nothing(tmp_path: Path, run: Any) -> None:
    class Late(WandbSink):
        def write(self, records: Any) -> None:
            time.sleep(0.05)  # rows of the loop begin meanwhile
            super().write(records)

    _, monitor = train(lambda step: run.log({"loss": step}, step=step), sinks=[Late()], flush_seconds=0.0, steps=30)
    monitor.flush()
    run.log({"loss": 30}, step=30)
    run.finish()
    monitor.close()
    assert sorted(points(tmp_path)) == list(range(30))
    assert own(tmp_path, "loss") == [(step, step) for step in range(31)]


def test_two_threads_of_the_loop_may_log(tmp_path: Path, run: Any) -> None:
    def others() -> None:
        for step in range(100):
            run.log({"other": step})

    thread = threading.Thread(target=others)
    thread.start()
    _, monitor = train(lambda step: run.log({"loss": step}), sinks=["wandb"], flush_seconds=0.0)
    thread.join()
    monitor.close()
    run.finish()
    assert sorted(points(tmp_path)) == list(range(STEPS))
    assert sorted(value for _, value in own(tmp_path, "other")) == list(range(100))
    assert sorted(value for _, value in own(tmp_path, "loss")) == list(range(STEPS))


def test_the_run_may_finish_before_the_monitor(tmp_path: Path, run: Any) -> None:
    _, monitor = train(lambda step: run.log({"loss": step}, step=step), sinks=["wandb"], flush_seconds=60.0)
    run.finish()  # brings along what waits in the monitor
    assert sorted(points(tmp_path)) == list(range(STEPS))
    monitor.close()  # without a warning: nothing came later


def test_records_after_the_end_of_the_run_are_reported_and_harm_nothing(tmp_path: Path, run: Any) -> None:
    one = recorder(WandbSink(run))
    one.put(measured(0))
    run.finish()
    one.put(measured(1))
    with pytest.warns(RuntimeWarning) as warned:
        one.close()
    texts = [str(each.message) for each in warned]
    assert any("WandbSink failed at step 1 (ValueError: the W&B run has finished" in text for text in texts)
    assert any("WandbSink: 1 records could not be written" in text for text in texts)
    assert points(tmp_path) == [0]


SCRIPT = """
import sys
from pathlib import Path
import wandb
from fastfs.monitor import WandbSink
from tests.helpers.small_training import train
from tests.helpers.wandb_runs import offline_run
end, folder = sys.argv[1:]
run = offline_run(Path(folder))
_, monitor = train(lambda step: run.log({"loss": step}, step=step), sinks=[WandbSink(table=True)], flush_seconds=60.0)
if end == "error":
    raise ValueError("the loop failed")
else:
    monitor.close()
    _, monitor = train(lambda step: run.log({"loss": step}, step=step + 6), sinks=["wandb"], flush_seconds=60.0)
"""


def test_scripts_that_finish_nothing_lose_nothing(tmp_path: Path) -> None:
    """W&B writes the last row of such a script only when its own process ends, some seconds later."""
    started = {}
    for end in ("error", "other"):
        (tmp_path / end).mkdir()
        command = [sys.executable, "-W", "error", "-c", SCRIPT, end, str(tmp_path / end)]
        started[end] = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for end, script in started.items():
        folder, times = tmp_path / end, 2 if end == "other" else 1
        _, said = script.communicate(timeout=120)
        assert script.returncode == (end == "error"), said
        assert ("the loop failed" in said) == (end == "error")
        assert "RuntimeWarning" not in said
        until(lambda f=folder, t=times: sorted(points(f, finished=False)) == sorted(t * list(range(STEPS))), 60)
        rows = history(folder, finished=False)
        loss = [(row["_step"], row["loss"]) for row in rows if "loss" in row]
        assert loss == [(step, step % STEPS) for step in range(times * STEPS)]
        (table,) = folder.glob("wandb/offline-run-*/files/media/table/fastfs/layers_*.table.json")
        assert len(json.loads(table.read_text())["data"]) == 4 * STEPS


DEAD = """
import os, signal, sys
from pathlib import Path
from tests.helpers.small_training import same, train
from tests.helpers.wandb_runs import offline_run
alone, _ = train()
run = offline_run(Path(sys.argv[1]))
children = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
services = [int(one) for one in children if "wandb-core" in Path(f"/proc/{one}/cmdline").read_text()]
assert len(services) == 1
options = {"sinks": ["wandb"], "flush_seconds": 60.0}
beside, monitor = train(lambda step: step == 1 and os.kill(services[0], signal.SIGKILL), **options)
monitor.close()
print("same", same(alone, beside))
"""


def test_a_dead_process_of_wandb_neither_stops_nor_changes_a_training(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DEAD, str(tmp_path)]
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # not the one of the tests
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False, timeout=120)
    assert "same True" in done.stdout, done.stderr
    assert done.stderr.count("fastfs.Monitor: WandbSink failed to flush") == 1
    assert f"fastfs: {STEPS} records could not be written" in done.stderr


# What is written


def test_the_axis_is_defined_and_the_header_is_in_the_configuration(tmp_path: Path, run: Any) -> None:
    run.config.update({"lr": 0.1})
    sink = WandbSink(run)
    assert isinstance(sink, Sink)
    one = recorder(sink)
    one.put(measured(3))
    one.close()
    config = dict(run.config)
    run.finish()
    metrics = of_kind(tmp_path, "metric")
    assert [(each.name, each.glob_name, each.step_metric) for each in metrics] == [
        ("fastfs/step", "", ""),
        ("", "fastfs/*", "fastfs/step"),
    ]
    assert config["lr"] == 0.1
    left_out = [metric.key("fastfs") for metric in Metrics(head(), MAX_KEYS - 1).left_out]  # one is the step
    assert left_out[0] == "fastfs/radial_update/min"
    assert config["fastfs_record"] == {**head(), "left_out": left_out}
    (row,) = history(tmp_path)
    assert row["fastfs/step"] == 3
    assert row["fastfs/angle/all"] == measured(3).columns["angle"][3]
    assert row[ANGLE] == measured(3).columns["angle"][1]
    assert row["fastfs/loss"] == 0.5


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("most", [3, 10, 64, 500])
def test_there_are_at_most_so_many_keys(tmp_path: Path, run: Any, most: int, table: bool) -> None:
    groups = {f"g{i}": ["blocks.0"] for i in range(30)}
    sink = WandbSink(run, max_keys=most, table=table, prefix="f/x")
    sink.open(head(groups=groups))
    sink.write([measured(0, groups=30)])
    sink.close()
    run.finish()
    keys = {key for row in history(tmp_path) for key in row if key.startswith("f/x/") and "layers/" not in key}
    assert 2 <= len(keys) + table <= most
    assert ("f/x/angle/g29" in keys) == (most >= 64)
    assert any("layers/" in key for row in history(tmp_path) for key in row) == table


def test_predicted_and_invalid_rows_are_not_points(tmp_path: Path, run: Any) -> None:
    one = recorder(WandbSink(run))
    for record in (predicted(1), measured(2, valid=False), Record("skipped", 3, 0.0, {"reason": "overflow"})):
        one.put(record)
    one.close()
    run.finish()
    (row,) = history(tmp_path)
    assert row["fastfs/step"] == 2
    assert row["fastfs/valid_share"] == 0
    assert {"fastfs/backward_rms/median", "fastfs/loss"} < set(row)
    assert not [key for key in row if "angle" in key or "update" in key or "residual" in key]


def test_alerts_become_alerts_one_for_each_rule_and_step(tmp_path: Path, run: Any) -> None:
    one = recorder(WandbSink(run))
    one.put(alert(1, "blocks.0"))
    one.put(alert(1, "blocks.1"))
    one.put(Record("alert", 2, 0.0, {"rule": "r" * 80, "layer": None, "value": None, "message": "bad"}))
    one.close()
    silent = recorder(WandbSink(run, alerts=False))
    silent.put(alert(5))
    silent.close()
    run.finish()
    first, second = of_kind(tmp_path, "alert")
    assert (first.title, first.level) == ("fastfs: nonfinite", "WARN")
    message = "2 entries are NaN or infinite"
    assert first.text == f"step 1: blocks.0: {message}\nstep 1: blocks.1: {message}"
    assert second.title == f"fastfs: {'r' * 55}"
    assert second.text == "step 2: bad"


def test_the_table_has_a_row_for_each_layer_and_step(tmp_path: Path, run: Any) -> None:
    one = recorder(WandbSink(run, table=True))
    one.put(measured(0))
    one.put(measured(1, valid=[True, False, None, True]))
    one.close()
    run.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/files/media/table/fastfs/layers_*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"][:5] == ["step", "layer", "valid", "angle", "update_rms"]
    assert [row[:3] for row in table["data"]][3:6] == [[0, "all", True], [1, "blocks.0", True], [1, "blocks.1", False]]
    angle = measured(1).columns["angle"]
    assert [row[3] for row in table["data"]][4:] == [angle[0], None, None, angle[3]]


def test_own_rows_are_written_at_once(tmp_path: Path, run: Any) -> None:
    with train(lambda step: step % 3 or run.log({"loss": step}), sinks=[WandbSink(own_rows=True)])[1] as monitor:
        monitor.flush()
        assert run.step == 2 + STEPS
    run.finish()
    assert points(tmp_path) == list(range(STEPS))
    assert [value for _, value in own(tmp_path, "loss")] == [0, 3]


def test_a_resumed_run_goes_on_in_the_same_rows(tmp_path: Path, run: Any) -> None:
    _, first = train(sinks=["wandb"], metadata={"try": 1})
    state = first.state_dict()
    first.close()
    model_and_more = {"sinks": [WandbSink(run)], "steps": 0}
    _, second = train(**model_and_more)
    second.load_state_dict(state)
    assert run.config["fastfs_record"]["resumed_at"] == STEPS
    second.close()
    run.finish()
    assert sorted(points(tmp_path)) == list(range(STEPS))


def test_two_monitors_need_two_prefixes(tmp_path: Path, run: Any) -> None:
    _, first = train(steps=0, sinks=["wandb"])
    with pytest.raises(ValueError, match=r"another monitor logs to this run as 'fastfs'.*WandbSink\(prefix='fastfs_2'"):
        train(sinks=["wandb"])
    _, second = train(sinks=[WandbSink(prefix="discriminator")])
    second.close()
    first.close()
    _, third = train(sinks=["wandb"])
    third.close()
    run.finish()
    assert sorted(points(tmp_path)) == list(range(STEPS))
    assert sum("discriminator/angle/median" in row for row in history(tmp_path)) == STEPS


def test_training_is_the_same(tmp_path: Path, run: Any) -> None:
    alone, _ = train()
    beside, monitor = train(sinks=[WandbSink(table=True)], flush_seconds=0.0)
    monitor.close()
    assert same(alone, beside)


# Runs that are not there


def test_a_run_has_to_be_active() -> None:
    assert wandb.run is None
    with pytest.raises(ValueError, match=r"expected an active run: call wandb.init\(\) before attaching, or give run="):
        train(sinks=["wandb"])


def test_a_disabled_run_gets_nothing(tmp_path: Path) -> None:
    with wandb.init(mode="disabled", dir=str(tmp_path)) as run:
        _, monitor = train(sinks=["wandb"])
        monitor.close()
        assert run.disabled


def test_a_finished_run_is_an_error(tmp_path: Path) -> None:
    run = offline_run(tmp_path)
    run.finish()
    with pytest.raises(wandb.errors.UsageError, match="is finished"):
        train(sinks=[WandbSink(run)])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_keys": 1}, "max_keys: expected an integer > 1, got 1"),
        ({"max_keys": 2, "table": True}, "max_keys: expected an integer > 2, got 2"),
        ({"max_keys": 8.0}, "max_keys: expected an integer > 1, got 8.0"),
        ({"prefix": ""}, "prefix: expected words separated by slashes, got ''"),
        ({"prefix": "a*"}, "prefix: expected words"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WandbSink(**options)
