"""Whatever happens around a step: the numbers are those of the real update, or nan with a reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adamax, AdamW, NAdam, Optimizer, RMSprop

from fastfs._monitor.capture.taps import EVERYTHING, Switch
from fastfs._monitor.measure.closed_forms import CLOSED_FORMS
from fastfs._monitor.measure.gradient_treatment import GradientFactor
from fastfs._monitor.measure.measured_update import MeasuredUpdate
from fastfs._monitor.measure.parameters import Parameters
from fastfs._monitor.measure.update_meter import UpdateMeter
from fastfs._monitor.optimizers import check_optimizers
from fastfs._record import decrease_reasons
from tests.helpers.optimizer_cases import COPIED, OPTIONS, as_on_a_device

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.bfloat16)
Hook = Callable[[Optimizer, list[Tensor]], None]


def _raise(error: Exception) -> None:
    raise error


@pytest.fixture(params=["host", "device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without what can be known of tensors on the CPU at once."""
    if request.param == "device":
        as_on_a_device(monkeypatch)


def _lr(factor: float) -> Hook:
    def hook(optimizer: Optimizer, _: list[Tensor]) -> None:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].mul_(factor)
            else:
                group["lr"] *= factor

    return hook


def _each(change: Callable[[Tensor], object]) -> Hook:
    def hook(_: Optimizer, parameters: list[Tensor]) -> None:
        with torch.no_grad():
            for p in parameters:
                change(p)

    return hook


def _gradients(change: Callable[[Tensor], object]) -> Hook:
    return _each(lambda p: None if p.grad is None else change(p.grad))


HOOKS: dict[str, Hook] = {
    "lr doubled": _lr(2.0),
    "lr zero": _lr(0.0),
    "gradients scaled": _gradients(lambda g: g.mul_(0.1)),
    "gradients scaled behind": _gradients(lambda g: g.data.mul_(0.1)),
    "gradients zeroed": _gradients(lambda g: g.zero_()),
    "gradients cleared": lambda optimizer, _: optimizer.zero_grad(),
    "parameters clamped": _each(lambda p: p.data.copy_(p.real.clamp(-0.5, 0.5))),
    "parameters masked": _each(lambda p: p.mul_(torch.arange(p.numel()).view(p.shape) % 3 != 0)),
    "parameters shrunk": _each(lambda p: p.data.mul_(0.99)),
}
KINDS: dict[type[Optimizer], list[dict[str, Any]]] = {
    kind: [options for form in CLOSED_FORMS if form.optimizer is kind for options in OPTIONS[form.name]]
    for kind in dict.fromkeys(form.optimizer for form in CLOSED_FORMS)
}
KINDS[AdamW].append({"differentiable": True})
KINDS.update({kind: [options] for kind, options in COPIED if kind in (NAdam, Adagrad)})
FUSED = {form.optimizer for form in CLOSED_FORMS if "fused" in form.implementations}
SHAPES = ((5, 3), (40, 9), (), (7,), (0, 2), (6,))


