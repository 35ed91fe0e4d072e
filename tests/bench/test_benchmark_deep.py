"""The benchmark of deep networks runs and measures the time of the structure analysis at every call site."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.monitor import depth
from fastfs._network import structure


def test_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    monkeypatch.setattr(torch, "set_num_threads", lambda _threads: None)  # keeps the setting of other tests
    monkeypatch.setattr(sys, "argv", ["deep", "--quick", "--rounds", "1", "--json", str(path)])
    assert depth.main() == 0
    chain, residual = json.loads(path.read_text())["results"]
    assert (chain["workload"], residual["workload"]) == ("chain, 20 x 4", "residual, 40 x 8")
    for result in (chain, residual):
        seconds = result["seconds"]
        assert 0 < seconds["of it structure, first"] < seconds["first measured step"]
        assert seconds["of it structure"] < seconds["measured step"]
        assert result["measured step / step"] == pytest.approx(seconds["measured step"] / seconds["step"])


def test_names_are_given_back() -> None:
    before = structure.analyse, structure.trace, structure.join
    with depth.time_of_structure():
        assert structure.analyse is not before[0]
    assert (structure.analyse, structure.trace, structure.join) == before
