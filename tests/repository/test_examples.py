"""The examples run unchanged, and their results agree with their text."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_deep_mlp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(EXAMPLES / "deep_mlp.py"))
    assert (tmp_path / "runs/deep_mlp.png").stat().st_size > 10_000
    last = {name: (found[name].stats.angle[-1], found[name].sensitivity[-1]) for name in ("measured", "corrected")}
    assert 15 < last["measured"][1] < 25  # "S is twenty"
    assert last["corrected"][1] < 6
    assert last["measured"][0] > 1.45  # the angle "tends to pi/2"
    assert found["residual"].stats.angle[-1] < 1.45
    contribution = found["measured"].contribution
    steps = contribution[1:] / contribution[:-1]
    assert ((steps > 0.5) & (steps < 2)).all()
    loss = {name: found[f"best_{name}"][0] for name in ("mup", "fsc", "calibrated", "resnet")}
    assert loss["mup"] > 1.0  # "no factor works"
    assert loss["fsc"] < 0.5 * loss["mup"]
    assert loss["calibrated"] < 0.5 * loss["mup"]
    assert loss["resnet"] < loss["fsc"]


def test_train_fsdp2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(EXAMPLES / "train_fsdp2.py"))
    table = found["table"]
    assert sorted(table["step"].unique()) == list(range(found["STEPS"]))
    assert table.loc[table["step"] == found["STEPS"] - 1, "loss"].max() < 0.7 * table["loss"].iloc[0]
    assert "blocks.1" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "runs/train_fsdp2").iterdir()] == ["record.jsonl"]
