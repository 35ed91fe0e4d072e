"""Attaching a record: checks of arguments, failures that leave nothing behind, warnings about other processes."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

import fastfs
from fastfs._monitor.run_record import open_recorder
from fastfs._monitor.settings import check_state
from fastfs._record.sinks.jsonl_sink import JsonlSink
from fastfs._record.sinks.parquet_sink import ParquetSink
from fastfs._record.sinks.targets import as_sink
from fastfs._record.writing.alert_rules import AngleCollapse
from fastfs._record.writing.recorder import Recorder
from tests.helpers.record_cases import Collecting, head, measured, recorder

ROOT = str(Path(__file__).parents[2])


# Which sink a string means


@pytest.mark.parametrize(
    "target",
    ["wandb:x", "mlflow:run", "s3://bucket/x.jsonl", "file:///x", "Tensorboard:x", "tb:x", "tensorboard:", "jsonl:a"],
)
def test_unknown_prefixes_are_not_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.chdir(tmp_path)
    for attach in (as_sink, lambda t: open_recorder(t, [], head()), lambda t: open_recorder("a.jsonl", [t], head())):
        with pytest.raises(ValueError, match=r"expected a path .*'tensorboard:FOLDER', a function .* got '") as caught:
            attach(target)
        assert repr("./" + target) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["./wandb:x", Path("wandb:x"), "a/b:c.jsonl", "12:30.jsonl", "c:x", "run_1:2.jsonl"])
def test_names_with_a_colon_can_be_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any) -> None:
    monkeypatch.chdir(tmp_path)
    one = open_recorder(target, [], head())
    one.close()
    assert fastfs.load(target).attrs["headers"] == [head()]


# Arguments


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, -0.5, "5", True, None, [1.0]])
def test_seconds_are_checked(value: Any) -> None:
    with pytest.raises(ValueError, match="flush_seconds: expected a finite number of seconds >= 0, got"):
        Recorder([], head(), flush_seconds=value)


@pytest.mark.parametrize(
    ("alerts", "error", "says"),
    [
        ("rules", TypeError, "alerts: expected a list of rules"),
        (AngleCollapse(), TypeError, "alerts: expected a list of rules"),
        (print, TypeError, "alerts: expected a list of rules"),
        ([AngleCollapse(), 3], TypeError, "alerts: expected a rule such as"),
        ([AngleCollapse], TypeError, "alerts: expected a rule such as"),
        ([None], TypeError, "alerts: expected a rule such as"),
        ([AngleCollapse(steps=0)], ValueError, "alerts: angle collapse: steps: expected an integer >= 1, got 0"),
        ([AngleCollapse(steps=2.5)], ValueError, "alerts: angle collapse: steps: expected an integer >= 1, got 2.5"),
        ([AngleCollapse(steps=True)], ValueError, "steps: expected an integer >= 1, got True"),
        ([AngleCollapse(name=None)], TypeError, "expected a rule with a name"),
    ],
)
def test_every_rule_is_checked(tmp_path: Path, alerts: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        open_recorder(tmp_path / "new" / "a.jsonl", [], head(), alerts=alerts)
    assert list(tmp_path.iterdir()) == []


def test_on_alert_has_to_be_a_function(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="on_alert: expected a function of an alert, got 'print'"):
        open_recorder(tmp_path / "a.jsonl", [], head(), on_alert="print")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more",
    [{"metadata": {"a": "\ud800"}}, {"metadata": {1: "a", "1": "b"}}, {"run": ""}, {"layers": [3]}, {"schema": 99}],
)
def test_a_header_that_readers_would_refuse_is_not_written(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"surrogate|repeated|run|layers|schema"):
        open_recorder(tmp_path / "a.jsonl", [], {**head(), **more})
    assert list(tmp_path.iterdir()) == []


GOOD = {
    "step": 3,
    "recorder": {"run": "a", "alerts": {"odd": [["blocks.0", 2], [None, 1]]}},
    "engine": {"layers": ["x"]},
}


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ((), [], "expected a dictionary of step, recorder and engine, got list"),
        (("step",), "3", "step: expected an integer >= 0, got '3'"),
        (("step",), True, "step: expected an integer >= 0"),
        (("step",), -1, "step: expected an integer >= 0"),
        (("recorder",), None, "recorder: expected a dictionary, got NoneType"),
        (("recorder", "run"), 5, "recorder: run: expected the id of a run, got 5"),
        (("recorder", "alerts"), [1], "recorder: alerts: expected a dictionary of rules, got list"),
        (("recorder", "alerts", "odd"), 5, "recorder: alerts: 'odd': expected a list"),
        (("recorder", "alerts", "odd"), [["x"]], r"recorder: alerts: 'odd': expected \[layer, number\], got"),
        (("recorder", "alerts", "odd"), [["x", "many"]], r"recorder: alerts: 'odd': expected \[layer, number\], got"),
        (("recorder", "alerts", "odd"), [[["x"], 1]], r"recorder: alerts: 'odd': expected \[layer, number\], got"),
        (("engine",), {}, "engine: expected a dictionary with a list of layers"),
        (("engine", "layers"), ["y"], r"expected a state of the layers \['x'\], got \['y'\]"),
    ],
)
def test_every_entry_of_a_state_is_checked(path: tuple[Any, ...], value: Any, says: str) -> None:
    check_state(GOOD, ["x"], 0)
    state = json.loads(json.dumps(GOOD))
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    if path:
        inner[path[-1]] = value
    else:
        state = value
    with pytest.raises(ValueError, match=f"load_state_dict: {says}"):
        check_state(state, ["x"], 0)


def test_the_state_of_alerts_survives_json() -> None:
    one = recorder(Collecting(), alerts=None)
    one.load_state_dict({"run": "a", "alerts": {"angle collapse": [["blocks.0", 2], [None, 1]], "gone": []}})
    state = json.loads(json.dumps(one.state_dict()))
    assert state["alerts"]["angle collapse"] == [["blocks.0", 2], [None, 1]]
    with pytest.raises(ValueError, match="recorder: alerts: 'angle collapse'"):
        one.load_state_dict({"run": "a", "alerts": {"angle collapse": 3}})
    assert one.state_dict()["alerts"]["angle collapse"] == [["blocks.0", 2], [None, 1]]
    one.close()


# What a failure leaves


def descriptors() -> Any:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


class Shut:
    def __init__(self, error: Any) -> None:
        self.error = error

    def open(self, header: dict[str, Any]) -> None:
        raise self.error

    def write(self, records: list[dict[str, Any]]) -> None:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SystemExit(), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [False, True])
def test_a_failed_attach_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, old: bool
) -> None:
    (tmp_path / "kept.jsonl").write_text("")
    if old:
        one = open_recorder(tmp_path / "x" / "a.jsonl", [f"{tmp_path}/x/b.parquet"], head())
        one.put(measured(0))
        one.close()
    before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    count, threads = descriptors(), threading.active_count()
    sinks = [f"{tmp_path}/x/b.parquet", f"tensorboard:{tmp_path}/x/tb/deep", tmp_path / "kept.jsonl", Shut(error)]
    with pytest.raises(type(error)):
        open_recorder(tmp_path / "x" / "a.jsonl", sinks, head(run="b"))
    assert {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")} == before
    assert (descriptors(), threading.active_count()) == (count, threads)


def test_a_disk_that_is_full_at_the_header_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    for path in (tmp_path / "new" / "a.jsonl", tmp_path / "old.jsonl"):
        (tmp_path / "old.jsonl").write_text("x\n")
        left = [40]

        def full(descriptor: Any, data: Any, left: Any = left) -> Any:
            take = min(left[0], len(data))
            left[0] -= take
            if not take:
                raise OSError(28, "No space left on device")
            return write(descriptor, data[:take])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space left"):
                open_recorder(path, [], head())
        assert [p.name for p in tmp_path.iterdir()] == ["old.jsonl"]
        assert (tmp_path / "old.jsonl").read_text() == "x\n"


def test_a_recorder_can_be_discarded(tmp_path: Path) -> None:
    one = open_recorder(tmp_path / "x" / "a.jsonl", [f"{tmp_path}/b.parquet", f"tensorboard:{tmp_path}/tb"], head())
    threads = threading.active_count()
    one.discard()
    one.discard()
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads - 1


# Several writers of a file


WRITES = """
    import os, sys, warnings
    from tests.helpers.record_cases import *
    from fastfs._monitor.run_record import open_recorder
    warnings.simplefilter("always")
    path, run, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    one = open_recorder(path, [], head(run=run), alerts=(), flush_seconds=0.0)
    print("open", flush=True)
    for step in range(steps):
        one.put(measured(step))
        one.flush()
    sys.stdin.readline()
    one.close()
