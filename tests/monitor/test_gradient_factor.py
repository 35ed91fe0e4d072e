"""By what all gradients were multiplied between the backward and the step: in the recorded scale of the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastfs
from tests.helpers.record_cases import Collecting

Treat = Callable[[nn.Module], object]


def scales(
    treat: Treat | None = None, *, optimizers: int = 1, scale: float | None = None, fused: bool = False, **options: Any
) -> list[float | None]:
    """Trains for three steps; returns the recorded scales of the gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    own = list(model.parameters())
    steppers = [torch.optim.AdamW(own[i::optimizers], lr=1e-3, fused=fused) for i in range(optimizers)]
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    sink = Collecting()
    settings = {"layers": r"^\d$", "every": 1, "rows": None, "alerts": (), "verbose": False, "scaler": scaler}
    with fastfs.Monitor(model, steppers, sinks=[sink], **{**settings, **options}):
        for step in range(3):
            made = torch.Generator().manual_seed(step)
            x, y = torch.randn(32, 8, generator=made), torch.randint(0, 4, (32,), generator=made)
            model.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if treat is not None:
                treat(model)
            for each in steppers:
                each.step() if scaler is None else scaler.step(each)
            if scaler is not None:
                scaler.update()
    return [record.scalars["gradient_scale"] for record in sink.of("measured")]


def times(factor: float, first: int = 0) -> Treat:
    """Multiplies the gradients of all parameters from the first on."""

    def treat(model: nn.Module) -> None:
        for p in list(model.parameters())[first:]:
            assert p.grad is not None
            p.grad *= factor

    return treat


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1.0),
        ({"treat": times(1 / 3)}, 1 / 3),
        ({"treat": times(3.0), "mode": "jvp"}, 3.0),
        ({"treat": times(-1.0)}, -1.0),
        ({"treat": times(1 / 3), "optimizers": 3}, 1 / 3),
        ({"scale": 1024.0}, 1.0),
        ({"scale": 1024.0, "fused": True}, 1.0),
        ({"scale": 1024.0, "optimizers": 2}, 1.0),
        ({"scale": 1024.0, "treat": times(1 / 1024)}, 1 / 1024),
        ({"scale": 1024.0, "fused": True, "treat": times(0.5)}, 0.5),
        ({"loss_weight": 0.25, "treat": times(0.25)}, 1.0),
        ({"loss_weight": 0.25}, 4.0),
    ],
)
def test_the_factor_of_all_gradients_is_in_the_scale(options: Any, expected: float) -> None:
    assert scales(**options) == pytest.approx([expected] * 3, rel=3e-3)


@pytest.mark.parametrize("optimizers", [1, 2])
def test_without_one_factor_there_is_no_scale(optimizers: int) -> None:
    assert scales(times(0.5, first=1), optimizers=optimizers) == [None] * 3


def test_the_factor_of_clipping_is_that_of_each_step() -> None:
    seen: list[float] = []

    def clip(model: nn.Module) -> None:
        seen.append(0.1 / nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())

    assert scales(clip) == pytest.approx(seen, rel=3e-3)
