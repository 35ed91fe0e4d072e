"""Where a step of the parameters leads: rotation, radial update and cosine, against vectors taken by hand."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastfs
from fastfs._monitor import monitor as monitor_module
from fastfs._monitor.measure.parameters import Parameters
from fastfs._record.ranks.parameter_steps import step_columns
from tests.helpers.monitor_loops import Net
from tests.helpers.parameter_cases import MODELS, OPTIMIZERS, Row, Steps, angle

NAMES = ("parameter_rotation", "parameter_radial_update", "parameter_cos_angle")


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)
    torch.manual_seed(3)


def check(row: Row, w: Tensor, dw: Tensor, g: Tensor, rel: float, absolute: float) -> None:
    """Compares a row with the vectors. What cancels in a product is an error relative to the factors."""
    cosine = float(-(g @ dw) / (g.norm() * dw.norm()))
    assert row["parameter_cos_angle"] == pytest.approx(cosine, rel=rel, abs=absolute)
    if not w.any():
        assert math.isnan(row["parameter_rotation"])
        assert math.isnan(row["parameter_radial_update"])
        return
    size = float(dw.norm() / w.norm())
    assert row["parameter_rotation"] == pytest.approx(angle(w, w + dw), rel=rel, abs=absolute * size)
    assert row["parameter_radial_update"] == pytest.approx(float(w @ dw / (w @ w)), rel=rel, abs=absolute * size)


def compare(run: Steps, rel: float, absolute: float) -> None:
    assert len(run.by_place) == len(run.seen) * len(run.seen[0])
    for (step, layer), row in run.by_place.items():
        check(row, *run.seen[step][layer], rel, absolute)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_model_and_optimizer(model: str, optimizer: str) -> None:
    net = MODELS[model]().double()
    compare(Steps(net, OPTIMIZERS[optimizer](net)), rel=1e-8, absolute=1e-10)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", [{}, {"amplify": True}, {"mode": "jvp"}], ids=["batch", "amplify", "jvp"])
def test_single_precision_with_accumulation_and_clipping(optimizer: str, mode: dict[str, Any]) -> None:
    net = Net()
    compare(Steps(net, OPTIMIZERS[optimizer](net), micro_batches=2, clip=0.05, **mode), rel=1e-4, absolute=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_in_16_bits(optimizer: str) -> None:
    """The step is what rounding leaves of it."""
    net = Net().bfloat16()
    compare(Steps(net, OPTIMIZERS[optimizer](net)), rel=1e-6, absolute=1e-7)


def test_tiny_steps_keep_their_digits() -> None:
    net = Net().double()
    run = Steps(net, [torch.optim.SGD(net.parameters(), lr=1e-7)])
    assert max(row["parameter_rotation"] for row in run.by_place.values()) < 1e-6
    compare(run, rel=1e-6, absolute=1e-8)


def test_layers_that_are_frozen_have_no_direction() -> None:
    net = Net().double()
    net.blocks[1].requires_grad_(False)
    run = Steps(net, [torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)])
    for (_, layer), row in run.by_place.items():
        assert all(math.isnan(row[name]) == (layer == 1) for name in NAMES)
    for (step, layer), row in run.by_place.items():
        if layer != 1:
            w, dw, _ = run.seen[step][layer]
            assert row["parameter_rotation"] == pytest.approx(angle(w, w + dw), rel=1e-8)


def test_a_layer_without_an_update_has_a_rotation_of_zero() -> None:
    net = Net().double()
    run = Steps(net, [torch.optim.SGD(net.parameters(), lr=0.0)])
    for row in run.by_place.values():
        assert (row["parameter_rotation"], row["parameter_radial_update"]) == (0.0, 0.0)
        assert math.isnan(row["parameter_cos_angle"])


def test_a_sign_flip_is_half_a_turn() -> None:
    found = step_columns(np.array([[2.0, 4.0, 1.0]]), np.array([[-4.0, 8.0]]))
    assert found["parameter_rotation"][0] == pytest.approx(math.pi)
    assert found["parameter_radial_update"][0] == -2.0
    assert found["parameter_cos_angle"][0] == 1.0


def test_null_where_a_sample_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "Parameters", functools.partial(Parameters, least_chunk=64))
    net = Net(width=64).double()
    run = Steps(net, OPTIMIZERS["adamw"](net), steps=16, every=10)
    sampled = {place for place, row in run.by_place.items() if math.isnan(row["parameter_rotation"])}
    assert {place for place in sampled if place[1] == 0} == {
        place for place, row in run.by_place.items() if row["decrease_se"] and place[1] == 0
    }
    for place, row in run.by_place.items():
        if place in sampled:
            assert row["decrease_se"] > 0
            assert all(math.isnan(row[name]) for name in NAMES)
        else:
            check(row, *run.seen[place[0]][place[1]], 1e-8, 1e-10)


def test_norms_of_an_optimizer_that_steps_twice_in_a_training_step() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    first, last = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2))
    rows: list[Any] = []
    with fastfs.Monitor(model, [first, last], layers=["0", "2"], every=1, sinks=[rows.extend], verbose=False):
        for _ in range(2):
            for optimizer in (first, last):
                optimizer.zero_grad()
            model(torch.randn(8, 4).double()).square().mean().backward()
            first.step()
            first.step()
            last.step()
    own = [row for row in rows if row["kind"] == "measured" and row["name"] == "0"]
    norm = torch.cat([p.detach().flatten() for p in model[0].parameters()]).norm()
    assert own[-1]["parameter_norm"] == pytest.approx(float(norm), rel=1e-12)
    for row in own:  # of the steps together these are not known, while D is the sum of both
        assert math.isnan(row["parameter_update_norm"])
        assert math.isnan(row["gradient_norm"])
        assert row["aligned_decrease"] > 0
