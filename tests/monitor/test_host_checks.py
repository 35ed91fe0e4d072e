"""Steps that are checked on the host alone: their numbers are right, and what the checks detect has a reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Adamax, AdamW, Optimizer, RMSprop

from fastfs._monitor.capture.taps import GRADIENTS, Switch
from fastfs._monitor.measure.full_checks import FIRST, PERIOD, FullCheckSchedule
from fastfs._monitor.measure.gradient_treatment import GradientFactor
from fastfs._monitor.measure.measured_update import MeasuredUpdate
from fastfs._monitor.measure.parameters import Parameters
from fastfs._monitor.measure.update_meter import UpdateMeter
from fastfs._monitor.optimizers import check_optimizers
from fastfs._record import decrease_reasons

Change = Callable[["Loop"], object]


def _raise(error: Exception) -> None:
    raise error


CPU = torch.device("cpu")


class Loop:
    """A loop whose every step is aligned and none measured, with the true numbers of every step."""

    def __init__(self, kind: type[Optimizer] = AdamW, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6))).double()
        self.own = list(self.model.parameters())
        self.optimizer = kind(self.model.parameters(), **({"lr": 0.01} | options))
        self.parameters = Parameters(check_optimizers(self.model, self.optimizer), snapshot=False)
        switch = Switch()
        switch.level = GRADIENTS
        self.factor = GradientFactor(self.parameters.groups, switch, always=False, failed=_raise)
        self.unverified = 0
        self.number = 0

    def step(
        self, between: Change | None = None, within: Change | None = None
    ) -> tuple[MeasuredUpdate, list[float], list[float]]:
        """What is found, <g, dw> and |g|^2; changes come between backward and step, or behind the step."""
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 6, dtype=torch.float64)).square().sum().backward()
        gradients = [p.grad.clone() for p in self.own]
        old = [p.detach().clone() for p in self.own]
        if between is not None:
            between(self)
        self.parameters.before(0, False, self.factor)
        self.unverified += not self.meter._step.complete
        self.optimizer.step()
        if within is not None:
            within(self)
        self.parameters.after(0, False)
        found = self.parameters.take(CPU)
        self.factor.clear()
        self.parameters.clear()
        self.number += 1
        dots = [float((g * (p.detach() - q)).sum()) for g, p, q in zip(gradients, self.own, old, strict=True)]
        return found, dots, [float(g.square().sum()) for g in gradients]

    @property
    def meter(self) -> UpdateMeter:
        return self.parameters._meters[0]

    def settle(self) -> None:
        """Makes steps until full checks have become rare."""
        for _ in range(FIRST + 3):
            check(*self.step())
        assert self.unverified > 0


def check(found: MeasuredUpdate, dots: list[float], squares: list[float]) -> None:
    assert found.reason.tolist() == [decrease_reasons.FINE] * len(dots)
    assert found.stats.dot.tolist() == pytest.approx(dots, rel=1e-6)
    assert found.stats.gradient_sq.tolist() == pytest.approx(squares, rel=1e-6)


def right_or_null(found: MeasuredUpdate, dots: list[float]) -> None:
    for value, true, code in zip(found.stats.dot.tolist(), dots, found.reason.tolist(), strict=True):
        assert math.isnan(value) == (code != decrease_reasons.FINE)
        assert math.isnan(value) or value == pytest.approx(true, rel=1e-6)


def clip(loop: Loop) -> None:
    nn.utils.clip_grad_norm_(loop.own, 1e-2)


def schedule(loop: Loop) -> None:
    loop.optimizer.param_groups[0]["lr"] *= 0.97


@pytest.mark.parametrize("between", [None, clip, schedule], ids=["plain", "clip", "schedule"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, {}),
        (SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (Adam, {"amsgrad": True}),
        (AdamW, {}),
        (AdamW, {"foreach": True}),
        (AdamW, {"fused": True}),
        (Adamax, {}),
        (RMSprop, {"centered": True}),
        (torch.optim.NAdam, {}),
    ],
)
def test_most_steps_are_not_verified_and_all_are_right(
    kind: type[Optimizer], options: dict[str, Any], between: Change | None
) -> None:
    loop = Loop(kind, **options)
    for _ in range(FIRST + 2 * PERIOD + 4):
        check(*loop.step(between))
    assert loop.unverified >= 2 * PERIOD - 4


def _of(change: Callable[[Tensor], object], *which: int) -> Change:
    def apply(loop: Loop) -> None:
        with torch.no_grad():
            for i in which or range(len(loop.own)):
                change(loop.own[i])

    return apply


def _replace_state(loop: Loop) -> None:
    for p in loop.own:
        loop.optimizer.state[p]["exp_avg"] = loop.optimizer.state[p]["exp_avg"] * 2


def _doubled_rate(loop: Loop) -> None:
    loop.optimizer.param_groups[0]["lr"] *= 2


WITHIN: dict[str, Change] = {
    "a parameter clamped": _of(lambda p: p.clamp_(-0.1, 0.1), 3),
    "all parameters shrunk": _of(lambda p: p.mul_(0.99)),
    "another memory": _of(lambda p: setattr(p, "data", p.data * 0.9), 2),
    "gradients halved": _of(lambda p: p.grad.mul_(0.5)),
    "another step": lambda loop: loop.optimizer.step(),
    "state replaced": _replace_state,
    "learning rate": _doubled_rate,
}


@pytest.mark.parametrize("name", WITHIN)
def test_what_comes_behind_a_step_that_is_not_verified_is_detected(name: str) -> None:
    loop = Loop()
    loop.settle()
    before = loop.unverified
    found, dots, _ = loop.step(within=WITHIN[name])
    assert loop.unverified == before + 1, "this step was to be checked on the host alone"
    right_or_null(found, dots)
    assert any(found.reason.tolist())
    unverified = loop.unverified
    for _ in range(FIRST):
        found, dots, _ = loop.step()
        right_or_null(found, dots)
        assert loop.unverified == unverified, "after a change steps are verified"


BETWEEN: dict[str, Change] = {
    "clipped once": clip,
    "a half clipped": lambda loop: nn.utils.clip_grad_norm_(loop.own[6:], 1e-2),
    "one replaced": _of(lambda p: setattr(p, "grad", p.grad * 3), 5),
    "by value": lambda loop: nn.utils.clip_grad_value_(loop.own, 1e-3),
    "noise": _of(lambda p: p.grad.add_(torch.randn_like(p))),
    "scaled behind": _of(lambda p: p.grad.data.mul_(0.1)),
    "each by its own": _of(lambda p: p.grad.mul_(p.detach().abs().sum())),
    "one thrown away": _of(lambda p: setattr(p, "grad", None), 4),
    "betas": lambda loop: loop.optimizer.param_groups[0].update(betas=(0.5, 0.9)),
    "maximize": lambda loop: loop.optimizer.param_groups[0].update(maximize=True),
    "state loaded": lambda loop: loop.optimizer.load_state_dict(loop.optimizer.state_dict()),
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("often", [1, 7])
def test_what_comes_before_a_step_is_right_or_null(name: str, often: int) -> None:
    loop = Loop()
    loop.settle()
    for number in range(PERIOD + 8):
        found, dots, _ = loop.step(BETWEEN[name] if number % often == 0 else None)
        if name == "one thrown away":
            dots = [d if p.grad is not None else 0.0 for d, p in zip(dots, loop.own, strict=True)]
        right_or_null(found, dots)
    assert name in ("by value", "noise") or found.reason.tolist() == [decrease_reasons.FINE] * len(dots)


def test_schedule() -> None:
    schedule = FullCheckSchedule()
    due = []
    for _ in range(FIRST + 2 * PERIOD):
        due.append(schedule.due())
        if due[-1]:
            schedule.record_full_check(True)
        else:
            schedule.record_host_check()
    assert due == [True] * FIRST + ([False] * (PERIOD - 1) + [True]) * 2
    schedule.record_full_check(torch.tensor(False))
    assert schedule.due()
    for _ in range(FIRST):
        schedule.record_full_check(torch.tensor(True))
    assert not schedule.due()
    schedule.record_late_result(torch.tensor(False))
    assert schedule.due(), "a step that was not verified was wrong"
    on_a_device = FullCheckSchedule()
    for _ in range(2 * FIRST):
        on_a_device.record_full_check(torch.ones((), dtype=torch.bool, device="meta"))
        assert on_a_device.due(), "as long as it is not known"
