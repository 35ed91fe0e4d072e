"""UpdateMeter: copies, groups, gradients that come and go, steps that are skipped, and wrong use."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastfs import ParameterStats
from fastfs._monitor.measure.closed_forms import CLOSED_FORMS
from fastfs._monitor.measure.measured_update import OF_UPDATE
from fastfs._monitor.measure.update_meter import UpdateMeter
from tests.helpers.compare import assert_same, assert_step
from tests.helpers.optimizer_cases import check_step, give_gradients, make_optimizer, make_parameters, truth


@pytest.mark.parametrize("nesterov", [False, True])
def test_copies_of_everything(nesterov: bool) -> None:
    meter = UpdateMeter(
        SGD(make_parameters(torch.float32), lr=0.1, momentum=0.9, nesterov=nesterov, foreach=True), copy_all=True
    )
    with pytest.raises(RuntimeError, match=r"expected a call of before\(\) right before the last step"):
        _ = meter.previous
    for _ in range(3):
        old = [p.clone() for p in meter.parameters]
        check_step(meter, torch.float32)
        assert len(meter.previous) == len(old)
        for a, b in zip(meter.previous, old, strict=True):
            assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=r"expected UpdateMeter\(optimizer, copy_all=True\)"):
        _ = UpdateMeter(meter.optimizer).previous


def test_groups_of_all_kinds() -> None:
    """Options, dtypes and learning rates by group; frozen parameters; a group that is added later."""
    a, b, c = make_parameters(torch.float32), make_parameters(torch.float64), make_parameters(torch.float32)
    groups = [
        {"params": a, "momentum": 0.9, "nesterov": True, "foreach": True},
        {"params": b, "lr": 0.5, "weight_decay": 0.1},
        {"params": c, "momentum": 0.5, "maximize": True},
    ]
    meter = UpdateMeter(SGD(groups, lr=0.1))
    for _ in range(2):
        check_mixed(meter)
    meter.optimizer.add_param_group({"params": [torch.randn(5, 6, dtype=torch.bfloat16)], "lr": 0.3})
    for _ in range(2):
        stats = check_mixed(meter)
    assert stats.shape == (22,)
    assert meter.copied_bytes == 60
    assert meter.method == (
        "14 parameters by the closed form of SGD, up to float32 rounding; 7 parameters by the closed form of SGD, "
        "up to float64 rounding; 1 parameter from a copy made before the step, exactly."
    )


def check_mixed(meter: UpdateMeter) -> ParameterStats:
    return check_step(meter, torch.float32)


def test_gradients_come_and_go() -> None:
    parameters = [torch.randn(n, dtype=torch.float64) for n in (3, 5, 7)]
    meter = UpdateMeter(AdamW(parameters, lr=0.1))
    for present in ((0, 1, 2), (1,), (), (0, 2), (2,)):
        before = [p.clone() for p in parameters]
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p) if i in present else None
        meter.before()
        meter.optimizer.step()
        stats = meter.after().stats
        for i, p in enumerate(parameters):
            if i in present:
                expected = truth([p.grad], [before[i]], [p])[0]  # type: ignore[list-item]
                assert_step(stats.sums[i], expected, torch.float64, f"{present}")
            else:
                assert not stats.sums[i].any()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.SparseAdam])
def test_sparse_gradients_are_made_dense(kind: type[Optimizer]) -> None:
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    meter = UpdateMeter(kind(embedding.parameters(), lr=0.1))  # type: ignore[call-arg]
    for _ in range(2):
        meter.optimizer.zero_grad()
        before = embedding.weight.detach().clone()
        embedding(torch.tensor([1, 3, 3])).square().sum().backward()
        meter.before()
        meter.optimizer.step()
        gradient = embedding.weight.grad
        assert gradient is not None
        expected = truth([gradient.to_dense()], [before], [embedding.weight])
        assert_step(meter.after().stats.sums[0], expected[0], torch.float32)
    assert meter.copied_bytes == 160


@pytest.mark.parametrize("kind", dict.fromkeys(f.optimizer for f in CLOSED_FORMS if "fused" in f.implementations))
def test_steps_that_a_scaler_skips(kind: type[Optimizer]) -> None:
    """GradScaler leaves it to a fused optimizer to skip a step, on the device."""
    parameters = [torch.nn.Parameter(torch.randn(20)), torch.nn.Parameter(torch.randn(4, 5))]
    optimizer = make_optimizer(kind, list(parameters), {"lr": 0.1, "fused": True})
    meter = UpdateMeter(optimizer)
    found: list[ParameterStats] = []
    optimizer.register_step_pre_hook(lambda *_: meter.before())
    optimizer.register_step_post_hook(lambda *_: found.append(meter.after().stats))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in parameters]
        x = torch.randn(20)
        scaler.scale((parameters[0] * x).sum() + (parameters[1] * x.view(4, 5)).sum()).backward()
        if step in (0, 2):
            parameters[1].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        stats = found[-1]
        assert len(found) == step + 1
        if step in (0, 2):
            assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
            assert not stats.sums[:, OF_UPDATE].any()
            assert stats.nonfinite.tolist() == [0, 1]
        else:
            expected = truth([x, x.view(4, 5)], before, parameters)
            for i in range(2):
                assert_step(stats.sums[i], expected[i], torch.float32, f"step {step} parameter {i}")


def test_same_sums_as_from_copies_of_linear_16_bit() -> None:
    parameters = make_parameters(torch.bfloat16)
    twins = [p.clone() for p in parameters]
    meters = UpdateMeter(SGD(parameters, lr=0.1)), UpdateMeter(SGD(twins, lr=0.1), copy_all=True)
    give_gradients(parameters)
    for p, q in zip(parameters, twins, strict=True):
        q.grad = p.grad
    results = []
    for meter in meters:
        meter.before()
        meter.optimizer.step()
        results.append(meter.after().stats.sums)
    assert_same(*results)


def test_wrong_use() -> None:
    p = torch.randn(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"^UpdateMeter: expected an optimizer with one update per step, got LBFGS$"):
        UpdateMeter(torch.optim.LBFGS([p]))
    meter = UpdateMeter(Adam([p]))
    with pytest.raises(RuntimeError, match=r"expected a call of before\(\) right before this step"):
        meter.after()
    p.grad = torch.ones(3)
    meter.before()
    with pytest.raises(RuntimeError, match="the optimizer's state has no 'step'; call it right after step"):
        meter.after()
    with pytest.raises(RuntimeError, match=r"expected a call of before\(\) right before this step"):
        meter.after()
    eighth = torch.randn(3).to(torch.float8_e4m3fn)
    eighth.grad = torch.ones(3).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"^parameter 1 has dtype torch.float8_e4m3fn, expected one of torch.float16"):
        UpdateMeter(SGD([p, eighth], lr=0.1)).before()


def test_no_parameters_with_gradients() -> None:
    meter = UpdateMeter(SGD([torch.randn(3), torch.randn(2)], lr=0.1))
    meter.before()
    stats = meter.after().stats
    assert stats.shape == (2,)
    assert not stats.sums.any()


def test_derived_quantities() -> None:
    p = torch.tensor([3.0, 4.0], dtype=torch.float64)
    p.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
    meter = UpdateMeter(SGD([p], lr=0.5))
    meter.before()
    meter.optimizer.step()
    stats = meter.after().stats
    assert stats.to_dict()["parameter_norm"] == pytest.approx([(2.5**2 + 16) ** 0.5])
    assert stats.relative_update.item() == pytest.approx(0.5 / (2.5**2 + 16) ** 0.5)
    assert stats.aligned_decrease.tolist() == [0.5]
    assert stats.cos_angle.tolist() == [1.0]
    assert (stats.update_norm.item(), stats.gradient_norm.item(), stats.count.item()) == (0.5, 1.0, 2)
    assert "relative_update" in repr(stats)
    assert (stats + stats).parameter_sq.item() == pytest.approx(2 * (2.5**2 + 16))
