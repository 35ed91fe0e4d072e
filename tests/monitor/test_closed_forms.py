"""The table of closed forms: what it says of torch's optimizers is true, and every row gives the real update."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from fastfs._monitor.measure import closed_forms
from fastfs._monitor.measure.closed_forms import CLOSED_FORMS, ClosedForm, closed_form
from fastfs._monitor.measure.completed_step import CompletedStep
from fastfs._monitor.measure.measured_update import OF_UPDATE
from fastfs._monitor.measure.update_meter import UpdateMeter
from tests.helpers.optimizer_cases import (
    CLOSED,
    COPIED,
    OPTIONS,
    as_on_a_device,
    check_step,
    give_gradients,
    make_optimizer,
    make_parameters,
    name_of,
)

FLOATS = (torch.float32, torch.float64)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "numerics.md"
IMPLEMENTATIONS = ("foreach", "fused", "capturable", "differentiable")


def test_rows() -> None:
    assert list(OPTIONS) == [form.name for form in CLOSED_FORMS]
    for form in CLOSED_FORMS:
        arguments = inspect.signature(form.optimizer).parameters
        assert form.implementations == tuple(name for name in IMPLEMENTATIONS if name in arguments), form.name
        assert (form.second is None) <= (form.rule.name in ("LINEAR", "RMSPROP")), form.name
        assert form.betas == 0 or form.counted, form.name


def with_table(text: str) -> str:
    """The page with the table of closed forms as it has to be."""
    rows = [
        f"| {form.name} | {form.update} | {', '.join(f'`{name}`' for name in form.states)} | "
        f"{', '.join(form.implementations)} |\n"
        for form in CLOSED_FORMS
    ]
    head = "| optimizer | dw | state | implementations |\n|---|---|---|---|\n"
    assert head in text
    return re.sub(re.escape(head) + r"(\|.*\n)*", lambda _: head + "".join(rows), text)


def test_the_table_in_the_documentation() -> None:
    text = DOCS.read_text()
    assert text == with_table(text), "python -m tests.monitor.test_closed_forms writes it"


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("form", "options"), CLOSED, ids=name_of)
def test_closed_forms(form: ClosedForm, options: dict[str, Any], dtype: torch.dtype) -> None:
    optimizer = make_optimizer(form.optimizer, make_parameters(dtype), {"lr": 0.01} | options)
    assert closed_form(optimizer, optimizer.param_groups[0]) is form
    meter = UpdateMeter(optimizer)
    assert meter.copied_bytes == 0
    # torch computes these bias corrections in the float32 of the step counter.
    compared = torch.float32 if options.get("differentiable") and form.betas else dtype
    for step in range(4):
        check_step(meter, compared, f"step {step}")
        optimizer.param_groups[0]["lr"] *= 1.3
    assert meter.copied_bytes == 0
    kind, precision = form.optimizer.__name__, str(dtype).removeprefix("torch.")
    assert meter.method == f"7 parameters by the closed form of {kind}, up to {precision} rounding."
    assert set(form.states) <= set(optimizer.state[meter.parameters[0]])


COPIES = [
    *((kind, options, dtype) for (kind, options), dtype in zip(COPIED, FLOATS * len(COPIED), strict=False)),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, torch.bfloat16),
    (torch.optim.AdamW, {"eps": 1e-4}, torch.float16),
]


@pytest.mark.parametrize(("kind", "options", "dtype"), COPIES, ids=name_of)
def test_copies(kind: type[Optimizer], options: dict[str, Any], dtype: torch.dtype) -> None:
    compared = torch.float64 if dtype == torch.float64 else torch.float32  # a copy is exact in 16 bits too
    meter = UpdateMeter(make_optimizer(kind, make_parameters(dtype), options))
    needed = sum(p.numel() * p.element_size() for p in meter.parameters)
    for step in range(3):
        check_step(meter, compared, f"step {step}")
        assert meter.copied_bytes == needed
    assert meter.method == f"{len(meter.parameters)} parameters from a copy made before the step, exactly."
    copies = [copy.data_ptr() for copy in meter._copies.values()]
    check_step(meter, compared)
    assert [copy.data_ptr() for copy in meter._copies.values()] == copies


@pytest.mark.parametrize("kind", dict.fromkeys(form.optimizer for form in CLOSED_FORMS), ids=name_of)
def test_hyper_parameters_as_tensors(kind: type[Optimizer]) -> None:
    lr = torch.tensor(0.01, dtype=torch.float64)
    meter = UpdateMeter(make_optimizer(kind, make_parameters(torch.float64), {"lr": lr, "foreach": False}))
    for _ in range(3):
        check_step(meter, torch.float64)
        lr.mul_(1.5)


def test_betas_as_tensors() -> None:
    betas = (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64))
    meter = UpdateMeter(Adam(make_parameters(torch.float64), lr=torch.tensor(0.01), betas=betas, foreach=False))
    for _ in range(3):
        check_step(meter, torch.float32)


def test_extreme_gradients() -> None:
    """A second moment that overflows: the update is zero, and is said to be."""
    p = torch.randn(10)
    meter = UpdateMeter(Adam([p], lr=0.1))
    p.grad = torch.full_like(p, 1e25)
    meter.before()
    meter.optimizer.step()
    assert not meter.after().stats.sums[0, OF_UPDATE].any()
    for scale in (1e-15, 1e15):
        for kind in dict.fromkeys(form.optimizer for form in CLOSED_FORMS):
            meter = UpdateMeter(make_optimizer(kind, make_parameters(torch.float32), {"lr": 0.01}))
            for _ in range(2):
                check_step(meter, torch.float32, f"{kind} {scale}", scale)


class NoItems(TorchDispatchMode):
    """Refuses whatever waits for a value."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
        return function(*args, **(kwargs or {}))


UNREAD = [
    *((form.optimizer, OPTIONS[form.name][0]) for form in CLOSED_FORMS),
    (torch.optim.SGD, {"nesterov": True, "momentum": 0.9, "foreach": True}),
    (torch.optim.AdamW, {"differentiable": True}),
    (torch.optim.AdamW, {"lr": torch.tensor(0.1)}),
    (torch.optim.NAdam, {}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(("kind", "options"), UNREAD, ids=name_of)
def test_nothing_is_read_on_the_host(
    kind: type[Optimizer], options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_device(monkeypatch)
    meter = UpdateMeter(make_optimizer(kind, make_parameters(dtype), options))
    for _ in range(2):
        give_gradients(meter.parameters)
        with NoItems():
            meter.before()
        meter.optimizer.step()
        with NoItems():
            meter.after()


def test_uncertainty_only_where_torch_computes_in_single_precision() -> None:
    """Bias corrections in the float32 of the step counters are expected to be off, those on the host are not."""
    parameter = torch.zeros(3, dtype=torch.float64)
    counters: list[Tensor] = [torch.tensor(1.0)]
    for form in CLOSED_FORMS:
        for differentiable in (False, True):
            group = make_optimizer(form.optimizer, [parameter], {"lr": 0.1}).param_groups[0]
            step = CompletedStep(group | {"differentiable": differentiable}, counters, 1.0, False)
            found = closed_forms.coefficient_uncertainty(form, step, torch.device("cpu"))
            assert (found is not None) == (differentiable and form.betas > 0), form.name


if __name__ == "__main__":
    DOCS.write_text(with_table(DOCS.read_text()))
