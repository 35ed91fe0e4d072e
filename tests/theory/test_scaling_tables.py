"""The tables: entries, their application to a model, and measurements of the constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastfs import formula, scaling
from fastfs._network.linearization import Linearization
from fastfs.models import MLP, ResNet, Transformer
from tests.helpers.scaling_cases import IN, made, row, squared


@pytest.mark.parametrize(("kind", "norm_sq"), [("dense", 9.0), ("sparse", 1.0)])
@pytest.mark.parametrize(
    ("scheme", "std", "rates"),
    [  # over 1/L, as powers of the width and the depth: the published table, with the constants of ReLU
        ("ntk", lambda m, n: m**-0.5, lambda m, n: (2, 4 / m, 2 / m)),
        ("mup", lambda m, n: 1 / m, lambda m, n: (2 * m, 4, 2 / m)),
        ("fsc", lambda m, n: n**0.5 / m, lambda m, n: (2 * m / n, 4 / n, 2 / m)),
    ],
)
def test_entries_of_the_mlp(
    scheme: str, std: Callable[..., Any], rates: Callable[..., Any], kind: str, norm_sq: float
) -> None:
    depth, width = 7, 50
    rule = scaling.mlp(depth, width, 9, 3, scheme=scheme, input=kind)
    first, hidden, last = (r / depth for r in rates(width, depth))
    assert [layer.role for layer in rule.layers] == ["input"] + ["hidden"] * 5 + ["output"]
    assert [(layer.rows, layer.columns) for layer in rule.layers] == [(50, 9), *[(50, 50)] * 5, (3, 50)]
    expected = [(norm_sq**-0.5, first / norm_sq), *[((2 / width) ** 0.5, hidden)] * 5, (std(width, depth), last)]
    for layer, (sigma, lr) in zip(rule.layers, expected, strict=True):
        assert layer.std == pytest.approx(sigma)
        assert layer.lr == pytest.approx(lr)


@pytest.mark.parametrize(("beta", "branch"), [(None, 2 * 25 / 27), (1 / 25, 2 * 625 / 27)])
def test_branches_of_a_resnet_learn_at_rate_one_or_depth(beta: Any, branch: Any) -> None:
    rule = scaling.resnet(25, 40, beta, in_dim=9)
    assert rule.layers[1].lr == pytest.approx(branch)
    assert rule.layers[-1].std == pytest.approx(1 / 40)


def test_standard_has_one_rate_and_the_initialization_of_ntk() -> None:
    standard, ntk = (scaling.mlp(5, 30, 9, scheme=s) for s in ("standard", "ntk"))
    assert {layer.lr for layer in standard.layers} == {1.0}
    assert [layer.std for layer in standard.layers] == [layer.std for layer in ntk.layers]


@pytest.mark.parametrize(
    "bad",
    [
        {"depth": 1},
        {"width": 0},
        {"in_dim": 0},
        {"scheme": "xyz"},
        {"input": "odd"},
        {"decrease": 0.0},
        {"decrease": math.nan},
    ],
)
def test_arguments_that_cannot_be_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        scaling.mlp(**{"depth": 4, "width": 8, "in_dim": 3, **bad})


@pytest.mark.parametrize("name", ["depth", "width", "in_dim", "out_dim"])
@pytest.mark.parametrize("size", [10.5, 8.0, True, "8"])
def test_sizes_are_integers(name: str, size: Any) -> None:
    for kind in (scaling.mlp, scaling.resnet):
        with pytest.raises(TypeError, match=f"{name}: expected an integer, got"):
            kind(**{"depth": 4, "width": 8, "in_dim": 3, name: size})


@pytest.mark.parametrize("beta", [0.0, 1.5, -1.0])
def test_branch_scale_is_in_range(beta: float) -> None:
    with pytest.raises(ValueError, match="branch_scale"):
        scaling.resnet(4, 8, beta, in_dim=3)


def test_scaled_keeps_the_balance() -> None:
    rule = scaling.mlp(6, 40, 9, scheme="mup")
    other = rule.scaled(lr=0.5, output_std=3.0)
    before, after = scaling.predict(rule), scaling.predict(other)
    assert after.contributions == pytest.approx([0.5 * c for c in before.contributions])
    assert after.sensitivity == pytest.approx(before.sensitivity / 3)
    with pytest.raises(ValueError, match="lr"):
        rule.scaled(lr=0.0)


# apply


def chain(width: int = 64, bias: bool = True) -> Any:
    return nn.Sequential(
        nn.Linear(9, width, bias=bias), nn.ReLU(), nn.Linear(width, width, bias=bias), nn.ReLU(), nn.Linear(width, 3)
    )


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        (chain(200), scaling.mlp(3, 200, 9, 3, scheme="mup")),
        (MLP(9, 200, 4, 3), scaling.mlp(4, 200, 9, 3, scheme="fsc")),
        (ResNet(9, 200, 3, 3), scaling.resnet(3, 200, in_dim=9, out_dim=3)),
    ],
)
def test_apply_draws_what_the_rule_says(model: Any, rule: Any) -> None:
    groups = scaling.apply(model, rule, generator=torch.Generator().manual_seed(0))
    assert len(groups) == len(rule.layers)
    names = dict(model.named_modules())
    for group, layer in zip(groups, rule.layers, strict=True):
        weight, *bias = group["params"]
        assert names[group["name"]].weight is weight
        assert group["lr"] == layer.lr
        assert all(not b.any() for b in bias)
        spread = 5 * layer.std / math.sqrt(2 * weight.numel())
        assert abs(weight.std().item() - layer.std) < spread
        assert abs(weight.mean().item()) < 5 * layer.std / math.sqrt(weight.numel())
    optimizer = torch.optim.SGD(groups)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    again = scaling.apply(model, rule, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again[0]["params"][0], groups[0]["params"][0])


def tied() -> Any:
    linear = nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(9, 8), linear, nn.ReLU(), linear, nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("model", "rule", "message"),
    [
        (chain(8), scaling.mlp(4, 8, 9, 3), "4 matrices, Sequential has 3"),
        (chain(8), scaling.mlp(3, 8, 9, 2), r"4: the weight has shape \(3, 8\), the rule expects \(2, 8\)"),
        (nn.Sequential(*chain(8), nn.LayerNorm(3)), scaling.mlp(3, 8, 9, 3), "other parameters: 5.weight, 5.bias"),
        (Transformer(16, 8, 1, 2, 4), scaling.mlp(3, 8, 9, 3), "calibrate supports any model"),
        (tied(), scaling.mlp(4, 8, 9, 3), "in more than one layer"),
        (MLP(9, 8, 5, 3), scaling.resnet(3, 8, in_dim=9, out_dim=3), "takes a rule for mlp"),
        (ResNet(9, 8, 3, 3), scaling.mlp(5, 8, 9, 3), "takes a rule for resnet"),
        (
            ResNet(9, 8, 3, 3, branch_scale=1.0),
            scaling.resnet(3, 8, in_dim=9, out_dim=3),
            "branch scale 0.57735, the model has 1",
        ),
    ],
)
def test_a_mismatch_is_an_error_and_nothing_is_written(model: Any, rule: Any, message: str) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        scaling.apply(model, rule)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# Measurements

SEEDS = 12


@pytest.mark.slow
@pytest.mark.parametrize("resnet", [False, True])
@pytest.mark.parametrize("scheme", ["standard", "ntk", "mup", "fsc"])
def test_constants(scheme: str, resnet: bool) -> None:
    """lr |g|^2 of every matrix, D, the angle and S are as predicted, for a residual of 1, over seeds."""
    width, depth = 512, 6
    rows = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model, groups = made(scheme, width, depth, resnet=resnet)
        loss = lambda model, batch: model(batch).sum()  # noqa: E731 - its residual is 1
        moved = formula.measure(model, loss, row()[0], optimizer=torch.optim.SGD(groups), first_order=True)
        decreases = moved.parameter_stats.aligned_decrease.tolist()
        rows.append([*decreases, moved.stats.cos_angle[-1].item(), moved.sensitivity[-1].item()])
    got = torch.tensor(rows, dtype=torch.float64)
    kind = scaling.resnet if resnet else scaling.mlp
    expected = scaling.predict(kind(depth, width, in_dim=IN, scheme=scheme, input="sparse"))
    truth = torch.tensor([*expected.contributions, expected.cos_angle, expected.sensitivity], dtype=torch.float64)
    mean, error = got.mean(0), got.std(0) / SEEDS**0.5
    # Four standard errors, and 3% for the finite width.
    assert torch.all((mean - truth).abs() <= 4 * error + 0.03 * truth), f"got {mean}\nexpected {truth}\nerror {error}"
    if scheme != "standard":
        assert expected.decrease == pytest.approx(1.0)
        assert max(expected.contributions) == pytest.approx(min(expected.contributions))


@pytest.mark.parametrize("c", [0.1, 0.5, 1.0, 2.0])
def test_predicted_angle_has_the_known_limits(c: float) -> None:
    depth = 2000
    limit = 1 / math.sqrt(1 + 2 * c**2 / 3)
    assert scaling.predicted_cos_angle(depth, branch_scale=c / math.sqrt(depth)) == pytest.approx(limit, rel=2e-3)
    mlp = scaling.predicted_cos_angle(depth)
    assert mlp == pytest.approx(math.sqrt(1.5 / depth), rel=2e-3)


def test_predicted_angle_of_published_figures() -> None:
    """Output angles of the ResNet over sqrt(L) beta and of the MLP of depth 100, which vary by 0.03 over seeds."""
    for c, published in ((0.1, 0.075), (0.5, 0.355), (1.0, 0.675), (2.0, 1.045)):
        angle = math.acos(scaling.predicted_cos_angle(100, branch_scale=c / 10))
        assert angle == pytest.approx(published, abs=0.045)
    assert math.acos(scaling.predicted_cos_angle(100)) == pytest.approx(1.45, abs=0.01)


@pytest.mark.parametrize(
    "bad", [{"depth": -1}, {"depth": 3, "branch_scale": 2.0}, {"depth": 1, "contributions": [1.0]}]
)
def test_predicted_angle_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        scaling.predicted_cos_angle(**bad)


PUBLISHED = {
    "ntk": {5: (0.1, 0.3), 10: (0.1, 0.3), 20: (0.1, 0.3), 40: (0.1, 0.3)},
    "mup": {5: (1.6, 1.6), 10: (2.4, 2.4), 20: (3.6, 3.6), 40: (5.3, 5.3)},
    "fsc": {5: (0.7, 0.9), 10: (0.7, 0.9), 20: (0.7, 0.9), 40: (0.7, 0.9)},
}


@pytest.mark.slow
@pytest.mark.parametrize("depth", [5, 10, 20, 40])
@pytest.mark.parametrize("scheme", ["ntk", "mup", "fsc"])
def test_published_sensitivities(scheme: str, depth: int) -> None:
    """Sensitivity after the ReLU at width 400, |x| = 1, y = 1, to first order and in a small finite step."""
    seeds, step = 8, 1e-3
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, groups = made(scheme, 400, depth, lr=step)
        rates = {f"^{group['name']}.weight$": group["lr"] for group in groups}
        lin = Linearization(model, squared, row(), layers="auto", dtype=torch.float64)
        moves = formula.gradient_descent(rates, lin.names, lin.gradients)
        real, first = lin.forward([p + d for p, d in zip(lin.parameters, moves, strict=True)]), lin.jvp(moves)
        (f,), (after,), (change,) = lin.features[-1], real.features[-1], first.features[-1]
        change = change * (f > 0)
        moved = after.relu() - f.relu()
        found.append([rms(moved) / abs(real.loss - lin.loss).item(), rms(change) / abs(first.loss).item()])
    got = torch.tensor(found)
    low, high = PUBLISHED[scheme][depth]
    mean, error = got.mean(0), got.std(0) / seeds**0.5
    # The published numbers are means over seeds read off a figure: 10%, and three standard errors.
    assert torch.all((mean >= 0.9 * low - 3 * error) & (mean <= 1.1 * high + 3 * error)), f"{mean} +- {error}"
    assert torch.allclose(got[:, 0], got[:, 1], rtol=0.05)


def rms(x: Any) -> Any:
    return x.square().mean().sqrt().item()
