"""Optimizers and options for the tests of updates: every row of the table of closed forms, and what has none.

A row without an entry in `OPTIONS` fails the collection of the tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, NAdam, Optimizer, RMSprop

from fastfs import ParameterStats
from fastfs._monitor.capture import fingerprints
from fastfs._monitor.measure import completed_step, update_verification
from fastfs._monitor.measure.closed_forms import CLOSED_FORMS, ClosedForm
from fastfs._monitor.measure.update_meter import UpdateMeter
from tests.helpers.compare import assert_step

Options = dict[str, Any]
Case = tuple[type[Optimizer], Options]

_ADAM: tuple[Options, ...] = ({}, {"weight_decay": 0.1, "maximize": True}, {"eps": 0.0, "betas": (0.5, 0.8)})

OPTIONS: dict[str, tuple[Options, ...]] = {
    "SGD without momentum": ({}, {"weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1}),
    "SGD with momentum": ({"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "SGD with Nesterov momentum": (
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "maximize": True},
    ),
    "Adam": (*_ADAM, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "Adam with amsgrad": ({"amsgrad": True}, {"weight_decay": 0.1, "amsgrad": True}),
    "AdamW": _ADAM,
    "AdamW with amsgrad": ({"amsgrad": True}, {"amsgrad": True, "maximize": True}),
    "Adamax": ({}, {"weight_decay": 0.1, "maximize": True}),
    "RMSprop with momentum": ({"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "centered": True}),
    "RMSprop centered, without momentum and weight decay": ({"centered": True},),
    "RMSprop without momentum and weight decay": ({}, {"maximize": True}),
    "Adagrad without weight decay": ({}, {"lr_decay": 0.1, "maximize": True}, {"initial_accumulator_value": 0.5}),
}
"""Options that select each row of the table, by its name."""


class Doubled(SGD):
    """A subclass, whose step may do anything."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step()
        super().step()


COPIED: tuple[Case, ...] = (
    (NAdam, {}),
    (torch.optim.RAdam, {}),
    (Adagrad, {"weight_decay": 0.1}),
    (torch.optim.Rprop, {}),
    (torch.optim.Muon, {}),
    (Doubled, {"lr": 0.1, "momentum": 0.9}),
    (RMSprop, {"weight_decay": 0.1}),
    (RMSprop, {"weight_decay": 0.1, "centered": True}),
)
"""Optimizers that have no closed form."""


def _implementations(form: ClosedForm) -> list[Options]:
    """One tensor after the other, and what else torch has on the CPU without gradients of the step."""
    names = [name for name in ("foreach", "fused") if name in form.implementations]
    return [{"foreach": False}] + [{name: True} for name in names]


CLOSED: tuple[tuple[ClosedForm, Options], ...] = tuple(
    case
    for form in CLOSED_FORMS
    for case in (
        *((form, options | how) for options, how in itertools.product(OPTIONS[form.name], _implementations(form))),
        (form, OPTIONS[form.name][0] | {"differentiable": True}),
    )
)
"""Every row of the table with all its options, in every implementation that runs on the CPU."""


def name_of(value: Any) -> str:
    if isinstance(value, ClosedForm):
        return value.optimizer.__name__
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()) or "plain"
    return getattr(value, "__name__", str(value))


def make_optimizer(kind: type[Optimizer], parameters: list[Tensor], options: Options) -> Optimizer:
    if kind is torch.optim.Muon:
        parameters = [p for p in parameters if p.dim() == 2 and p.numel()]
    return kind(parameters, **options)


def make_parameters(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Of several layouts, one empty, the fourth never with a gradient."""
    shapes = [(7, 5), (33,), (2, 3, 4, 5), (8,), (), (0, 3), (40, 300)]
    parameters = [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes]
    parameters[2] = parameters[2].contiguous(memory_format=torch.channels_last)
    parameters[0] = parameters[0].t().contiguous().t()
    return parameters


def give_gradients(parameters: list[Tensor], scale: float = 1.0) -> list[Tensor]:
    """Sets and returns the gradients, zeros for parameters without."""
    for i, p in enumerate(parameters):
        p.grad = None if i == 3 else torch.randn_like(p).mul_(scale)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


def truth(gradients: list[Tensor], before: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """The sums of the real step, from copies, as in `ParameterStats.names`: (P, names)."""
    rows = []
    for g, old, new in zip(gradients, before, parameters, strict=True):
        g, old, new = (x.detach().double().flatten() for x in (g, old, new))
        vectors = {"gradient": g, "update": new - old, "parameter": new}
        products = [vectors[a] @ vectors[b] for a, b in ParameterStats.factors.values()]
        rows.append(torch.stack([*products, 0 * (g @ g), torch.tensor(float(g.numel()))]))
    return torch.stack(rows)


def check_step(meter: UpdateMeter, dtype: torch.dtype, what: str = "", scale: float = 1.0) -> ParameterStats:
    """One step, measured and compared."""
    parameters = meter.parameters
    gradients = give_gradients(parameters, scale)
    before = [p.detach().clone() for p in parameters]
    meter.before()
    meter.optimizer.step()
    after = [p.detach().clone() for p in parameters]
    stats = meter.after().stats
    assert isinstance(stats, ParameterStats)
    assert stats.shape == (len(parameters),)
    expected = truth(gradients, before, parameters)
    for i, p in enumerate(parameters):
        assert torch.equal(p, after[i]), "measuring changed a parameter"
        if p.grad is None:
            assert not stats.sums[i].any(), f"{what}: parameter {i} had no gradient"
        else:
            buffer = meter.optimizer.state[p].get("momentum_buffer")
            assert_step(stats.sums[i], expected[i], dtype, f"{what} parameter {i}", buffer)
    return stats


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treats tensors on the CPU like those on a device, whose values are not known without waiting."""
    for module in (completed_step, fingerprints):
        monkeypatch.setattr(module, "known_equal", lambda a, b: False)
    for module in (fingerprints, update_verification):
        monkeypatch.setattr(module, "on_host", lambda tensor: tensor)
