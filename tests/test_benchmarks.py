"""The benchmarks run; turns, budgets and the clock of the GPU."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import feature_stats, gather_rows, harness
from fastfs import ops

ROOT = Path(__file__).resolve().parent.parent

CONTESTANTS = [
    "streaming read",
    "fastfs",
    "torch.compile",
    "torch.compile, no rounding_sq",
    "eager by hand",
    "eager (reference)",
]


@pytest.mark.slow
@pytest.mark.skipif(not ops.native_available(), reason="no native core")
def test_quick_benchmark_of_feature_stats(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    command = [sys.executable, "-m", "benchmarks.feature_stats", "--quick", "--rounds", "3", "--json", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # otherwise everything is compiled for two numbers of threads
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert written["environment"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", written["environment"]["date"])
    overhead, *measured = written["results"]
    assert set(overhead["microseconds"]) == {"1 layer", "100 layers"}
    names = {workload.name for workload in feature_stats.workloads(quick=True)}
    assert {(r["workload"], r["dtype"]) for r in measured} == {(n, d) for n in names for d in ("float32", "bfloat16")}
    for result in measured:
        assert [row["contestant"] for row in result["rows"]] == CONTESTANTS
        for row in result["rows"]:
            assert row["milliseconds"] > 0
            assert row["contestant"] in done.stdout
        ours = result["rows"][1]
        assert ours["fastfs is faster by"] == 1
        assert ours["error"] <= 2e-6


@pytest.mark.skipif(not ops.native_available(), reason="no native core")
def test_quick_benchmark_of_gather_rows(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.gather_rows", "--quick", "--rounds", "3", "--json", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())["results"]
    assert [r["workload"] for r in results] == [w.name for w in gather_rows.workloads(quick=True)]
    for result in results:
        contestants = [gather_rows.CEILING, gather_rows.OURS, gather_rows.SQUARES, gather_rows.EAGER]
        assert [row["contestant"] for row in result["rows"]] == contestants
        assert all(row["microseconds"] > 0 for row in result["rows"])
        assert result["rows"][1]["fastfs is faster by"] == 1
        assert result["error"] <= 2e-6


@pytest.mark.slow
@pytest.mark.skipif(not ops.native_available(), reason="no native core")
def test_quick_benchmark_of_updates(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.updates", "--quick", "--rounds", "3", "--json", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(path.read_text())["results"]
    names = ["streaming read", "fastfs", "UpdateMeter", "torch.compile", "eager by hand, foreach"]
    assert [row["contestant"] for row in result["rows"]] == names
    assert all(row["milliseconds"] > 0 and row["contestant"] in done.stdout for row in result["rows"])


def test_turns_are_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    contestants: dict[str, Callable[[], object]] = {name: lambda n=name: calls.append(n) for name in "abc"}

    def timer(call: Callable[[], object], device: torch.device, repeat: int) -> float:
        call()
        return float(repeat)

    times = harness.side_by_side(
        contestants, torch.device("cpu"), 8, 2, float("inf"), shuffle=random.Random(0), timer=timer
    )
    assert times == {name: [2.0] * 8 for name in "abc"}
    rounds = ["".join(calls[i : i + 3]) for i in range(3, 27, 3)]
    assert all(sorted(turn) == list("abc") for turn in rounds)
    assert len(set(rounds)) > 2


def test_turns_and_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    contestants: dict[str, Callable[[], object]] = {name: lambda n=name: calls.append(n) for name in ("slow", "quick")}

    def time_call(call: Callable[[], object], device: torch.device, repeat: int) -> float:
        call()
        return 1.0 if calls[-1] == "slow" else 0.25

    monkeypatch.setattr(harness, "time_call", time_call)
    times = harness.side_by_side(contestants, torch.device("cpu"), rounds=6, repeat=2, budget=4.0)
    assert times == {"slow": [1.0] * 3, "quick": [0.25] * 6}
    assert calls == ["slow", "quick"] * 4 + ["quick"] * 3
    assert harness.median_ratio(times, "slow", "quick") == 4


def test_gpu_waits_until_all_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU that only writes down what it is told."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 6.0

    def sleep(cycles: int) -> None:
        assert cycles >= 3_000_000
        log.append("sleep")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    assert harness.time_call(lambda: log.append("call"), torch.device("cuda"), repeat=3) == pytest.approx(2e-3)
    waited = log.index("sleep")
    assert log[waited - 1] == "synchronize"
    assert log[waited:] == ["sleep", "event", "call", "call", "call", "event", "synchronize"]
