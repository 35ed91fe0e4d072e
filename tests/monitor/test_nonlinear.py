"""The part of a feature update that first order does not explain, against torch.func in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from tests.helpers.monitor_loops import Net
from tests.helpers.parameter_cases import OPTIMIZERS, Convolutions, Words
from tests.monitor.test_overshoot import Loop

Row = dict[str, Any]


class Rectified(nn.Module):
    """A ReLU network, whose kinks no expansion in powers of the step describes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(16, 16)) for _ in range(3))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


MODELS = {"mlp": Net, "convolutions": Convolutions, "tied transformer": Words, "relu": Rectified}


def features(model: nn.Module, values: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _m, _i, out: found.append(out.clone())) for block in model.blocks]
    torch.func.functional_call(model, values, (x,))
    for handle in handles:
        handle.remove()
    return tuple(found)


def by_hand(before: nn.Module, after: nn.Module, batches: list[Tensor]) -> list[float]:
    """|df - J dw| / |df| of every block, over all batches."""
    w = {name: p.detach().double() for name, p in before.named_parameters()}
    dw = {name: p.detach().double() - w[name] for name, p in after.named_parameters()}
    sums = torch.zeros(len(before.blocks), 2, dtype=torch.float64)
    model = copy.deepcopy(before).double()
    for x in batches:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            found = torch.func.jvp(lambda v, x=x: features(model, v, x.double()), (w,), (dw,))
        old, change = found[0], found[1]
        new = features(model, {name: w[name] + dw[name] for name in w}, x.double())
        for row, f, t, g in zip(sums, old, change, new, strict=True):
            row += torch.stack([(g - f - t).square().sum(), (g - f).square().sum()]).detach()
    return [math.sqrt(float(rest / update)) for rest, update in sums]


def run(name: str, optimizer: str, dtype: torch.dtype, lr: float = 0.0, **monitor: Any) -> list[tuple[Row, float]]:
    torch.manual_seed(4)
    model = MODELS[name]().to(dtype)
    optimizers = OPTIMIZERS[optimizer](model)
    for group in (group for each in optimizers for group in each.param_groups):
        group["lr"] = lr or group["lr"]
    rows: list[Row] = []
    expected: dict[tuple[int, int], float] = {}
    options: dict[str, Any] = {"every": 1, "mode": "jvp", "nonlinear": True, "layers": r"blocks\.\d+$"} | monitor
    with fastfs.Monitor(model, optimizers, alerts=(), verbose=False, sinks=[rows.extend], **options):
        for step in range(3):
            model.zero_grad()
            batches = [torch.randn(12, 8, dtype=torch.float64).to(dtype) for _ in range(2)]
            for x in batches:
                (F.cross_entropy(model(x), torch.randint(3, (12,))) / 2).backward()
            before = copy.deepcopy(model)
            for each in optimizers:
                each.step()
            expected |= {(step, layer): x for layer, x in enumerate(by_hand(before, model, batches))}
    return [(row, expected[row["step"], row["layer"]]) for row in rows if row["kind"] == "measured"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_by_hand(model: str, optimizer: str) -> None:
    for row, expected in run(model, optimizer, torch.float64):
        assert row["valid"]
        assert row["nonlinear_update"] == pytest.approx(expected, rel=1e-6)
        assert row["nonlinear_update_se"] == 0.0


def test_single_precision_is_within_a_percent_or_null() -> None:
    known = 0
    for lr in (0.1, 1e-3, 1e-5):
        for model in MODELS:
            for row, expected in run(model, "sgd", torch.float32, lr):
                if not math.isnan(row["nonlinear_update"]):
                    known += 1
                    assert row["nonlinear_update"] == pytest.approx(expected, rel=0.01)
                else:
                    assert expected < 0.01
    assert known >= 20


def test_samples_of_rows_have_standard_errors() -> None:
    near = []
    for rows in (8, 12):
        for row, expected in run("mlp", "adamw", torch.float64, rows=rows, every=1):
            if row["nonlinear_update_se"] > 0:
                near.append(abs(row["nonlinear_update"] - expected) <= 2 * row["nonlinear_update_se"])
    assert len(near) >= 9
    assert sum(near) >= 0.75 * len(near)


def test_the_second_forward_also_tells_the_overshoot() -> None:
    found = Loop(OPTIMIZERS["sgd"], mode="jvp", nonlinear=True)
    assert found.found == [pytest.approx(seen, abs=1e-7) for seen in found.seen]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"nonlinear": True},
            ValueError,
            "nonlinear: is for mode=\"jvp\", which measures the first-order update; got mode='batch'",
        ),
        ({"mode": "jvp", "nonlinear": 1}, TypeError, "nonlinear: expected True or False, got 1"),
    ],
)
def test_arguments(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    net = Net()
    with pytest.raises(kind) as error:
        fastfs.Monitor(net, torch.optim.SGD(net.parameters()), sinks=[print], **options)
    assert str(error.value) == message
