"""The aligned decrease of every step, and what the feature speed formula predicts from it between measured steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from tests.helpers.monitor_cases import wide_rows
from tests.helpers.monitor_loops import BLOCKS, Net, muon

LAYERS = [f"blocks.{i}" for i in range(3)]
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


def one(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], list[torch.optim.Optimizer]]:
    return lambda model: [kind(model.parameters(), **options)]


OPTIMIZERS = {
    "sgd": one(torch.optim.SGD, lr=0.05),
    "sgd-momentum-decay": one(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "sgd-nesterov": one(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "sgd-nesterov-foreach": one(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "sgd-nesterov-decay": one(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": one(torch.optim.Adam, lr=0.01, weight_decay=0.1),
    "adam-amsgrad": one(torch.optim.Adam, lr=0.01, amsgrad=True),
    "adamw": one(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "adamw-fused": one(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "adamax": one(torch.optim.Adamax, lr=0.01),
    "rmsprop": one(torch.optim.RMSprop, lr=0.001),
    "rmsprop-momentum": one(torch.optim.RMSprop, lr=0.001, momentum=0.9, centered=True),
    "muon-adamw": muon,
}


class Loop:
    """A loop in float64 that keeps D_l and the norms of every step, from copies, beside what the monitor records."""

    def __init__(
        self, optimizers: Any, *, every: int = 4, lr_model: int = 1, scaler: Any = None, **options: Any
    ) -> None:
        torch.manual_seed(lr_model)
        self.model = Net().double()
        self.optimizers = optimizers(self.model)
        self.scaler = scaler
        self.seen: list[Row] = []
        keywords: dict[str, Any] = {
            "layers": BLOCKS,
            "every": every,
            "aligned_every": 1,
            "rows": None,
            "alerts": (),
        } | options
        self.monitor = fastfs.Monitor(
            self.model, self.optimizers, sinks=[self.seen.extend], verbose=False, scaler=scaler, **keywords
        )
        self.truth: list[dict[str, list[float]]] = []

    def run(
        self,
        steps: int,
        *,
        clip: float | None = None,
        micro_batches: int = 1,
        spoil: Callable[[nn.Module], None] | None = None,
        batch: Callable[[int], tuple[Tensor, Tensor]] = wide_rows,
    ) -> list[Row]:
        model = self.model
        for step in range(steps):
            model.zero_grad()
            for part in range(micro_batches):
                x, y = batch(step * micro_batches + part)
                loss = F.cross_entropy(model(x), y) / micro_batches
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            scale = 1.0 if self.scaler is None else self.scaler.get_scale()
            gradients = {name: p.grad / scale for name, p in model.named_parameters()}
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            if clip is not None:
                for optimizer in self.optimizers if self.scaler is not None else ():
                    self.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if spoil is not None:
                spoil(model)
            for optimizer in self.optimizers:
                optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
            if self.scaler is not None:
                self.scaler.update()
            self._keep(gradients, before)
        self.monitor.close()
        return [row for row in self.seen if row["kind"] in ("measured", "predicted")]

    def _keep(self, gradients: dict[str, Tensor], before: dict[str, Tensor]) -> None:
        columns: dict[str, list[float]] = {}
        for index in range(3):
            own = (f"{LAYERS[index]}.",) if index else ("stem.", f"{LAYERS[0]}.")
            upstream = ("stem.", *(f"{name}." for name in LAYERS[: index + 1]))
            dots, squares = 0.0, [0.0, 0.0, 0.0]
            for name, p in self.model.named_parameters():
                dw = p.detach() - before[name]
                if name.startswith(upstream):
                    dots -= float((gradients[name] * dw).sum())
                if name.startswith(own):
                    squares = [
                        a + float(x.square().sum())
                        for a, x in zip(squares, (p.detach(), dw, gradients[name]), strict=True)
                    ]
            names = "parameter_norm", "parameter_update_norm", "gradient_norm"
            for key, value in zip(names, map(math.sqrt, squares), strict=True):
                columns.setdefault(key, []).append(value)
            columns.setdefault("aligned_decrease", []).append(dots)
        self.truth.append(columns)

    def check(self, found: list[Row], steps: int, rel: float = 1e-7) -> None:
        assert len(found) == 3 * steps
        for row in found:
            for key, values in self.truth[row["step"]].items():
                assert row[key] == pytest.approx(values[row["layer"]], rel=rel), (row["kind"], row["step"], key)


def small_residuals(found: list[Row], most: float) -> bool:
    return all(abs(row["residual"]) < most for row in found if row["kind"] == "measured")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_aligned_decrease_is_that_of_copies(name: Any) -> None:
    loop = Loop(OPTIMIZERS[name])
    loop.check(loop.run(10), 10)


@pytest.mark.parametrize("name", ["sgd-momentum-decay", "sgd-nesterov", "sgd-nesterov-foreach", "adamw", "muon-adamw"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_clipping_by_norm_and_scaling_are_taken_out(name: str, scaled: bool, micro_batches: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    loop = Loop(OPTIMIZERS[name], mode="jvp", scaler=scaler)
    found = loop.run(9, clip=0.01, micro_batches=micro_batches)
    loop.check(found, 9, rel=1e-6)
    assert small_residuals(found, 1e-5)
    assert {row["loss_scale"] for row in found} == {1024.0 if scaled else 1.0}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_scaler_changes_no_number(clip: float | None, micro_batches: int) -> None:
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        loop = Loop(OPTIMIZERS["sgd-momentum-decay"], scaler=scaler)
        found.append(loop.run(9, clip=clip, micro_batches=micro_batches))
    for a, b in zip(*found, strict=True):
        for key in ("aligned_decrease", "backward_rms", "update_rms", "gradient_norm", "parameter_update_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-5, nan_ok=True), key  # clip_grad_norm_ adds 1e-6 to the norm


def first_order_loop() -> tuple[Net, torch.optim.Optimizer, list[Row], fastfs.Monitor]:
    """A model, its optimizer, the rows and a monitor in jvp mode."""
    torch.manual_seed(1)
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen: list[Row] = []
    monitor = fastfs.Monitor(model, optimizer, layers=BLOCKS, every=1, mode="jvp", sinks=[seen.extend], verbose=False)
    return model, optimizer, seen, monitor


def test_a_closure_begins_the_step_when_it_is_over() -> None:
    """With clipping inside of it, and in the first step, where no gradient is there before."""
    model, optimizer, seen, monitor = first_order_loop()
    with monitor:
        for step in range(3):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(wide_rows(step)[0]), wide_rows(step)[1])
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.01 * (step + 1))
                return loss

            assert optimizer.step(closure) is not None if step % 2 else optimizer.step(closure=closure) is not None
    measured = [row for row in seen if row["kind"] == "measured"]
    assert len(measured) == 9
    assert small_residuals(measured, 1e-5)
    assert all(row["aligned_decrease"] > 0 for row in measured)


def test_a_step_that_raised_leaves_its_clipping_behind() -> None:
    model, optimizer, seen, monitor = first_order_loop()
    with monitor:
        for step in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(wide_rows(step)[0]), wide_rows(step)[1]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01 / (1 + step))
            if step == 0:
                handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    optimizer.step()
                handle.remove()
            else:
                optimizer.step()
    measured = [row for row in seen if row["kind"] == "measured"]
    assert len(measured) == 6
    assert small_residuals(measured, 1e-5)


# What is predicted


def test_predicted_speed_is_the_formula_with_the_last_angle() -> None:
    found = Loop(OPTIMIZERS["adamw"], every=5).run(20)
    cosine: dict[int, float] = {}
    count = 16 * 8
    for row in found:
        if row["kind"] == "measured":
            cosine[row["layer"]] = row["cos_angle"]
            continue
        speed = row["aligned_decrease"] / (cosine[row["layer"]] * row["backward_rms"] * math.sqrt(count))
        if speed > 0:
            assert row["update_rms"] == pytest.approx(speed / math.sqrt(count), rel=1e-9)
        else:
            assert math.isnan(row["update_rms"])
    assert sum(not math.isnan(row["update_rms"]) for row in found if row["kind"] == "predicted") > 20


def test_predicted_speed_is_near_the_measured_one_where_little_changes() -> None:
    """The same batch at every step, small steps: within 2% three steps after the measurement."""
    options: dict[str, Any] = {"batch": lambda _: wide_rows(0)}
    slow = one(torch.optim.SGD, lr=0.01)
    truth = Loop(slow, every=1).run(16, **options)
    found = Loop(slow, every=4).run(16, **options)
    measured = {(row["step"], row["layer"]): row["update_rms"] for row in truth}
    predicted = [row for row in found if row["kind"] == "predicted"]
    assert len(predicted) == 3 * 12
    for row in predicted:
        assert row["update_rms"] == pytest.approx(measured[row["step"], row["layer"]], rel=0.02)


# What cannot be told


@pytest.mark.parametrize("some", [False, True])
def test_clipping_by_value_is_null(some: bool) -> None:
    """Also where it befalls some parameters only: all gradients are looked at."""

    def spoil(model: nn.Module) -> None:
        spoiled = [p for p in model.blocks.parameters() if p.dim() > 1] if some else model.parameters()
        nn.utils.clip_grad_value_(spoiled, 1e-3)

    loop = Loop(OPTIMIZERS["sgd"], every=3)
    found = loop.run(6, spoil=spoil)
    assert len(found) == 18
    assert all(math.isnan(row["aligned_decrease"]) for row in found)
    assert all(math.isnan(row["residual"]) for row in found if row["kind"] == "measured")
    assert all(math.isnan(row["update_rms"]) for row in found if row["kind"] == "predicted")
