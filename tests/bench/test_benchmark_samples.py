"""The comparison of ``samples=`` with whole batches runs, and its figures follow from the records."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.monitor import samples
from fastfs._core import ops

pytestmark = pytest.mark.skipif(not ops.native_available(), reason="no native core")


def test_a_model_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    monkeypatch.setattr(samples, "CASES", (("resnet", 128),))
    monkeypatch.setattr(samples, "MODES", {"batch": {}})
    monkeypatch.setattr(sys, "argv", ["samples", "--quick", "--json", str(path)])
    assert samples.main() == 0
    (result,) = json.loads(path.read_text())["results"]
    assert result["layers x steps"] == 2 * 24
    assert result["valid, samples"] == result["valid, whole batch"] == 48
    assert result["expected within 2 standard errors"] == pytest.approx(0.9524, abs=1e-3)
    for key in samples.ERRORS:
        assert 0.5 < result[key]["within 2 standard errors"] <= 1.0
        assert result[key]["median of standard error"] > 0
