"""The benchmark of the host time of calls: comparison of versions, and invalid arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ops import call_cost

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.ops.call_cost", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_two_versions_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    done = run("--rounds", "1", "--against", str(ROOT), "--json", str(path))
    assert done.returncode == 0, done.stderr
    table = json.loads(path.read_text())["results"]
    costs = {row["call"]: row for row in table}
    assert call_cost.TARGET[0] in costs
    for row in table:
        if not row["call"].startswith("monitor"):  # these are differences
            assert row["now, us"] > 0
            assert row["before, us"] > 0
    assert costs["feature_stats, 1000 layers"]["now, us"] > costs["feature_stats, 10 layers"]["now, us"]
    assert "feature_stats, 100 layers" in done.stdout


def test_medians_and_ratios_within_a_round() -> None:
    now = [{"a": 1.0}, {"a": 2.0}, {"a": 9.0}]
    before = [{"a": 2.0}, {"a": 8.0}, {"a": 9.0}]
    assert call_cost.rows({"now": now, "before": before}) == [
        {"call": "a", "now, us": 2.0, "before, us": 8.0, "now / before": 0.5}
    ]
    assert call_cost.rows({"now": now}) == [{"call": "a", "now, us": 2.0}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--against", "tests"), "expected a checkout of fastfs, got tests"), (("--rounds", "0"), "expected at least 1")],
)
def test_refusals(arguments: tuple[Any, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_version_that_fails_or_is_not_the_one_asked_for(tmp_path: Path) -> None:
    package = tmp_path / "fastfs"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not built')\n")
    with pytest.raises(RuntimeError, match="not built"):
        call_cost.run_cases(tmp_path, torch.device("cpu"))


def test_the_table_of_the_page_is_that_of_the_file() -> None:
    found = json.loads((ROOT / "benchmarks/results/call_cost-cpu.json").read_text())["results"]
    page = (ROOT / "docs/kernels.md").read_text().splitlines()
    assert [line for line in call_cost.markdown(found) if line not in page] == []
