"""The benchmarks run; round robin, budgets and GPU timing."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import harness
from benchmarks.ops import feature_stats, gather_rows, implementations, targets, workloads
from benchmarks.ops import optimizer_stats as updates_benchmark
from fastfs._bench import timing
from fastfs._bench.ceilings import COPY, READ
from fastfs._bench.comparison import COMPILE, EAGER, HAND, NORMS, OURS
from fastfs._bench.expected import expected_sums
from fastfs._bench.inputs import COLD
from fastfs._core import ops

ROOT = Path(__file__).resolve().parents[2]

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.skipif(not ops.native_available(), reason="no native core")
def test_quick_benchmark_of_feature_stats(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    command = [sys.executable, "-m", "benchmarks.ops.feature_stats", "--quick", "--rounds", "3", "--json", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert written["environment"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", written["environment"]["date"])
    overhead, *measured = written["results"]
    assert set(overhead["microseconds"]) == {"1 layer", "100 layers"}
    expected = {
        (part, w.name, w.dtype)
        for part in workloads.PARTS
        for w in workloads.workloads(part, CPU, largest=2**30, free=2**34, quick=True)
    }
    assert {(r["part"], r["workload"], r["dtype"]) for r in measured} == expected
    compiled = 0
    for result in measured:
        rows = {row["implementation"]: row for row in result["rows"]}
        assert rows.keys() >= {READ, OURS, HAND, EAGER}
        assert (COPY in rows) == (result["part"] == workloads.LADDER)
        assert (NORMS in rows) == (not result["per row"])
        assert result["left out"][implementations.TRITON] == "for GPUs only"
        compiled += COMPILE in rows
        assert (COMPILE in rows) != (COMPILE in result["left out"])
        assert all(row["milliseconds"] > 0 for row in rows.values())
        assert rows[OURS]["fastfs is faster by"] == 1
        assert rows[OURS]["error"] <= 2e-6
        assert all(row["error"] < 1e-3 for name, row in rows.items() if row.get("error") is not None)
        assert result["bytes"] * result["copies"] >= COLD * written["environment"]["cache_bytes"]
    assert compiled > 0
    assert len(re.findall(r"^      .*(>=|<=) ", done.stdout, re.MULTILINE)) == len(targets.targets(measured))
    plotted = tmp_path / "plot.png"
    command = [sys.executable, "-m", "benchmarks.ops.plot", str(path), str(plotted)]
    assert subprocess.run(command, cwd=ROOT, timeout=300).returncode == 0
    assert plotted.read_bytes().startswith(b"\x89PNG")


def test_parts_are_chosen_by_name() -> None:
    assert feature_stats.chosen("rows,ladder") == ["ladder", "rows"]
    assert feature_stats.chosen(None) == ["overhead", *workloads.PARTS]
    with pytest.raises(argparse.ArgumentTypeError, match="no part stairs; expected overhead, ladder"):
        feature_stats.chosen("stairs,rows")


def test_full_size_has_what_is_asked_for() -> None:
    gpu = torch.device("cuda")
    every = {
        part: workloads.workloads(part, gpu, largest=2**32, free=75 * 2**30, quick=False) for part in workloads.PARTS
    }
    ladder = every[workloads.LADDER]
    for dtype, size in itertools.product(workloads.DTYPES, (2**12, 2**25, 2**28, 2**32)):
        assert [w for w in ladder if w.dtype == dtype and 0.9 * size <= w.bytes <= size], (dtype, size)
    names = {w.name for w in every[workloads.LISTS]}
    assert {"1 x 64K", "10 x 64K", "100 x 64K", "1000 x 64K"} <= names
    assert {w.shapes[0][-1] for w in every[workloads.ROWS]} == {1024, 2048, 4096, 8192, 16384}
    whole = [w for w in every[workloads.TRANSFORMERS] if w.dtype == "bfloat16"]
    assert [len(w.shapes) for w in whole] == [48, 64, 128]
    assert not any(w.cut for w in whole)
    (mixed,) = [w for w in every[workloads.TRANSFORMERS] if w.cut]
    assert mixed.bytes <= 75 * 2**29
    assert "of 32 blocks" in mixed.cut
    here = workloads.workloads(workloads.TRANSFORMERS, CPU, largest=2**30, free=16 * 2**30, quick=False)
    assert [w.cut for w in here if w.name.startswith("transformer 7B")] == [
        "1 of 32 blocks, 1 GiB at most",
        "1 of 32 blocks, 1 GiB at most",
    ]


def measured(part: str, workload: str, dtype: str, size: float, layers: int = 1, **rows: float) -> dict[str, Any]:
    """Return an invented result with the speedups of fastfs and `ours`, its fraction of the ceiling."""
    names = {
        "compile": COMPILE,
        "less": implementations.LESS,
        "cooperative": implementations.COOPERATIVE,
        "eager": EAGER,
    }
    found = [{"implementation": OURS, "of ceiling": rows.pop("ours"), "fastfs is faster by": 1.0}]
    found += [{"implementation": names[k], "of ceiling": 0.1, "fastfs is faster by": v} for k, v in rows.items()]
    return {
        "part": part,
        "workload": workload,
        "dtype": dtype,
        "bytes": int(size),
        "layers": layers,
        "per row": part == workloads.ROWS,
        "rows": found,
    }


def test_targets_are_about_the_worst() -> None:
    good = [
        {"part": "overhead", "microseconds": {"1 layer": 5.0, "100 layers": 39.0}},
        measured("ladder", "32 MiB", "bfloat16", 2**25, ours=0.86, compile=1.2, eager=9.0),
        measured("ladder", "256 MiB", "float32", 2**28, ours=0.96, compile=1.1, less=0.9, cooperative=1.05, eager=4.0),
        measured("ladder", "4 KiB", "bfloat16", 2**12, ours=0.2, compile=2.0, eager=5.0),
        measured("lists", "1000 x 64K", "float32", 786e6, 1000, ours=0.75, compile=3.1),
        measured("lists", "100 x 64K", "float32", 78e6, 100, ours=0.6, compile=5.0),
        measured("rows", "rows of 1024", "bfloat16", 2**28, ours=0.94, compile=1.3, eager=3.0),
    ]
    found = targets.targets(good)
    assert [target.found for target in found] == [0.96, 0.86, 0.75, 0.94, 1.05, 3.1, 9.0, 39.0]
    assert all(target.passed for target in found)
    assert found[0].where == "256 MiB, float32; 1 of 1 workloads"

    bad = [
        {"part": "overhead", "microseconds": {"1 layer": 5.0, "100 layers": 41.0}},
        measured("ladder", "32 MiB", "bfloat16", 2**25, ours=0.84, compile=0.9, eager=7.0),
        measured("transformers", "7B", "bfloat16", 36e9, 128, ours=0.94, compile=1.2, eager=9.0),
        measured("lists", "1000 x 64K", "float32", 786e6, 1000, ours=0.69, compile=2.9),
        measured("rows", "rows of 1024", "bfloat16", 2**28, ours=0.92, compile=1.3),
    ]
    assert [target.passed for target in targets.targets(bad)] == [False] * 8
    assert {target.passed for target in targets.targets([])} == {None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "gpu"], "expected cpu or cuda, got 'gpu'"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--rounds", "0"], "expected at least 1, got 0"),
        (["--json", "."], "expected a file, got the folder ."),
    ],
)
def test_options_are_refused_before_anything_is_measured(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *options])
    with pytest.raises(SystemExit):
        harness.command_line("", quick="")
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_measured_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that fails or is killed loses only the current workload."""
    path = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--rounds", "3", "--only", "lists", "--json", str(path)])
    bandwidth = feature_stats.bandwidth
    done: list[Any] = []

    def fails(*arguments: Any) -> dict[str, Any]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(bandwidth(*arguments))
        return done[-1]

    monkeypatch.setattr(feature_stats, "bandwidth", fails)
    monkeypatch.setattr(feature_stats, "QUICK_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        feature_stats.main()
    names = [r["workload"] for r in json.loads(path.read_text())["results"]]
    assert names == [r["workload"] for r in done]
    assert len(names) == 2


def test_the_budget_for_compiling_ends() -> None:
    budget = feature_stats.Budget(10)
    assert budget.why_not() is None
    budget.spent = 10
    assert "10 s for compiling" in str(budget.why_not())
    (inputs,) = workloads.Workload("", [(64,)]).inputs(CPU)
    never = implementations.Implementation(lambda _: pytest.fail("it was compiled"), compiles=True)
    calls, _, why = feature_stats.prepare("x", never, [inputs], expected_sums(inputs), CPU, budget)
    assert (calls, why) == ([], budget.why_not())


TRITON = """
import torch
from benchmarks.ops.triton_kernels import Kernels
from benchmarks.ops.workloads import DTYPES
from fastfs._bench.inputs import make_inputs
from fastfs._bench.expected import expected_sums

cpu = torch.device("cpu")
kernels = Kernels(cpu)
for dtypes in DTYPES.values():
    (inputs,) = make_inputs([(70_000,), (16, 1024), (333,), (2**14,)], dtypes, cpu)
    for way in (kernels.per_layer, kernels.all_layers):
        error = expected_sums(inputs).error(way(inputs)())
        assert error < 1e-6, (dtypes, way, error)
    inputs[1][0][5] = float("inf")
    assert [int(way(inputs)()[0, 7]) for way in (kernels.per_layer, kernels.all_layers)] == [1, 1]
    (rows,) = make_inputs([(5, 1024), (7, 1600), (3, 5000)], dtypes, cpu)
    error = expected_sums(rows, per_row=True).error(kernels.per_row(rows)())
    assert error < 1e-6, (dtypes, error)
"""


def test_triton_takes_the_same_sums() -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed; the kernels for the comparison are not run")
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if old and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip(f"the interpreter of triton {triton.__version__} cannot work with NumPy {np.__version__}")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", TRITON], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not ops.native_available(), reason="no native core")
def test_quick_benchmark_of_gather_rows(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.ops.gather_rows", "--quick", "--rounds", "3", "--json", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())["results"]
    assert [r["workload"] for r in results] == [w.name for w in gather_rows.workloads(quick=True)]
    for result in results:
        names = [gather_rows.CEILING, gather_rows.OURS, gather_rows.SQUARES, gather_rows.EAGER]  # type: ignore[attr-defined]
        assert [row["implementation"] for row in result["rows"]] == names
        assert all(row["microseconds"] > 0 for row in result["rows"])
        assert result["rows"][1]["fastfs is faster by"] == 1
        assert result["error"] <= 2e-6


def test_rows_are_taken_from_memory() -> None:
    workload = gather_rows.Workload((2, 64, 64), 16, torch.float32, torch.float32)
    sets = workload.make(CPU, 2**15)
    assert len(sets) == 4 * 2**15 // (16 * 64 * 4)
    assert len({x.data_ptr() for x, _ in sets}) == 4  # 8 sets of the 128 rows of each
    for start in range(0, len(sets), 8):
        together = torch.cat([rows for _, rows in sets[start : start + 8]])
        assert together.unique().numel() == 128
    assert len(workload.make(CPU, 1)) == 1


@pytest.mark.slow
@pytest.mark.skipif(not ops.native_available(), reason="no native core")
def test_quick_benchmark_of_updates(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.ops.optimizer_stats", "--quick", "--rounds", "3", "--json", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    state, updates = json.loads(path.read_text())["results"]
    assert (state["op"], updates["op"]) == ("optimizer_stats", "update_stats")
    names = [READ, OURS, COMPILE, updates_benchmark.FOREACH, EAGER]
    assert [row["implementation"] for row in updates["rows"]] == names
    assert [row["implementation"] for row in state["rows"]] == names
    for row in state["rows"] + updates["rows"]:
        assert row["milliseconds"] > 0
        assert row["implementation"] in done.stdout
        assert row["implementation"] != OURS or row["error"] <= 2e-6


def test_turns_are_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    takers: dict[str, Callable[[], object]] = {name: lambda n=name: calls.append(n) for name in "abc"}  # type: ignore[misc]

    def timer(call: Callable[[], object], device: torch.device, repeat: int) -> float:
        call()
        return float(repeat)

    times = harness.side_by_side(takers, torch.device("cpu"), 8, 2, float("inf"), timer=timer)
    assert times == {name: [2.0] * 8 for name in "abc"}
    rounds = ["".join(calls[i : i + 3]) for i in range(3, 27, 3)]
    assert all(sorted(turn) == list("abc") for turn in rounds)
    assert len(set(rounds)) > 2


def test_turns_and_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    takers: dict[str, Callable[[], object]] = {name: lambda n=name: calls.append(n) for name in ("slow", "quick")}  # type: ignore[misc]

    def time_call(call: Callable[[], object], device: torch.device, repeat: int) -> float:
        call()
        return 1.0 if calls[-1] == "slow" else 0.25

    monkeypatch.setattr(timing, "time_call", time_call)
    times = harness.side_by_side(takers, torch.device("cpu"), rounds=6, repeat=2, budget=4.0)
    assert times == {"slow": [1.0] * 3, "quick": [0.25] * 6}
    assert calls[:2] == ["slow", "quick"]
    assert [sorted(calls[i : i + 2]) for i in (2, 4, 6)] == [["quick", "slow"]] * 3
    assert calls[8:] == ["quick"] * 3
    assert harness.median_ratio(times, "slow", "quick") == 4


def test_gpu_waits_until_all_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a GPU that only records calls."""
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
