"""The benchmark of the options that add columns runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.monitor import options


def test_every_variant_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["options", "--quick", "--json", str(path)])
    assert options.main() == 0
    results = json.loads(path.read_text())["results"]
    assert [each["variant"] for each in results] == list(options.VARIANTS)
    assert all(each["ms"] > 0 for each in results)
    assert [each["extra"] is None for each in results] == [without is None for without, _ in options.VARIANTS.values()]
