"""The benchmark of calibrated rates: its summary, and that the committed file agrees with its runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.calibrate.__main__ import STEPS, runs, summary
from benchmarks.calibrate.tasks import SGD
from tests.helpers.source_tree import ROOT


def entries(losses: dict[float | None, float | None], seed: int) -> list[dict[str, Any]]:
    calibration = {"steps": 300 + seed}
    return [
        {"task": "mlp", "size": "base", "seed": seed, "lr": lr, "loss": loss, "calibration": calibration}
        for lr, loss in losses.items()
    ]


def test_the_best_of_the_grid_is_the_best_mean_over_complete_seeds() -> None:
    first = dict(zip((None, *SGD), (0.5, 2.0, 1.0, 0.4, 0.7, None), strict=True))
    second = dict(zip((None, *SGD), (0.9, 2.0, 1.0, 1.4, 0.8, 0.1), strict=True))
    (row,) = summary(entries(first, 0) + entries(second, 1) + entries({None: 0.0}, 2))
    assert row["seeds"] == 2
    assert row["best_grid_lr"] == 0.3  # 1.0 diverged once, and 0.1 is better only once
    assert row["best_grid"] == pytest.approx(0.75)
    assert row["calibrated"] == pytest.approx(0.7)
    assert row["calibrated_spread"] == pytest.approx(0.4 / 2**0.5)
    assert (row["wins"], row["at_least_as_low"]) == (1, True)
    assert (row["calibration_steps"], row["grid_steps"]) == (300.5, 5 * STEPS)


def test_the_committed_file_agrees_with_its_runs() -> None:
    found = json.loads((ROOT / "benchmarks/results/calibrate-cpu.json").read_text())
    assert found["summary"] == summary(found["runs"])
    keys = [(r["task"], r["size"], r["seed"], r["lr"]) for r in found["runs"]]
    assert len(keys) == len(set(keys))
    assert set(keys) <= set(runs(5))
