"""A run that stops and is resumed by another process: one id, one record, no repeated step."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fastfs
from fastfs.models import ResNet
from tests.helpers.monitor_cases import rows, sgd, train, watched

ROOT = str(Path(__file__).parents[2])

# Trains from the checkpoint, if there is one, up to a step; saves one on the way and goes on without.
SCRIPT = """
    import sys
    import torch
    import fastfs
    from fastfs.models import ResNet
    from tests.helpers.monitor_cases import sgd, train, rows

    folder, saved, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ResNet(8, 16, 2, 3)
    optimizer = sgd(model)
    sinks = [folder + "/a.jsonl", folder + "/a.parquet", "tensorboard:" + folder + "/tb"]
    monitor = fastfs.Monitor(model, optimizer, every=4, aligned_every=1, amplify=True, sinks=sinks)
    try:
        state = torch.load(folder + "/state.pt", weights_only=True)
    except FileNotFoundError:
        pass
    else:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        monitor.load_state_dict(state["monitor"])
    while monitor.step < last:
        if monitor.step == saved:
            parts = {"model": model, "optimizer": optimizer, "monitor": monitor}
            torch.save({name: part.state_dict() for name, part in parts.items()}, folder + "/state.pt")
        train(model, optimizer, 1, lambda _: rows(monitor.step))
    monitor.close()
    print(monitor.run)
"""


def process(folder: Path, saved: Any, last: Any) -> Any:
    folder.mkdir(exist_ok=True)
    head = f"import sys; sys.path.insert(0, {ROOT!r})\n"
    command = [sys.executable, "-c", head + textwrap.dedent(SCRIPT), str(folder), str(saved), str(last)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_a_resumed_run_is_one_continuous_run_in_every_sink(tmp_path: Path) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    process(straight, -1, 14)
    first = process(parts, 6, 9)  # continues for 3 steps that the next process repeats
    second = process(parts, 10, 12)
    third = process(parts, -1, 14)
    assert first == second == third

    expected = fastfs.load(straight / "a.jsonl")
    for path in (parts / "a.jsonl", parts / "a.parquet"):
        table = fastfs.load(path)
        assert table["run"].unique().tolist() == [first]
        assert not table.duplicated(["step", "kind", "layer"]).any()
        assert table["step"].tolist() == [step for step in range(14) for _ in range(2)]
        assert table["kind"].tolist() == expected["kind"].tolist()
        assert [header.get("resumed_at") for header in table.attrs["headers"]] == [None, 6, 10]
        # Values continue as if nothing had happened, including predictions with the last angle.
        for key in ("update_rms", "backward_rms", "aligned_decrease", "angle"):
            for a, b in zip(table[key], expected[key], strict=True):
                assert a == pytest.approx(b, rel=1e-6, nan_ok=True), key
    again = fastfs.load(parts / "a.jsonl")
    assert (again[again["kind"] == "predicted"]["update_rms"] > 0).all()

    events = EventAccumulator(str(parts / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("fastfs/angle/blocks.0")] == [0, 4, 8, 12]


def test_the_state_is_small_plain_data(tmp_path: Path) -> None:
    model, optimizer, _, monitor = watched(every=2, aligned_every=1)
    train(model, optimizer, 3)
    state = monitor.state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 20_000
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["step"] == 3
    assert loaded["recorder"]["run"] == monitor.run
    assert loaded["engine"]["layers"] == list(monitor.layers)
    assert len(loaded["engine"]["learned_structure"]["steps"]) == 1
    assert loaded["angles"] == state["angles"]
    monitor.close()


def test_predictions_continue_with_the_last_angle(tmp_path: Path) -> None:
    """Even before anything has been measured again."""
    torch.manual_seed(0)
    model, optimizer, _, monitor = watched(every=100, aligned_every=1)
    train(model, optimizer, 3)
    state = monitor.state_dict()
    monitor.close()
    (kind,) = state["angles"]
    cosines = kind["cosine"]
    assert all(0.05 < cosine < 1 for cosine in cosines)
    seen: list[Any] = []
    other = fastfs.Monitor(model, optimizer, every=4, aligned_every=1, sinks=[seen.extend])
    other.load_state_dict(state)
    assert (other.step, other.due, other.run) == (3, False, monitor.run)
    train(model, optimizer, 1)  # step 3: predicted
    train(model, optimizer, 3)  # step 4: measured; 5 and 6: predicted with its angle
    other.close()
    predicted = {row["step"]: row for row in seen if row["kind"] == "predicted" and row["name"] == "blocks.2"}
    measured = next(row for row in seen if row["kind"] == "measured" and row["name"] == "blocks.2")
    assert sorted(predicted) == [3, 5, 6]
    for step, cosine in ((3, cosines[2]), (5, measured["cos_angle"]), (6, measured["cos_angle"])):
        row = predicted[step]
        count = 16 * 16
        expected = row["aligned_decrease"] / (cosine * row["backward_rms"] * count)
        assert row["update_rms"] == pytest.approx(expected, rel=1e-9)


def test_wrong_states_are_refused() -> None:
    model, optimizer, _, monitor = watched()
    train(model, optimizer, 2)
    state = monitor.state_dict()
    with pytest.raises(ValueError, match=r"expected a monitor that has seen no step, this one has seen 2"):
        monitor.load_state_dict(state)
    monitor.close()
    model, optimizer, seen, other = watched(layers=["blocks.0", "stem"])
    run = other.run
    with pytest.raises(
        ValueError,
        match=r"expected a state of the layers \['stem', 'blocks.0'\], got \['blocks.0', 'blocks.1', 'blocks.2'\]",
    ):
        other.load_state_dict(state)
    assert (other.step, other.run) == (0, run)
    train(model, optimizer, 1)  # nothing was changed by the attempt
    other.close()
    assert [row["step"] for row in seen] == [0, 0]


def test_the_schedule_continues(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    model = ResNet(8, 16, 2, 3)
    optimizer = sgd(model)
    monitor = fastfs.Monitor(model, optimizer, every=5, path=path)
    train(model, optimizer, 7)
    state = monitor.state_dict()
    monitor.close()
    monitor = fastfs.Monitor(model, optimizer, every=5, path=path)
    monitor.load_state_dict(state)
    train(model, optimizer, 6, lambda step: rows(7 + step))
    monitor.close()
    table = fastfs.load(path)
    assert table["step"].unique().tolist() == [0, 5, 10]
    assert not any(math.isnan(x) for x in table["angle"])
    assert table["run"].nunique() == 1
