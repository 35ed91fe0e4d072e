"""Steps with several forwards, closures and gradient scalers, and layers that run twice."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs.models import ResNet
from tests.helpers.monitor_cases import (
    measured_into,
    rows,
    sgd,
    train,
)


def test_micro_batches_add_up_to_the_batch() -> None:
    seen: dict[Any, Any] = {}
    for parts in (1, 4):
        torch.manual_seed(0)
        model = ResNet(8, 16, 3, 3).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen[parts] = []
        with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", sinks=[measured_into(seen[parts])]) as monitor:
            x, y = rows(0)
            for some, labels in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                loss = F.cross_entropy(model(some), labels) / parts
                loss.backward()
                monitor.log(loss=loss)
            optimizer.step()
    for whole, pieces in zip(seen[1], seen[4], strict=True):
        assert pieces["micro_batches"] == 4
        assert pieces["count"] == whole["count"]
        for key in ("angle", "update_rms", "feature_rms", "backward_rms", "relative_update", "loss"):
            assert pieces[key] == pytest.approx(whole[key], rel=1e-9), key


def test_two_forwards_before_one_backward_count_both() -> None:
    seen: list[Any] = []
    model = ResNet(8, 16, 2, 3)
    optimizer = sgd(model)
    with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", sinks=[measured_into(seen)]):
        a, b = model(rows(0)[0]), model(rows(1)[0])
        (a - b).square().mean().backward()
        optimizer.step()
    assert [(row["micro_batches"], row["count"]) for row in seen] == [(2, 2 * 16 * 16)] * 2
    assert all(row["valid"] for row in seen)


@pytest.mark.parametrize("order", ["zero before forward", "zero after forward"])
def test_a_skipped_optimizer_step_leaves_nothing_behind(order: str) -> None:
    """As a gradient scaler does on overflow: the next step's measurement is of the next batch only."""
    rows_of: dict[Any, Any] = {}
    for skip in (False, True):
        torch.manual_seed(0)
        model = ResNet(8, 16, 3, 3)
        optimizer = sgd(model)
        rows_of[skip] = []
        with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", sinks=[measured_into(rows_of[skip])]):
            for batch in [0, 1] if skip else [1]:
                x, y = rows(batch)
                if order == "zero before forward":
                    optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                if order == "zero after forward":
                    optimizer.zero_grad()
                loss.backward()
            optimizer.step()
    for clean, skipped in zip(rows_of[False], rows_of[True], strict=True):
        assert skipped["micro_batches"] == 1
        for key in ("angle", "update_rms", "feature_rms", "backward_rms", "count", "step"):
            assert clean[key] == skipped[key]


def test_a_gradient_scaler_that_skips_and_then_steps() -> None:
    seen: list[Any] = []
    model = ResNet(8, 16, 2, 3)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", every=1, sinks=[measured_into(seen)]) as monitor:
        for step in range(3):
            x, y = rows(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) * (math.inf if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert monitor.step == 2
    assert [(row["step"], row["micro_batches"], row["valid"]) for row in seen] == [(s, 1, True) for s in (0, 0, 1, 1)]


def test_a_step_with_a_closure_is_measured() -> None:
    seen: list[Any] = []
    model = ResNet(8, 16, 2, 3)
    optimizer = sgd(model)
    x, y = rows(0)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", sinks=[measured_into(seen)]):
        optimizer.step(closure)
    assert all(row["valid"] for row in seen)


def test_a_layer_that_runs_twice_counts_its_rows_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))[:, :3]

    seen: list[Any] = []
    model = Twice()
    optimizer = sgd(model)
    with fastfs.Monitor(model, optimizer, layers="layer", sinks=[measured_into(seen)]):
        train(model, optimizer, 1)
    assert seen[0]["count"] == 2 * 16 * 8
    assert seen[0]["valid"]


@pytest.mark.parametrize("late", [False, True], ids=["before the forward", "after it"])
@pytest.mark.parametrize("log_first", [False, True], ids=["log after the backward", "log before it"])
@pytest.mark.parametrize("every", [1, 4], ids=["measured", "predicted"])
def test_losses_of_gradients_that_were_thrown_away(late: bool, log_first: bool, every: int) -> None:
    """The loss of a step is that of its own forwards, wherever the loop zeroes gradients that led to no step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    rows: list[dict[str, Any]] = []
    expected = []
    monitor = fastfs.Monitor(model, optimizer, every=every, aligned_every=1, sinks=[rows.extend], verbose=False)
    for number in range(8):
        if not late:
            optimizer.zero_grad()
        loss = model(torch.randn(4, 16)).square().mean()
        if late:
            optimizer.zero_grad()
        if log_first:
            monitor.log(loss=loss)
        loss.backward()
        if not log_first:
            monitor.log(loss=loss)
        if number in (0, 4, 5, 7):
            optimizer.step()
            expected.append(loss.item())
    monitor.close()
    found = {row["step"]: row for row in rows if row["kind"] in ("measured", "predicted")}
    assert [found[step]["loss"] for step in range(4)] == pytest.approx(expected, rel=1e-6)
    assert [row["step"] for row in rows if row["kind"] == "skipped"] == [1, 1, 1, 3]
