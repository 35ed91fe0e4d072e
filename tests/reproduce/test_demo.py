"""The demo at small size: data, paired trainings, files, and folders with other files."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fastfs._cli.app import app
from fastfs._record.reading.confidence import LARGEST_FACTOR
from fastfs._record.reading.load import load, read_header
from fastfs._report.page import page_data
from fastfs._reproduce import data
from fastfs._reproduce.demo import TASKS, OutputError, run_demo
from fastfs._reproduce.demo_text import training_progress
from fastfs._reproduce.step_times import step_time_ratio

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


@pytest.mark.parametrize("package", ["matplotlib", "pandas", "sklearn"])
def test_a_missing_package_is_reported_before_the_first_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["demo", "--steps", "1", "--out", str(out)])
    assert result.exit_code == 1
    assert result.output == f'fastfs demo: the demo needs {package}: pip install "fastfs[demo]"\n'
    assert not out.exists()


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
        cost = task["step_time_ratio"]
        assert (cost["measured_pairs"], cost["other_pairs"]) == (3, 9)
        assert cost["at_this_every"] == pytest.approx((cost["measured_step"] + 4 * cost["other_step"]) / 5)
        # The record, its page and what was printed have the same numbers.
        assert read_header(out / name / "record.jsonl")["metadata"]["step_time_ratio"] == cost
        page = page_data(every_step)
        card = next(card for card in page["cards"] if card["label"] == "Step time ratio")
        assert card["value"] == f"{cost['measured_step']:.2f}"
        assert f"{cost['at_this_every']:.2f} on average here, {cost['at_every_100']:.2f} at every=100" in card["note"]
        assert json.dumps(card["note"])[1:-1] in (out / name / "report.html").read_text()
        for value in (cost["measured_step"], cost["other_step"], cost["at_this_every"], cost["at_every_100"]):
            assert re.search(rf"^(a|av).*  {value:.2f}  ", printed.getvalue(), re.M)
        # Three measured steps are too few comparisons to trust a prediction.
        assert task["predictions"]["comparisons"] <= 2 * layers
        assert task["predictions"]["given"] == task["predictions"]["withheld"] > 0
        assert set(task["predictions"]["in_words"]) <= set(page["findings"])
        assert all((out / file).exists() for file in task["files"])
        assert len(task["files"]) == 5
        assert all(row["aligned_decrease"] > 0 and row["predicted_update_rms"] is None for row in task["layers"])
        assert all(row["predictions_withheld"] == row["predictions"] == 1 for row in task["layers"])
        assert sorted(every_step["step"].unique()) == list(range(12))
        assert every_step[every_step["kind"] == "predicted"]["aligned_decrease"].notna().all()
        assert "fastfs report" in (out / name / "report.html").read_text()
    assert read_header(out / "transformer" / "record.jsonl")["metadata"]["bytes"] == 4_000_000
    assert torch.get_num_threads() == threads
    text = printed.getvalue()
    for expected in (
        "angle (rad)",
        "blocks.1",
        "bitwise",
        "a measured step (3 pairs)",
        "withheld",
        "What the numbers mean",
    ):
        assert expected in text

    page = out / "transformer" / "report.html"
    following = text[text.index("\nNext\n") :]
    assert f"Open {page} in a browser" in following
    commands = [line.strip().split("    #")[0].split() for line in following.splitlines() if " fastfs " in line]
    assert [words[1] for words in commands] == ["report", "watch"]
    for words in commands:
        words = [str(tmp_path / "again.html") if word == "report.html" else word for word in words]
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, done.output
    assert (tmp_path / "again.html").exists()

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


@pytest.mark.slow
def test_predictions_are_printed_with_their_factor(tmp_path: Path) -> None:
    printed = io.StringIO()
    summary = run_demo(["resnet"], steps=40, every=4, out=tmp_path, console=Console(file=printed, width=100))
    task = summary["tasks"]["resnet"]
    found = task["predictions"]
    assert 0 < found["withheld"] < found["given"] == 30 * 24
    assert found["comparisons"] == 9 * 24
    assert 1 < found["factor"] < LARGEST_FACTOR
    for row in task["layers"]:
        assert 1 <= row["predicted_factor"] <= LARGEST_FACTOR
        assert f"{row['predicted_update_rms']:.2e} x/÷{row['predicted_factor']:.2f}" in printed.getvalue()
    assert "80 % of 216 measured speeds are within a factor" in " ".join(printed.getvalue().split())


def test_the_step_time_ratio_compares_the_same_steps() -> None:
    plain, watched = [9.0, 1.0, 2.0, 3.0, 1.0, 4.0], [18.0, 1.1, 2.2, 9.0, 1.1, 4.4]
    cost = step_time_ratio(plain, watched, every=3)
    assert cost["measured_step"] == 2.5  # of 2 and 3: pairs, not medians of steps that differ in size
    assert cost["measured_step_quartiles"] == [2.25, 2.75]
    assert cost["other_step"] == pytest.approx(1.1)
    assert (cost["measured_pairs"], cost["other_pairs"]) == (2, 4)
    assert cost["at_this_every"] == pytest.approx((2.5 + 2.2) / 3)
    assert cost["at_every_100"] == pytest.approx((2.5 + 99 * 1.1) / 100)
    assert cost["plain_step_seconds"] == 2.5
    alone = step_time_ratio([1.0], [2.0], every=1)
    assert (alone["at_this_every"], alone["other_step"], alone["other_pairs"]) == (2.0, 1.0, 0)
    assert alone["measured_step_quartiles"] is alone["other_step_quartiles"] is None


@pytest.mark.parametrize(("steps", "lines"), [(1, 1), (3, 3), (10, 10), (160, 10), (301, 10)])
def test_progress_without_a_terminal_is_a_few_lines(steps: int, lines: int) -> None:
    file = io.StringIO()
    with training_progress(Console(file=file), "resnet", steps) as progress:
        for done in range(1, steps + 1):
            progress(done, 0.5)
    printed = file.getvalue().splitlines()
    assert len(printed) == lines
    assert printed[-1].startswith(f"resnet: {steps} of {steps} steps, loss 0.500 in ")
    assert all("left" in line for line in printed[:-1])
    terminal = io.StringIO()
    with training_progress(Console(file=terminal, force_terminal=True), "resnet", steps) as progress:
        progress(steps, 0.5)
    assert f"{steps}/{steps}" in terminal.getvalue()
    assert "of" not in terminal.getvalue()
