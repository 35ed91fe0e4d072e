"""The demo at small size: data, paired trainings, files, and folders with other files."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fastfs._cli.app import app
from fastfs._record.reading.load import load, read_header
from fastfs._reproduce import data
from fastfs._reproduce.demo import TASKS, OutputError, _overhead, run_demo

# Data


def test_the_text_is_the_standard_library_and_the_same_every_time() -> None:
    text = data.stdlib_text(300_000)
    again = data.stdlib_text(300_000)
    assert text.tokens.dtype == torch.uint8
    assert text.tokens.shape == (300_000,)
    assert text.sha256 == again.sha256
    assert torch.equal(text.tokens, again.tokens)
    assert 2 <= text.files < 100
    assert b"import" in bytes(text.tokens.tolist())


def test_windows_are_followed_by_their_next_tokens() -> None:
    text = data.Text(torch.arange(100, dtype=torch.uint8), files=1, sha256="")
    batches = data.windows(text, batch=4, length=9, seed=0)
    for _ in range(20):
        tokens, following = next(batches)
        assert tokens.shape == following.shape == (4, 9)
        assert torch.equal(tokens + 1, following)
        assert following.max() <= 99
    first = next(data.windows(text, batch=4, length=9, seed=1))[0]
    assert torch.equal(first, next(data.windows(text, batch=4, length=9, seed=1))[0])


def test_digits_are_standardized_and_batches_cover_an_epoch() -> None:
    inputs, labels = data.digits()
    assert inputs.shape == (1797, 64)
    assert sorted(set(labels.tolist())) == list(range(10))
    assert inputs.mean().abs() < 1e-5
    assert abs(inputs.std().item() - 1) < 1e-5
    numbers = torch.arange(10.0).reshape(10, 1)
    batches = data.minibatches(numbers, torch.arange(10), batch=3, seed=0)
    epoch = [next(batches) for _ in range(3)]
    assert len({int(v) for x, _ in epoch for v in x}) == 9
    assert all(torch.equal(x[:, 0].long(), y) for x, y in epoch)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.stdlib_text(0), "max_bytes"),
        (lambda: next(data.windows(data.Text(torch.zeros(5, dtype=torch.uint8), 1, ""), 1, 5, 0)), "too short"),
        (lambda: next(data.minibatches(torch.zeros(3, 1), torch.zeros(3), 4, 0)), "batch: expected 1 to 3, got 4"),
    ],
)
def test_bad_sizes_are_refused(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# The run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Return a smaller version of the transformer task."""
    from fastfs.models import Transformer

    def model() -> Any:
        return Transformer(vocabulary=256, width=32, depth=2, heads=2, context=128, dropout=0.1)

    monkeypatch.setitem(TASKS, "transformer", dataclasses.replace(TASKS["transformer"], model=model))


@pytest.mark.slow
def test_both_models_end_to_end(tmp_path: Path, small: None) -> None:
    threads = torch.get_num_threads()
    out, printed = tmp_path / "new" / "demo", io.StringIO()
    summary = run_demo(list(TASKS), steps=12, every=5, out=out, console=Console(file=printed, width=100))
    assert summary == json.loads((out / "summary.json").read_text())
    assert sorted(summary["tasks"]) == ["resnet", "transformer"]
    for name, layers in (("transformer", 2), ("resnet", 24)):
        task = summary["tasks"][name]
        every_step = load(out / name / "record.jsonl")
        table = every_step[every_step["kind"] == "measured"]
        assert sorted(table["step"].unique()) == [0, 5, 10]
        assert len(table) == 3 * layers
        assert table["valid"].all()
        assert table["loss"].notna().all()
        assert table["angle"].between(0.0, 2.0).all()
        assert task["bitwise_equal"] is True
        assert task["loss_last"] < task["loss_first"]
        assert [row["name"] for row in task["layers"]] == [f"blocks.{i}" for i in range(layers)]
        assert task["overhead"]["measured_step_ratio"] > 0
        assert all((out / file).exists() for file in task["files"])
        assert len(task["files"]) == 5
        assert all(row["aligned_decrease"] > 0 and row["predicted_update_rms"] > 0 for row in task["layers"])
        assert sorted(every_step["step"].unique()) == list(range(12))
        assert every_step[every_step["kind"] == "predicted"]["aligned_decrease"].notna().all()
        assert "fastfs report" in (out / name / "report.html").read_text()
    assert read_header(out / "transformer" / "record.jsonl")["metadata"]["bytes"] == 4_000_000
    assert torch.get_num_threads() == threads
    text = printed.getvalue()
    for expected in ("angle (rad)", "blocks.1", "bitwise equal", "a measured step takes", "What the numbers mean"):
        assert expected in text

    # A second run overwrites its own files and keeps others.
    (out / "mine.txt").write_text("mine")
    run_demo(["resnet"], steps=2, every=1, out=out, console=Console(file=io.StringIO()))
    assert (out / "mine.txt").read_text() == "mine"
    assert sorted(load(out / "resnet" / "record.jsonl")["step"].unique()) == [0, 1]
    assert (out / "transformer" / "record.jsonl").exists()


@pytest.mark.gpu
def test_on_the_gpu(tmp_path: Path, small: None) -> None:
    console = Console(file=io.StringIO())
    summary = run_demo(list(TASKS), steps=12, every=5, out=tmp_path, device=torch.device("cuda"), console=console)
    assert summary["device"] == torch.cuda.get_device_name(0)
    for name, layers in (("transformer", 2), ("resnet", 24)):
        assert summary["tasks"][name]["bitwise_equal"] is True
        table = load(tmp_path / name / "record.jsonl")
        assert table[table["kind"] == "measured"]["valid"].sum() == 3 * layers
        assert (tmp_path / name / "angle.png").stat().st_size > 1000


@pytest.mark.parametrize("device", ["meta", "gpu", "cuda:99"])
def test_a_device_that_is_not_there(tmp_path: Path, device: str) -> None:
    result = CliRunner().invoke(app, ["demo", "--device", device, "--out", str(tmp_path / "demo")])
    assert result.exit_code == 1
    assert "fastfs demo: --device" in result.output
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("name", ["summary.json", "resnet/record.jsonl", "resnet/angle.png", "resnet/report.html"])
def test_files_of_others_are_not_overwritten(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(
        OutputError, match=f"not written by an earlier fastfs demo, and would be overwritten: .*{path.name}"
    ):
        run_demo(["resnet"], steps=1, every=1, out=tmp_path, console=Console(file=io.StringIO()))
    assert path.read_text() == "mine"
    assert len(list(tmp_path.rglob("*.*"))) == 1


@pytest.mark.parametrize("name", ["", "resnet"])
def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    path = out / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists and is not a folder"):
        run_demo(["resnet"], steps=1, every=1, out=out, console=Console(file=io.StringIO()))


def test_overhead_compares_medians_over_the_same_steps() -> None:
    cost = _overhead(plain=[9.0, 1.0, 1.0, 3.0, 1.0, 1.0], watched=[18.0, 1.0, 1.0, 6.0, 1.0, 1.0], every=3)
    assert cost["measured_step_ratio"] == 2.0
    assert cost["other_step_ratio"] == 1.0
    assert cost["total"] == pytest.approx(1 / 3)
    assert cost["total_at_100"] == pytest.approx(0.01)
    assert _overhead([1.0, 1.0], [2.0, 2.0], every=1)["total"] == pytest.approx(1.0)