@st.composite
def loops(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(list(KINDS)))
    options = dict(draw(st.sampled_from(KINDS[kind])))
    dtype = draw(st.sampled_from(DTYPES))
    if kind is Adagrad and dtype.is_complex:
        dtype = torch.float32
    how = draw(st.sampled_from(["loop", "foreach", "fused"]))
    if how == "fused" and kind in FUSED and "differentiable" not in options and dtype in (torch.float32, torch.float64):
        options["fused"] = True
    elif not options.get("differentiable"):
        options["foreach"] = how == "foreach"
    lr: Any = 0.01
    if draw(st.booleans()) and not options.get("foreach") and kind is not NAdam:
        lr = torch.tensor(0.01, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    return {
        "kind": kind,
        "options": options | {"lr": lr},
        "dtype": dtype,
        "hooks": draw(st.lists(st.tuples(st.sampled_from(list(HOOKS)), st.sampled_from(["pre", "post"])), max_size=2)),
        "copy_all": draw(st.booleans()),
        "seed": draw(st.integers(0, 100)),
    }


def doubles(x: Tensor) -> Tensor:
    x = x.detach()
    return (torch.view_as_real(x) if x.is_complex() else x).double().flatten()


@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning", "ignore:Casting complex values:UserWarning")
@given(loop=loops())
@settings(max_examples=150)
def test_right_or_nan_with_a_reason(loop: dict[str, Any]) -> None:
    """The hooks run between `before` and `after`: those of the step itself, and those registered behind the meter's."""
    torch.manual_seed(loop["seed"])
    parameters = [torch.randn(s, dtype=loop["dtype"]) for s in SHAPES]
    optimizer = loop["kind"](parameters, **loop["options"])
    meter = UpdateMeter(optimizer, copy_all=loop["copy_all"])
    fine = 0
    for step in range(3):
        for i, p in enumerate(parameters):
            p.grad = None if i == 5 else torch.randn_like(p)
        gradients = [None if p.grad is None else doubles(p.grad).clone() for p in parameters]
        old = [doubles(p).clone() for p in parameters]
        meter.before()
        for name, place in loop["hooks"] if step else ():
            if place == "pre" and name != "gradients cleared":
                HOOKS[name](optimizer, parameters)
        optimizer.step()
        for name, place in loop["hooks"] if step else ():
            if place == "post":
                HOOKS[name](optimizer, parameters)
        found = meter.after()
        for i, p in enumerate(parameters):
            dw = doubles(p) - old[i]
            g = gradients[i]
            code, sums = int(found.reason[i]), found.stats.sums[i]
            values = [float(getattr(found.stats, name)[i]) for name in ("dot", "update_sq", "gradient_sq")]
            if g is None:
                assert not sums.any()
                continue
            truth = (float(g @ dw), float(dw @ dw), float(g @ g))
            rounding = 8 * torch.finfo(loop["dtype"]).eps * float(doubles(p).norm() + old[i].norm())
            size = rounding + 1e-5 * float(dw.norm()) + 1e-30
            errors = (float(g.norm()) * size, 2 * float(dw.norm()) * size + size**2, 1e-4 * float(g @ g) + 1e-30)
            for value, true, error in zip(values, truth, errors, strict=True):
                if math.isnan(value):
                    assert code != decrease_reasons.FINE
                else:
                    assert abs(value - true) <= error, (i, step, code, sums, truth, errors)
            fine += code == decrease_reasons.FINE
            assert code == decrease_reasons.FINE or decrease_reasons.REASONS[code]
    if not loop["hooks"]:
        assert fine == 15, "an update is not known although nothing else changed"


def test_what_a_post_hook_does_changes_nothing(where: None) -> None:
    """A scheduler, or gradients cleared: the step used what was there before it."""
    for name in ("lr doubled", "gradients cleared"):
        for kind in (SGD, AdamW, Adamax, RMSprop):
            p = nn.Parameter(torch.randn(20, 10))
            meter = UpdateMeter(kind([p], lr=0.01))
            for _ in range(3):
                p.grad = torch.randn_like(p)
                g, old = p.grad.clone(), p.detach().clone()
                meter.before()
                meter.optimizer.step()
                HOOKS[name](meter.optimizer, [p])
                found = meter.after()
                assert found.reason.tolist() == [decrease_reasons.FINE]
                assert found.stats.dot.item() == pytest.approx(float((g * (p.detach() - old)).sum()), rel=1e-4)


def test_gradients_that_the_step_rewrites_are_copied_from_then_on(where: None) -> None:
    class Rewrites(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.div_(7)
            super().step()

    p = nn.Parameter(torch.randn(20, 10))
    meter = UpdateMeter(Rewrites([p], lr=0.1))
    for step in range(3):
        p.grad = torch.randn_like(p)
        g, old = p.grad.clone(), p.detach().clone()
        meter.before()
        meter.optimizer.step()
        found = meter.after()
        truth = float((g * (p.detach() - old)).sum())
        if step == 0:
            assert found.reason.tolist() == [decrease_reasons.REWRITTEN]
            assert found.stats.dot.isnan().all()
            assert found.stats.gradient_sq.isnan().all()
            assert found.stats.update_sq.item() == pytest.approx(float((p.detach() - old).square().sum()), rel=1e-5)
        else:
            assert found.reason.tolist() == [decrease_reasons.FINE]
            assert found.stats.dot.item() == pytest.approx(truth, rel=1e-5)


# Between backward and step


def make(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Optimizer, Parameters, GradientFactor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3)).to(dtype)
    optimizer = SGD(model.parameters(), lr=0.1)
    parameters = Parameters(check_optimizers(model, optimizer), snapshot=False)
    switch = Switch()
    switch.level = EVERYTHING
    return model, optimizer, parameters, GradientFactor(parameters.groups, switch, always=False, failed=_raise)


def take_step(optimizer: Optimizer, parameters: Parameters, factor: GradientFactor) -> MeasuredUpdate:
    parameters.before(0, False, factor)
    optimizer.step()
    parameters.after(0, False)
    return parameters.take(torch.device("cpu"))


def step_of(
    between: Callable[[nn.Module], object], backwards: int = 1, seed: int = 0
) -> tuple[Any, Tensor, list[float]]:
    """Returns what is found of a step, and the true <g, dw> and |g|^2 with the gradients of the backward."""
    model, optimizer, parameters, factor = make()
    torch.manual_seed(seed)
    for _ in range(backwards):
        model(torch.randn(8, 6, dtype=torch.float64)).square().sum().backward()
    assert factor.waiting
    own = list(model.parameters())
    gradients = [p.grad.clone() for p in own]
    old = [p.detach().clone() for p in own]
    between(model)
    found = take_step(optimizer, parameters, factor)
    dots = [float((g * (p.detach() - q)).sum()) for g, p, q in zip(gradients, own, old, strict=True)]
    factor.close()
    return found, torch.tensor([float(g.square().sum()) for g in gradients], dtype=torch.float64), dots


def clip_each(model: nn.Module) -> None:
    for i, p in enumerate(model.parameters()):
        p.grad = p.grad * 0.1 * (i + 1)


FACTORS: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda m: None,
    "clipped": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e-3),
    "clipped behind": lambda m: [p.grad.data.mul_(1e-3) for p in m.parameters()],
    "some": lambda m: nn.utils.clip_grad_norm_(list(m.parameters())[2:], 1e-3),
    "each": clip_each,
    "negated": lambda m: [p.grad.neg_() for p in m.parameters()],
}


