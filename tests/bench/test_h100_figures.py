"""The figures of the README that were measured on an H100 are those of the result files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastfs._bench.ceilings import READ
from fastfs._bench.comparison import HAND, OURS

ROOT = Path(__file__).resolve().parents[2]


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}-h100.json").read_text())
    assert found["environment"]["device"] == "NVIDIA H100 80GB HBM3"
    assert found["environment"]["commit"] == "9069e98"
    return found


def table(first: str) -> list[list[str]]:
    """The cells of a table of the README, by the first cell of its header."""
    text = (ROOT / "README.md").read_text()
    lines = text[text.index(f"| {first} |") :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]


def test_bandwidth() -> None:
    measured = {}
    for result in results("kernels")["results"]:
        if "rows" in result:
            name = result["workload"].replace("1 layer,", "one layer of").replace(" x 64K", " layers of 64K")
            name = re.sub(r"^\d+ rows of (\d+)", r"per row, \1 wide", name)
            measured[f"{name}, {result['dtype']}"] = {row["implementation"]: row for row in result["rows"]}
    rows = table("H100, GB/s")
    assert len(rows) == 8
    for name, read, ours, ratio, norm, hand in rows:
        at = measured[name]
        faster = {key: f"{row['fastfs is faster by']:.2f}" for key, row in at.items() if row["fastfs is faster by"]}
        assert [read, ours] == [f"{at[key]['GB/s']:.0f}" for key in (READ, OURS)]
        assert ratio == f"{at[OURS]['of ceiling']:.2f}"
        assert norm == faster.get("torch._foreach_norm, 3 sums of 8", "")
        assert hand == (f"{float(faster[HAND]):.0f}" if HAND in faster else "")


def test_monitor() -> None:
    ratios = {row["implementation"]: row["ratio"] for row in results("monitor")["results"][0]["rows"]}
    found = [float(ratio) for _, ratio in table("H100")]
    names = [
        "every=100: a step that is not measured",
        "aligned_every=1: a predicted step",
        "measured step",
        "measured step, amplify=True",
        'measured step, mode="jvp"',
        'measured step, mode="probe"',
        "measured step, the naive way",
    ]
    assert found == pytest.approx([ratios[name] for name in names], abs=0.005)