"""


def start(path: Any, run: Any, steps: int = 0) -> Any:
    code = f"import sys; sys.path.insert(0, {ROOT!r})\n{textwrap.dedent(WRITES)}"
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", code, path, run, str(steps)], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdout.readline() == "open\n"
    return process


@pytest.mark.slow
def test_a_second_process_gets_a_warning_and_no_line_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = start(path, "one", 200)
    with pytest.warns(RuntimeWarning, match="a.jsonl is also being written by another process"):
        one = open_recorder(path, [], head(run="two"), alerts=(), flush_seconds=0.0)
    for step in range(200):
        one.put(measured(step))
        one.flush()
    _, said = first.communicate("\n", timeout=60)
    assert (first.returncode, said) == (0, "")
    one.close()
    table = fastfs.load(path)
    assert table.groupby("run")["step"].unique().map(list).to_dict() == {
        run: list(range(200)) for run in ("one", "two")
    }
    # One after the other: no other process has the file.
    third = start(path, "three")
    assert third.communicate("\n", timeout=60)[1] == ""


def test_a_killed_process_leaves_no_lock_even_if_a_child_lives(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    one = open_recorder(path, [], head(run="one"), alerts=())
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        one.close()
        second = start(path, "two")  # the child has the file open
        second.kill()
        second.communicate(timeout=60)
        third = start(path, "three")
        assert third.communicate("\n", timeout=60)[1] == ""
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    one = open_recorder(tmp_path / "a.jsonl", [], head())
    one.put(measured(0))
    one.close()
    assert len(fastfs.load(tmp_path / "a.jsonl")) == 4


def test_a_line_that_another_writer_left_torn_is_not_written_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    sink = JsonlSink(path)
    sink.open(head())
    sink.write([measured(0)])
    with path.open("ab") as file:
        file.write(b'{"kind":"measured","run":"b","st')
    sink.write([measured(1)])
    sink.close()
    with pytest.warns(RuntimeWarning, match="line 3: cannot be read"):
        assert fastfs.load(path)["step"].unique().tolist() == [0, 1]


def test_two_processes_that_continue_a_run_replace_no_parts(tmp_path: Path) -> None:
    first, second = ParquetSink(tmp_path), ParquetSink(tmp_path)
    for sink in (first, second):
        sink.open(head())
    for step in range(6):
        sink = (first, second)[step % 2]
        sink.write([measured(step)])
        sink.flush()
    first.close()
    second.close()
    assert sorted(fastfs.load(tmp_path)["step"].unique()) == list(range(6))
    assert len(list(tmp_path.iterdir())) == 8


def test_parts_need_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    sink = ParquetSink(tmp_path)
    sink.open(head())
    sink.write([measured(0)])
    sink.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-a-000000.parquet", "part-a-000001.parquet"]


def test_parts_that_are_being_written_are_not_removed(tmp_path: Path) -> None:
    left = tmp_path / ".part-a-000004.abcd.tmp"
    with left.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        sink = ParquetSink(tmp_path)
        sink.open(head())
        assert left.exists()
    sink.open(head(resumed_at=1))
    assert not left.exists()
    sink.close()


def test_a_file_of_this_process_alone_causes_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ones = [open_recorder(path, [path], head(run=run), alerts=()) for run in "ab"]
        fastfs.load(path)
        for one in ones:
            one.put(measured(0))
            one.close()
    assert len(fastfs.load(path)) == 16
