"""The benchmark of the monitor and the timeline run and count correctly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType

from benchmarks.monitor import cost, profiles, timeline, trainings
from benchmarks.monitor.__main__ import targets
from fastfs._core import ops

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

pytestmark = pytest.mark.skipif(not ops.native_available(), reason="no native core")


def quick(module: str, path: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Return the single result of a benchmark and its output."""
    command = [sys.executable, "-m", module, "--quick", "--rounds", "2", "--json", str(path), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    (result,) = json.loads(path.read_text())["results"]
    return result, done.stdout


FEW = [trainings.PLAIN, trainings.AGAIN, trainings.OFF, trainings.ALIGNED, trainings.EVERY, trainings.WINDOW]
MANY = [
    trainings.MEASURED,
    trainings.MEASURED_FEW,
    trainings.AMPLIFIED,
    trainings.AMPLIFIED_FEW,
    trainings.JVP,
    trainings.JVP_FEW,
    trainings.PROBE,
    trainings.PROBE_FEW,
]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.graphs)])
def test_quick(tmp_path: Path, compiled: bool) -> None:
    result, printed = quick("benchmarks.monitor", tmp_path / "result.json", *(["--compile"] if compiled else []))
    rows = {row["implementation"]: row for row in result["rows"]}
    assert list(rows) == [*FEW, *(MANY[:1] if compiled else [*MANY, trainings.NAIVE])]
    assert all(row["milliseconds"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert all(row["overhead percent"] == pytest.approx(100 * row["ratio"] - 100, abs=0.02) for row in rows.values())
    assert all(row["host synchronizations per step"] is None for row in rows.values())
    assert rows[trainings.PLAIN]["ratio"] == 1
    amortized = 0.99 * rows[trainings.OFF]["ratio"] + 0.01 * rows[trainings.MEASURED]["ratio"]
    assert rows[trainings.EVERY]["ratio"] == pytest.approx(amortized, abs=2e-4)
    if not compiled:
        assert rows[trainings.MEASURED]["peak MiB"] > rows[trainings.PLAIN]["peak MiB"] > 0
    assert result["differences of naive implementation and monitor"]["angle, all rows"] <= 1e-5
    assert result["parameters"] > 100_000
    assert [target["implementation"] for target in result["targets"]] == [
        trainings.EVERY,
        trainings.ALIGNED,
        trainings.MEASURED,
    ]
    assert len(re.findall(r"^(PASS|FAIL)  ", printed, re.MULTILINE)) == 3


@pytest.mark.slow
def test_timeline(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result, printed = quick("benchmarks.monitor.timeline", path)
    assert path.stat().st_size < 30_000
    assert result["steps"] == 2
    found = {kind: {row["name"]: row for row in result[kind]["fastfs"]["by name"]} for kind in timeline.KINDS}
    assert found[trainings.PLAIN] == found[trainings.OFF] == {}
    assert found[trainings.ALIGNED]["fastfs::optimizer_stats"]["count"] == 1
    assert found[trainings.MEASURED]["fastfs::feature_stats_per_row"]["count"] >= 1
    for kind in timeline.KINDS:
        assert kind in printed
        assert len(result[kind]["top 10"]) == 10
        assert 0 < result[kind]["operators"]["us"] <= result[kind]["host us"]


def test_workloads() -> None:
    load = trainings.workload(False, CUDA, compiled=True)
    model = trainings.Transformer(load.vocabulary, load.width, load.depth, load.heads, load.context)  # type: ignore[attr-defined]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(124e6, rel=0.005)
    assert "bfloat16 autocast, torch.compile" in load.name
    assert load.smaller(4).batch == 4
    assert load.smaller(100) == load
    tokens, targets = next(trainings._batches(load.smaller(2)))
    assert tokens.shape == targets.shape == (2, 1024)
    assert 256 < tokens.max() < load.vocabulary


def test_targets_on_a_gpu() -> None:
    """Waits for the device are a target, regardless of the speed of steps."""
    row = {"ratio": 1.0, "host synchronizations per step": 0.5}
    rows = {name: dict(row) for name in (*FEW, *MANY)}
    assert all(target["pass"] for target in targets(rows, CUDA))
    assert len(targets(rows, CUDA)) == 10
    rows[trainings.ALIGNED]["host synchronizations per step"] = 0.75
    failed = [target for target in targets(rows, CUDA) if not target["pass"]]
    assert [target["implementation"] for target in failed] == [trainings.ALIGNED]
    assert failed[0]["more host synchronizations per step"] == 0.25


def test_storages_are_counted_while_they_live() -> None:
    with cost.Storages() as storages:
        x = torch.zeros(1000)
        for _ in range(5):
            y = x.view(10, 100).T + 1
        assert storages.peak == 3 * 4000  # x, y, and the next y
        del y
        z = torch.zeros(1500)
    assert storages.peak == 3 * 4000
    assert z.numel() == 1500


def test_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a device that only records calls."""
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    assert cost.count_waits(call, 3) == 3
    assert modes == ["warn", 0]
    with pytest.raises(ZeroDivisionError):
        cost.count_waits(lambda: 1 // 0, 3)
    assert modes[2:] == ["warn", 0]


def event(name: str, start: float, stop: float, device: DeviceType = DeviceType.CUDA, annotation: bool = False) -> Any:
    time_range = SimpleNamespace(start=start, end=stop, elapsed_us=lambda: stop - start)
    return SimpleNamespace(name=name, time_range=time_range, device_type=device, is_user_annotation=annotation)


def test_summary_of_a_gpu() -> None:
    kernel = "void fastfs::cuda::segment_sums<fastfs::FeatureSums, float>"
    events = [
        event(profiles.STEPS, 0, 100, DeviceType.CPU, annotation=True),
        event(profiles.STEPS, 12, 90, annotation=True),
        event("Optimizer.step#AdamW.step", 12, 90, annotation=True),
        event("cudaStreamSynchronize", 20, 23, DeviceType.CPU),
        event("cudaMemcpyAsync", 24, 25, DeviceType.CPU),
        event("cudaDeviceSynchronize", 101, 150, DeviceType.CPU),  # of the profiler
        event("gemm", 10, 30),
        event(kernel, 40, 44),
        event(kernel, 42, 46),  # on another stream
        event("Memcpy DtoH (Device -> Pinned)", 50, 56),
        event("Memset (Device)", 56, 57),
    ]
    found = profiles.summary(events, 2, CUDA)
    assert found["device"] == {"count": 2.5, "us": 17.5}
    assert found["kernels"] == {"count": 1.5, "us": 14.0}
    assert found["fastfs"] == {"count": 1.0, "us": 4.0, "by name": [{"name": kernel, "count": 1.0, "us": 4.0}]}
    assert found["copies"]["by name"][0] == {"name": "Memcpy DtoH (Device -> Pinned)", "count": 0.5, "us": 3.0}
    assert found["waits"]["by name"] == [{"name": "cudaStreamSynchronize", "count": 0.5, "us": 1.5}]
    assert found["idle us"] == (10 + 4) / 2
    assert [row["name"] for row in found["top 10"]] == ["gemm", kernel]
