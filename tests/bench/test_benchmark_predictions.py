"""The study of predicted speeds runs, and its shares follow from records."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.monitor import predictions
from fastfs._core import ops
from fastfs._reproduce.demo import TASKS

pytestmark = pytest.mark.skipif(not ops.native_available(), reason="no native core")


def test_predictions_are_compared_with_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    monkeypatch.setattr(predictions, "TASKS", {"resnet": TASKS["resnet"]})
    monkeypatch.setattr(sys, "argv", ["predictions", "--quick", "--json", str(path)])
    assert predictions.main() == 0
    often, rarely = json.loads(path.read_text())["results"]
    assert (often["every"], rarely["every"]) == (5, 20)
    assert often["predictions"] == 36 * 24
    assert 0.4 < often["shown"] < 0.6  # after the fifth measured step
    assert often["within the factor"] > 0.6
    assert 1 < often["80 % of the shown are within"] < often["80 % of the withheld are within"]
    assert rarely["predictions"] == 42 * 24
    assert rarely["shown"] == 0  # three measured steps
    assert rarely["within the factor"] is rarely["median factor"] is None
