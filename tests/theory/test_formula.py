"""The feature speed formula on models: identity against forward mode, any optimizer's update, contributions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastfs
from fastfs import formula
from fastfs._network.linearization import Linearization
from tests.helpers.formula_cases import assert_left, case, leave

CASES = ["mlp", "resnet", "convolutional", "transformer"]


@pytest.fixture(params=CASES)
def task(request: pytest.FixtureRequest) -> Any:
    return case(request.param)


@pytest.mark.parametrize("rule", ["lr", "lrs", "adam", "updates"])
def test_identity_against_forward_mode(task: Any, rule: str) -> None:
    model, loss_fn, batch = task
    before = leave(model)
    names = [name for name, _ in model.named_parameters()]
    generator = torch.Generator().manual_seed(1)
    how = {
        "lr": {"lr": 0.1},
        "lrs": {"lr": {rf"^{name}$": 0.01 * (i + 1) for i, name in enumerate(names)}},
        "adam": {"optimizer": torch.optim.Adam(model.parameters(), lr=1e-3)},
        "updates": {"updates": {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}},
    }[rule]
    found = formula.measure(model, loss_fn, batch, first_order=True, dtype=torch.float64, **how)

    assert found.cut == [True] * len(found.layers)
    size = found.stats.abs_update_dot_backward
    assert ((found.stats.update_dot_backward + found.aligned_decrease).abs() <= 1e-10 * size).all()
    assert (found.residual.abs() <= 1e-10 * size / found.aligned_decrease.abs()).all()
    error = (found.predicted_update_rms / found.stats.update_rms - 1).abs()
    assert (error <= 1e-10 * size / found.aligned_decrease.abs()).all()
    assert torch.allclose(found.contribution.cumsum(0), found.aligned_decrease, rtol=1e-12, atol=0)
    assert math.isclose(-found.total_decrease, found.loss_change, rel_tol=1e-10)
    assert (found.stats.rounding_sq == 0).all()
    assert_left(model, before)


def test_gradient_descent_decreases_by_lr_times_squared_gradients(task: Any) -> None:
    model, loss_fn, batch = task
    found = formula.measure(model, loss_fn, batch, lr=0.25, dtype=torch.float64)
    expected = 0.25 * found.parameter_stats.gradient_sq
    assert torch.allclose(found.parameter_stats.aligned_decrease, expected, rtol=1e-13)
    assert math.isclose(found.total_decrease, expected.sum(), rel_tol=1e-13)


def test_finite_steps_tend_to_the_first_order(task: Any) -> None:
    model, loss_fn, batch = task
    exact = formula.measure(model, loss_fn, batch, lr=1e-6, dtype=torch.float64, first_order=True)
    errors = []
    for lr in (1e-4, 1e-5):
        step = formula.measure(model, loss_fn, batch, lr=lr, dtype=torch.float64)
        assert not step.first_order
        errors.append((step.stats.update_rms / exact.stats.update_rms * 1e-6 / lr - 1).abs().max())
        assert ((step.stats.feature_rms - exact.stats.feature_rms).abs() <= 1e-12 * exact.stats.feature_rms).all()
    assert errors[1] < 2e-3
    assert errors[1] < 0.3 * errors[0]


def test_parts_of_the_update_and_sensitivity(task: Any) -> None:
    model, loss_fn, batch = task
    found = formula.measure(model, loss_fn, batch, lr=0.1, dtype=torch.float64, first_order=True)
    both = (found.aligned_update_rms.square() + found.orthogonal_update_rms.square()).sqrt()
    assert torch.allclose(both, found.stats.update_rms, rtol=1e-10)
    assert torch.allclose(found.sensitivity, found.stats.update_rms / found.loss_change.abs())

    lin = Linearization(model, loss_fn, batch, dtype=torch.float64)
    changes = lin.jvp([-0.1 * g for g in lin.gradients]).features
    for (df,), (b,), aligned, orthogonal in zip(
        changes, lin.backward, found.aligned_update_rms, found.orthogonal_update_rms, strict=True
    ):
        along, across = formula.decompose(df, b)
        assert torch.allclose(along + across, df, rtol=1e-12, atol=1e-15)
        assert abs((across * b).sum()) <= 1e-12 * across.norm() * b.norm()
        assert math.isclose(along.square().mean().sqrt(), abs(aligned), rel_tol=1e-9)
        assert math.isclose(across.square().mean().sqrt(), orthogonal, rel_tol=1e-9)


def test_groups_add_up_to_the_whole(task: Any) -> None:
    model, loss_fn, batch = task
    found = formula.measure(model, loss_fn, batch, lr=0.1, groups={"blocks": r"^blocks", "rest": r"^(?!blocks)"})
    assert math.isclose(sum(found.groups.values()), found.total_decrease, rel_tol=1e-12)
    assert found.groups["blocks"] > 0


def test_a_part_of_the_parameters(task: Any) -> None:
    model, loss_fn, batch = task
    found = formula.measure(
        model, loss_fn, batch, lr=0.1, parameters=r"^blocks\.1\.", dtype=torch.float64, first_order=True
    )
    assert all(name.startswith("blocks.1.") for name in found.parameters)
    assert found.stats.update_sq[0] == 0
    assert found.aligned_decrease[0] == 0
    assert (found.residual[1:].abs() < 1e-10).all()
    assert torch.equal(found.contribution[2:], torch.zeros_like(found.contribution[2:]))


def optimizers() -> dict[str, Any]:
    def muon(model: Any) -> Any:
        return torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=1e-2)

    def scheduled(model: Any) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # type: ignore[attr-defined]
        return optimizer

    return {
        "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2),
        "scheduled": scheduled,
        "adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, amsgrad=True),
        "adamw": lambda m: torch.optim.AdamW(
            [{"params": list(m.parameters())[:2], "lr": 1e-3}, {"params": list(m.parameters())[2:]}],
            lr=1e-2,
            foreach=True,
        ),
        "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
        "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-2, momentum=0.5, centered=True),
        "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
        "muon": muon,
    }


@pytest.mark.parametrize("name", optimizers())
def test_the_update_is_the_one_that_the_optimizer_does(name: Any) -> None:
    model, loss_fn, batch = case("resnet")
    optimizer = optimizers()[name](model)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append(True))
    for _ in range(3):  # gives the optimizer a state
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    called.clear()
    state, before = copy.deepcopy(optimizer.state_dict()), leave(model)
    lin = Linearization(model, loss_fn, batch)
    updates = formula.optimizer_update(optimizer, lin.originals, lin.gradients)
    assert not called
    assert_left(model, before)
    now = optimizer.state_dict()
    assert all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for key, values in state["state"].items()
        for x, y in zip(values.values(), now["state"][key].values(), strict=True)
    )
    assert state["param_groups"] == now["param_groups"]

    old = [p.detach().clone() for p in lin.originals]
    optimizer.zero_grad()
    loss_fn(model, batch).backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(lin.gradients, lin.originals, strict=True))
    optimizer.step()
    for update, p, w in zip(updates, lin.originals, old, strict=True):
        assert torch.equal(update, p.detach() - w)
    assert any(bool(update.any()) for update in updates)


def test_16_bit_parameters_have_updates_in_float32() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updates = formula.optimizer_update(
        optimizer, list(model.parameters()), [torch.ones_like(p, dtype=torch.float64) for p in model.parameters()]
    )
    assert all(u.dtype == torch.float32 for u in updates)
    expected = (model[0].weight.detach() - 0.1).float() - model[0].weight.detach().float()
    assert torch.equal(updates[0], expected)


def test_optimizer_that_keeps_another_inside() -> None:
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner: Any) -> None:
            self.inner = inner
            super().__init__([p for g in inner.param_groups for p in g["params"]], {})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.inner.step()
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(0.5)

    model, loss_fn, batch = case("mlp")
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1))
    before = leave(model)
    lin = Linearization(model, loss_fn, batch)
    updates = formula.optimizer_update(optimizer, lin.originals, lin.gradients)
    assert_left(model, before)
    for update, p, g in zip(updates, lin.originals, lin.gradients, strict=True):
        assert torch.allclose(update, 0.5 * (p - 0.1 * g) - p, atol=1e-6)


def test_a_monitor_on_the_same_model_is_not_disturbed(tmp_path: Path) -> None:
    records = []
    for measured in (False, True):
        model, loss_fn, batch = case("resnet")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen: list[Any] = []
        with fastfs.Monitor(model, optimizer, every=1, sinks=[seen.extend], verbose=False):
            for _ in range(3):
                if measured:
                    formula.measure(model, loss_fn, batch, optimizer=optimizer)
                optimizer.zero_grad()
                loss_fn(model, batch).backward()
                optimizer.step()
        changing = {"run", "time", "overhead_seconds"}
        measured_rows = [row for row in seen if row["kind"] == "measured"]
        records.append([{k: v for k, v in row.items() if k not in changing} for row in measured_rows])
    assert len(records[0]) == 3 * 6
    assert repr(records[0]) == repr(records[1])


def test_it_agrees_with_the_monitor() -> None:
    model, loss_fn, batch = case("transformer")
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen: list[Any] = []
    with fastfs.Monitor(model, optimizer, every=1, rows=None, sinks=[seen.extend], verbose=False):
        expected = formula.measure(model, loss_fn, batch, optimizer=optimizer)
        loss_fn(model, batch).backward()
        optimizer.step()
    measured = [row for row in seen if row["kind"] == "measured"]
    columns = {name: [row[name] for row in measured] for name in measured[0]}
    for name in ("angle", "update_rms", "feature_rms", "backward_rms"):
        assert torch.allclose(torch.tensor(columns[name]), getattr(expected.stats, name).float(), rtol=1e-4), name
    for name in ("aligned_decrease", "residual"):
        got, wanted = torch.tensor(columns[name]), getattr(expected, name).float()
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4), name


def test_tables() -> None:
    model, loss_fn, batch = case("resnet")
    found = formula.measure(model, loss_fn, batch, lr=0.1)
    frame = found.to_frame()
    assert list(frame["layer"]) == [f"blocks.{i}" for i in range(6)]
    assert frame["angle"].between(0, math.pi).all()
    assert "blocks.5" in str(found)
    assert "finite step" in str(found)


# Layers that are not cuts, and invalid input.


def test_no_prediction_where_the_layer_is_no_cut() -> None:
    model, loss_fn, batch = case("transformer")
    found = formula.measure(
        model, loss_fn, batch, layers=r"blocks\.1(\.mlp_in)?$", lr=0.1, first_order=True, dtype=torch.float64
    )
    assert found.layers == ["blocks.1", "blocks.1.mlp_in"]
    assert found.cut == [True, False]
    assert "residual branch" in found.reason[1]
    assert found.residual[0].abs() < 1e-10
    assert math.isnan(found.residual[1])
    assert math.isnan(found.predicted_update_rms[1])
    assert found.stats.update_rms[1] > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": None}, TypeError, "exactly one of lr, optimizer and updates, got none"),
        ({"updates": {}}, TypeError, "got lr and updates"),
        ({"lr": -1.0}, ValueError, "finite number >= 0, got -1.0"),
        ({"lr": "fast"}, TypeError, "expected a number"),
        ({"lr": {"stem": 1.0}}, ValueError, "exactly one expression to find parameter 'blocks.0.linear.weight'"),
        ({"lr": {".": 1.0, "nothing": 1.0}}, ValueError, r"\['nothing'\] find no parameter"),
        ({"lr": {"(": 1.0}}, ValueError, "not a regular expression"),
        ({"lr": {".": torch.ones(7, 7)}}, ValueError, r"broadcasts to \(32, 10\), got \(7, 7\)"),
        ({"lr": None, "updates": {"steam": torch.ones(3)}}, ValueError, r"is called \['steam'\]"),
        ({"lr": None, "updates": {"stem.weight": torch.ones(3)}}, ValueError, r"expected shape \(32, 10\)"),
        ({"lr": None, "optimizer": "adam"}, TypeError, "expected a torch.optim.Optimizer, got str"),
        ({"parameters": "none"}, ValueError, "'none' finds none of stem.weight"),
        ({"groups": {"a": "none"}}, ValueError, "finds no parameter among stem.weight"),
        ({"layers": "none"}, ValueError, "matches no module"),
        ({"dtype": torch.int64}, TypeError, "floating-point dtype"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: Any, message: str) -> None:
    model, loss_fn, batch = case("resnet")
    before = leave(model)
    with pytest.raises(error, match=message):
        formula.measure(model, loss_fn, batch, **{"lr": 0.1, **change})
    assert_left(model, before)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda m, b: m(b[0]), TypeError, r"scalar tensor, got a tensor of shape \(6, 1\)"),
        (lambda m, b: m(b[0]).sum().item(), TypeError, "scalar tensor, got float"),
        (lambda m, b: m(b[0]).sum() * math.nan, ValueError, "finite loss, got nan"),
        (lambda m, b: m(b[0]).detach().sum(), ValueError, "depends on none of the 8 parameters"),
        ("mse", TypeError, "expected a function"),
    ],
)
def test_bad_losses(loss_fn: Callable[..., Any] | str, error: Any, message: str) -> None:
    model, _, batch = case("resnet")
    with pytest.raises(error, match=message):
        formula.measure(model, loss_fn, batch, lr=0.1)


def test_optimizers_that_have_no_update_of_one_gradient() -> None:
    model, loss_fn, batch = case("mlp")
    with pytest.raises(TypeError, match="LBFGS"):
        formula.measure(model, loss_fn, batch, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="has none of the parameters"):
        formula.measure(model, loss_fn, batch, optimizer=torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0))


def test_a_model_that_has_moved_has_to_be_linearized_again() -> None:
    model, loss_fn, batch = case("mlp")
    lin = Linearization(model, loss_fn, batch)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="have changed; linearize it again"):
        lin.forward(lin.parameters)


def test_relations() -> None:
    decrease, cosine, norm = torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.25]), torch.tensor([4.0, 2.0])
    assert torch.equal(formula.predicted_update_norm(decrease, cosine, norm), torch.tensor([1.0, 2.0]))
    assert torch.equal(formula.residual(decrease, torch.tensor([-2.0, -2.0])), torch.tensor([0.0, 0.5]))
    assert torch.equal(formula.sensitivity(norm, torch.tensor([-2.0, 4.0])), torch.tensor([2.0, 0.5]))
    assert formula.aligned_decrease([torch.ones(3), torch.ones(2)], [-torch.ones(3), torch.ones(2)]) == 1.0
    along, across = formula.decompose(torch.tensor([1.0, 2.0]), torch.zeros(2))
    assert torch.equal(along, torch.zeros(2))
    assert torch.equal(across, torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="of one shape"):
        formula.decompose(torch.ones(2), torch.ones(3))
