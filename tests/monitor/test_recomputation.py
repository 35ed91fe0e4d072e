"""Reentrant checkpoints around layers that run several times: every backward vector comes to the run that it is of."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastfs
from fastfs._record.row_reasons import REASONS, UNMATCHED

# Torch's own, of a checkpoint in a checkpoint.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")

Plan = list[Any]
"""Runs of cells in order: a number is a cell, a list is a checkpoint around a plan."""


class Cells(nn.Module):
    """Cells that run as a plan says."""

    def __init__(self, plan: Plan, checkpoints: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.cells = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.plan, self.checkpoints = plan, checkpoints

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.run(self.plan, self.stem(x)))
        return out

    def run(self, plan: Plan, x: Tensor) -> Tensor:
        for each in plan:
            if isinstance(each, int):
                x = self.cells[each](x)
            elif self.checkpoints:
                x = checkpoint(self.run, each, x, use_reentrant=True)
            else:
                x = self.run(each, x)
        return x


def once(model: nn.Module) -> Tensor:
    return model(torch.randn(5, 6)).square().mean()


def backward_at_once(model: nn.Module) -> None:
    once(model).backward()


def backward_of_two(model: nn.Module) -> None:
    (once(model) - 2 * once(model)).backward()


def backward_in_order(model: nn.Module) -> None:
    """The first forward comes back first."""
    first, second = once(model), once(model)
    first.backward()
    second.backward()


Backward = Callable[[nn.Module], None]
BACKWARDS = (backward_at_once, backward_of_two, backward_in_order)


def rows(plan: Plan, backward: Backward, checkpoints: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = Cells(plan, checkpoints)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[dict[str, Any]] = []
    sinks = [found.extend]
    with fastfs.Monitor(model, optimizer, layers=r"cells\.\d$", every=1, sinks=sinks, alerts=(), verbose=False):
        for _ in range(2):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
    return [row for row in found if row["kind"] == "measured"]


def assert_same(plan: Plan, backward: Backward) -> None:
    expected, got = rows(plan, backward, False), rows(plan, backward, True)
    assert len(got) == len(expected) > 0
    for a, b in zip(expected, got, strict=True):
        assert b["valid"] == a["valid"], b["why"]
        for key in ("angle", "update_rms", "backward_rms", "feature_rms", "count"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, nan_ok=True), (plan, a["name"], key)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize(
    "plan",
    [
        [[0, 0, 0], 1],
        [[0], [0], 1],
        [[0, 0], 1, [0, 1, 0]],
        [0, [0, 0], 0, [1]],
        [[[0]], 1],
        [[0, [0], 0], 1],
        [[[0, 0], 0, [0]], [1, [0]]],
        [[[[0], 0], 0], [[0], 1]],
    ],
    ids=str,
)
def test_runs_in_checkpoints(plan: list[Any], backward: Any) -> None:
    assert_same(plan, backward)


def random_plan(draw: random.Random, depth: int) -> Plan:
    return [
        draw.randrange(2) if depth == 0 or draw.random() < 0.6 else random_plan(draw, depth - 1)
        for _ in range(draw.randint(1, 3))
    ]


@pytest.mark.parametrize("seed", range(30))
def test_random_plans(seed: Any) -> None:
    draw = random.Random(seed)
    assert_same([*random_plan(draw, 3), 0, 1], draw.choice(BACKWARDS))


class Beside(nn.Module):
    """A layer that also runs without gradients, for good."""

    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.cell = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.checkpoints = checkpoints

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        with torch.no_grad():
            y = self.cell(3 * x)
        out: Tensor = self.head(
            y + (checkpoint(self.cell, x, use_reentrant=False) if self.checkpoints else self.cell(x))
        )
        return out


def test_a_run_without_gradients_is_no_part_of_a_checkpoint_that_is_not_reentrant() -> None:
    found = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        model = Beside(checkpoints)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen: list[dict[str, Any]] = []
        with fastfs.Monitor(model, optimizer, layers=["cell.0"], sinks=[seen.extend], alerts=(), verbose=False):
            once(model).backward()
            optimizer.step()
        found += [row for row in seen if row["kind"] == "measured"]
    plain, again = found
    assert plain["count"] == again["count"] == 30
    for key in ("angle", "update_rms", "backward_rms"):
        assert again[key] == pytest.approx(plain[key], rel=1e-6)


class Recomputing(torch.autograd.Function):
    """Recomputes in a helper, where nothing tells which of two functions it is for."""

    @staticmethod
    def forward(function: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return function(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.function = inputs[0]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x)
        out.backward(gradient)
        return None, x.grad


def test_runs_that_cannot_be_told_apart_are_not_valid() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.cell, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(2):
                x = Recomputing.apply(lambda x: torch.tanh(self.cell(x)), x)
            return self.head(x)

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[dict[str, Any]] = []
    with fastfs.Monitor(
        model, optimizer, layers=["stem", "cell"], every=1, sinks=[found.extend], alerts=(), verbose=False
    ):
        once(model).backward()
        optimizer.step()
    stem, row = [row for row in found if row["kind"] == "measured"]
    assert stem["valid"]
    assert not row["valid"]
    assert row["why"] == REASONS[UNMATCHED]