@pytest.mark.parametrize("how", FACTORS)
@pytest.mark.parametrize("backwards", [1, 3])
def test_factors_are_taken_out(how: str, backwards: int, where: None) -> None:
    found, squares, dots = step_of(FACTORS[how], backwards)
    assert found.reason.tolist() == [decrease_reasons.FINE] * 4
    assert found.stats.dot.tolist() == pytest.approx(dots, rel=1e-9)
    assert found.stats.gradient_sq.tolist() == pytest.approx(squares.tolist(), rel=1e-9)


def test_other_changes_are_detected_by_parameter(where: None) -> None:
    def by_value(model: Any) -> None:
        nn.utils.clip_grad_value_([model[0].weight], 1e-3)

    found, _, dots = step_of(by_value)
    assert found.reason.tolist() == [decrease_reasons.CHANGED, *[decrease_reasons.FINE] * 3]
    assert found.stats.dot.isnan().tolist() == [True, False, False, False]
    assert found.stats.dot.tolist()[1:] == pytest.approx(dots[1:], rel=1e-9)
    found, *_ = step_of(lambda model: [p.grad.add_(torch.randn_like(p), alpha=0.1) for p in model.parameters()])
    assert found.reason.tolist() == [decrease_reasons.CHANGED] * 4


def test_gradients_that_are_all_zero_take_the_factor_of_the_others(where: None) -> None:
    """So do those of LoRA's first matrix, in the first step."""

    def zero(model: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    model, optimizer, parameters, factor = make()
    nn.init.zeros_(model[2].weight)
    model(torch.randn(8, 6, dtype=torch.float64)).sum().backward()
    assert not model[0].weight.grad.any()
    zero(model)
    found = take_step(optimizer, parameters, factor)
    assert found.reason.tolist() == [decrease_reasons.FINE] * 4
    assert found.stats.dot.isfinite().all()


def test_gradients_from_elsewhere() -> None:
    model, optimizer, parameters, factor = make()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    found = take_step(optimizer, parameters, factor)
    assert found.reason.tolist() == [decrease_reasons.UNSEEN] * 4
    assert found.stats.dot.isnan().all()


def test_gradients_between_backwards() -> None:
    model, _, _, factor = make()
    assert not factor.waiting
    assert not factor.written_since_backward()
    x = torch.randn(8, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    assert factor.waiting
    assert not factor.thrown_away()  # type: ignore[unreachable]
    assert not factor.written_since_backward()
    assert factor.nonzero()
    torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert not factor.written_since_backward()
    model.zero_grad(set_to_none=False)
    assert factor.written_since_backward()
    assert not factor.nonzero()
    assert not factor.thrown_away()
    model(x).square().sum().backward()
    assert not factor.written_since_backward()
    model.zero_grad()
    assert factor.written_since_backward()
    assert factor.thrown_away()
    factor.clear()
    assert not factor.waiting


def test_a_failed_backward_is_forgotten() -> None:
    model, optimizer, parameters, factor = make()
    out = model(torch.randn(8, 6, dtype=torch.float64))
    handle = model[0].weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()
    handle.remove()
    factor.begin()
    optimizer.zero_grad()
    model(torch.randn(8, 6, dtype=torch.float64)).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert take_step(optimizer, parameters, factor).reason.tolist() == [decrease_reasons.FINE] * 4


def test_a_group_that_is_added_between_backward_and_step_is_no_write() -> None:
    model, optimizer, parameters, factor = make()
    model(torch.randn(8, 6, dtype=torch.float64)).sum().backward()
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(5, dtype=torch.float64))]})
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    found = take_step(optimizer, parameters, factor)
    assert found.reason.tolist() == [decrease_reasons.FINE] * 5
    assert found.stats.dot.isfinite().all()
