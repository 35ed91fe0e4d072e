"""A loop of one's own with Accelerate: the monitor itself is the one line, and Accelerate's checkpoints carry it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs.models import Transformer
from tests.helpers.monitor_by_hand import HandWatch
from tests.helpers.processes import reset_accelerate

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

STEPS, PARTS, LAYERS = 4, 2, ["blocks.0", "blocks.1"]


@pytest.fixture(autouse=True)
def _no_state() -> Iterator[None]:
    """Accelerate keeps its settings for the process."""
    yield
    reset_accelerate()


def batches(first: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(0, 32, (4, 8), generator=draw) for _ in range(STEPS * PARTS)][first * PARTS :]


def train(
    *,
    path: Path | None = None,
    hand: int | None = None,
    first: int = 0,
    last: int = STEPS,
    load: Path | None = None,
    save: Path | None = None,
    clip: float | None = None,
    **options: Any,
) -> Any:
    """Trains for some steps; returns the losses of micro-batches, the model and the numbers of one step by hand."""
    reset_accelerate()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS, **options)
    net = Transformer(vocabulary=32, width=16, depth=2, heads=2, context=8)
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    monitor = None
    if path is not None:
        monitor = fastfs.Monitor(model, optimizer, every=2, aligned_every=1, rows=None, path=path, verbose=False)
        accelerator.register_for_checkpointing(monitor)
    if load is not None:
        accelerator.load_state(str(load))
    losses, found, watch = [], None, None
    for number, tokens in enumerate(batches(first)[: (last - first) * PARTS], first * PARTS):
        if number == (hand or 0) * PARTS and hand is not None:
            watch = HandWatch(net, LAYERS, stem=("token.", "position."))
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            if monitor is not None:
                monitor.log(loss=loss / accelerator.gradient_accumulation_steps)
            accelerator.backward(loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if watch is not None and number == (hand or 0) * PARTS + PARTS - 1:
            found, watch = watch.finish(nullcontext()), None
    if save is not None:
        accelerator.save_state(str(save))
    if monitor is not None:
        monitor.close()
    return losses, net, found


def assert_same(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1].parameters(), other[1].parameters(), strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"clip": 0.05}, {"mixed_precision": "bf16"}], ids=["accumulate", "clipped", "bf16"]
)
def test_numbers_are_those_by_hand(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "record.jsonl"
    plain, watched = train(**options), train(path=path, **options)
    assert_same(plain, watched)
    table = fastfs.load(path)
    seen = table[table["kind"] == "measured"]
    assert seen["step"].tolist() == [0, 0, 2, 2]
    for step in (0, 2):
        hand = train(hand=step, **options)[2]
        loss = sum(plain[0][step * PARTS : (step + 1) * PARTS]) / PARTS
        for number, (_, row) in enumerate(seen[seen["step"] == step].iterrows()):
            assert row["loss"] == pytest.approx(loss, rel=1e-6)
            assert row["micro_batches"] == PARTS
            assert "mixed_precision" in options or row["valid"], row["why"]
            for column in ("cos_angle", "update_rms", "feature_rms", "backward_rms"):
                assert row[column] == pytest.approx(hand[column][number], rel=1e-5), column
            assert row["aligned_decrease"] == pytest.approx(hand["aligned_decrease"][number], rel=1e-3)


def test_checkpoints_carry_the_monitor(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    expected = train(path=whole)
    first = train(path=part, last=3, save=tmp_path / "checkpoint")
    rest = train(path=part, first=3, load=tmp_path / "checkpoint")
    assert first[0] + rest[0] == expected[0]
    assert_same(([], rest[1]), ([], expected[1]))
    mine, other = fastfs.load(part), fastfs.load(whole)
    assert mine["run"].nunique() == 1
    for column in ("step", "kind", "name", "loss", "angle", "aligned_decrease", "update_rms"):
        assert mine[column].equals(other[column]), column


def test_a_gradient_scaler() -> None:
    """Accelerate has one on accelerators only; its optimizer takes any. Steps that it skips are in the record."""

    def run(rows: list[Any] | None) -> tuple[list[float], nn.Module]:
        torch.manual_seed(0)
        Accelerator(cpu=True)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # which overflows
        optimizer = AcceleratedOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), scaler=scaler)
        monitor = None
        if rows is not None:
            monitor = fastfs.Monitor(net, optimizer, every=1, scaler=scaler, sinks=[rows.extend], verbose=False)
        losses = []
        for _ in range(6):
            loss = net(torch.randn(4, 8)).square().sum()
            if monitor is not None:
                monitor.log(loss=loss)
            scaler.scale(loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item() * (-1 if optimizer.step_was_skipped else 1))
        if monitor is not None:
            monitor.close()
        return losses, net

    rows: list[Any] = []
    plain, watched = run(None), run(rows)
    assert_same(plain, watched)
    taken = [loss for loss in plain[0] if loss > 0]
    assert 0 < len(taken) < 6
    measured = {row["step"]: row for row in rows if row["kind"] == "measured"}
    assert [measured[step]["loss"] for step in range(len(taken))] == pytest.approx(taken, rel=1e-6)
    assert len([row for row in rows if row["kind"] == "skipped"]) == 6 - len(taken)
