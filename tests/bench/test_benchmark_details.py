"""The benchmark of ``details=True`` runs, and the committed figures meet its target."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.monitor import details
from tests.helpers.source_tree import ROOT


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["details", "--quick", "--json", str(path)])
    assert details.main() == 0
    (result,) = json.loads(path.read_text())["results"]
    assert [row["implementation"] for row in result["rows"]] == list(details.NAMES)
    assert len(result["rounds of it"]) == 2


def test_the_committed_figures_meet_the_target() -> None:
    (result,) = json.loads((ROOT / "benchmarks/results/details-cpu.json").read_text())["results"]
    assert result["target"] == {"most": details.MOST, "pass": True}
    assert sorted(result["rounds of it"])[len(result["rounds of it"]) // 2] <= details.MOST
