"""The sink for trackio, with its local store, which is read back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.record_cases import alert, measured, recorder
from tests.helpers.small_training import STEPS, same, train

ROOT = Path(__file__).parents[2]
trackio = pytest.importorskip("trackio")  # not in the extra `test`: its dependencies contradict those of other packages


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in [one for name, one in sys.modules.items() if name.startswith("trackio")]:
        for name in ("TRACKIO_DIR", "MEDIA_DIR"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, tmp_path / name)
    one = trackio.init(project="test", embed=False)
    yield one
    if trackio.context_vars.current_run.get() is not None:
        trackio.finish()


def logged(run: Any, key: str) -> list[tuple[int, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    return [(one["step"], one[key]) for one in SQLiteStorage.get_logs("test", run.name) if key in one]


def test_every_step_of_a_training_is_there(run: Any) -> None:
    rows: list[Any] = []
    alone, _ = train()
    beside, monitor = train(lambda step: trackio.log({"loss": step}, step=step), sinks=["trackio", rows.extend])
    assert same(alone, beside)
    trackio.finish()  # first
    monitor.close()
    run.finish()
    group = [(row["step"], row["angle"]) for row in rows if row["kind"] == "measured" and row["name"] == "linear"]
    assert logged(run, "fastfs/angle/linear") == group
    assert [step for step, _ in group] == list(range(STEPS))
    assert logged(run, "loss") == [(step, step) for step in range(STEPS)]


def test_steps_in_any_order_and_alerts(run: Any) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    from fastfs.monitor import Sink, TrackioSink

    sink = TrackioSink(run, prefix="f")
    assert isinstance(sink, Sink)
    one = recorder(sink)
    for record in (measured(7), measured(3), alert(3, "blocks.0"), alert(3)):
        one.put(record)
    one.close()
    trackio.finish()
    assert [step for step, _ in logged(run, "f/angle/median")] == [7, 3]
    (found,) = SQLiteStorage.get_alerts("test")
    assert (found["title"], found["step"]) == ("fastfs: nonfinite", 3)
    assert found["text"].count("\n") == 1


def test_there_has_to_be_a_run() -> None:
    with pytest.raises(ValueError, match=r"expected an active run: call trackio.init\(\) before attaching"):
        train(sinks=["trackio"])


SCRIPT = """
import trackio
from tests.helpers.small_training import train
run = trackio.init(project="test", embed=False)
print("name", run.name)
train(sinks=["trackio"], flush_seconds=60.0)
"""
READ = """
import sys
from trackio.sqlite_storage import SQLiteStorage
print(sorted(one["step"] for one in SQLiteStorage.get_logs("test", sys.argv[1]) if "fastfs/angle/median" in one))
"""


def test_a_script_that_closes_nothing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def said(*arguments: str) -> str:
        command = [sys.executable, "-c", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout

    name = said(SCRIPT).split("name ")[1].split()[0]
    assert said(READ, name).strip() == str(list(range(STEPS)))
