"""Aligned decreases from a sample of the parameters: against the exact ones, in every kind of loop."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs._monitor import monitor as monitor_module
from fastfs._monitor.measure.measured_update import MeasuredUpdate
from fastfs._monitor.measure.parameters import Parameters
from fastfs._monitor.optimizers import check_optimizers
from tests.helpers.monitor_loops import BLOCKS, Net, muon

CHUNK = 64
Optimizers = Callable[[nn.Module], list[torch.optim.Optimizer]]
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def small_chunks(threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of 64 x 64 are then sampled: 16 strata."""
    threads(1)
    monkeypatch.setattr(monitor_module, "Parameters", functools.partial(Parameters, least_chunk=CHUNK))


def one(kind: type[torch.optim.Optimizer], **options: Any) -> Optimizers:
    return lambda model: [kind(model.parameters(), **options)]


def halves(model: nn.Module) -> list[torch.optim.Optimizer]:
    parameters = list(model.parameters())
    return [torch.optim.SGD(parameters[:5], lr=0.05), torch.optim.AdamW(parameters[5:], lr=0.01)]


def one_each(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([p], lr=0.05) for p in model.parameters()]


OPTIMIZERS: dict[str, Optimizers] = {
    "sgd-momentum-decay": one(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "sgd-nesterov-foreach": one(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "adam": one(torch.optim.Adam, lr=0.01, weight_decay=0.1),
    "adamw-fused": one(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "adamax": one(torch.optim.Adamax, lr=0.01),
    "rmsprop-centered": one(torch.optim.RMSprop, lr=0.001, momentum=0.9, centered=True),
    "two optimizers": halves,
    "one optimizer per parameter": one_each,
}


class Run:
    """A loop of a wide net, and what its monitor records."""

    def __init__(
        self,
        optimizers: Optimizers,
        *,
        fraction: float | None,
        steps: int = 30,
        clip: float | None = None,
        scaler: Any = None,
        micro_batches: int = 1,
        change: Callable[[nn.Module], object] | None = None,
        spoil: Callable[[nn.Module, int], object] | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = Net(width=64).double()
        if change is not None:
            change(self.model)
        self.optimizers = optimizers(self.model)
        self.rows: list[Row] = []
        self.monitor = None
        if fraction is not None:
            keywords = {"every": 10, "aligned_every": 1, "layers": BLOCKS, "alerts": (), "verbose": False} | options
            self.monitor = fastfs.Monitor(
                self.model,
                self.optimizers,
                aligned_fraction=fraction,
                sinks=[self.rows.extend],
                scaler=scaler,
                **keywords,
            )
        generator = torch.Generator().manual_seed(1)
        for step in range(steps):
            self.model.zero_grad()
            for _ in range(micro_batches):
                x = torch.randn(32, 8, generator=generator, dtype=torch.float64)
                loss = F.cross_entropy(self.model(x), torch.randint(3, (32,), generator=generator)) / micro_batches
                (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                for optimizer in self.optimizers:
                    scaler.unscale_(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            if spoil is not None:
                spoil(self.model, step)
            for optimizer in self.optimizers:
                optimizer.step() if scaler is None else scaler.step(optimizer)
            if scaler is not None:
                scaler.update()
        if self.monitor is not None:
            self.monitor.close()

    @property
    def by_place(self) -> dict[tuple[int, int], Row]:
        return {(row["step"], row["layer"]): row for row in self.rows if row["kind"] in ("measured", "predicted")}

    def same_training(self, other: Run) -> None:
        for a, b in zip(self.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(a, b)


def near(exact: Run, sampled: Run) -> None:
    """Estimates are near the exact numbers, as their standard errors say, and those that are exact agree.

    A sample is fixed between two censuses, so that errors of neighbouring steps are alike, and not normal. At most a
    quarter of the estimates are 2 standard errors away for any distribution (Chebyshev's inequality).
    """
    truth, found = exact.by_place, sampled.by_place
    assert truth.keys() == found.keys()
    distances = []
    for place, row in found.items():
        expected, error = truth[place]["aligned_decrease"], row["decrease_se"]
        assert truth[place]["decrease_se"] is None
        if not error:
            assert row["aligned_decrease"] == pytest.approx(expected, rel=1e-9)
            continue
        assert row["kind"] == "predicted"
        distances.append(abs(row["aligned_decrease"] - expected) / error)
        if math.isnan(row["update_rms"]):
            continue
        assert row["aligned_decrease"] > 2 * error
        if not math.isnan(truth[place]["update_rms"]):  # it inherits the error
            ratio = row["aligned_decrease"] / expected
            assert row["update_rms"] == pytest.approx(truth[place]["update_rms"] * ratio, rel=1e-6)
    assert len(distances) >= 10  # how many depends on the parameters that pass the check of a census
    assert sum(x <= 2 for x in distances) >= 0.75 * len(distances)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_estimates_are_as_near_as_their_standard_errors_say(name: str) -> None:
    exact, sampled = (Run(OPTIMIZERS[name], fraction=fraction) for fraction in (1, 0.25))
    near(exact, sampled)
    exact.same_training(sampled)
    sampled.same_training(Run(OPTIMIZERS[name], fraction=None))


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_clipping_and_scaling_are_taken_out(clip: float | None, scaled: bool, micro_batches: int) -> None:
    runs = []
    for fraction in (1, 0.25):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        options: dict[str, Any] = {"clip": clip, "scaler": scaler, "micro_batches": micro_batches}
        runs.append(Run(OPTIMIZERS["sgd-nesterov-foreach"], fraction=fraction, **options))
    near(runs[0], runs[1])


def test_a_scaler_changes_no_standard_error() -> None:
    runs = [
        Run(OPTIMIZERS["adam"], fraction=0.25, scaler=scaler, clip=0.05)
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12))
    ]
    rows, scaled = runs[0].by_place, runs[1].by_place
    assert sum(bool(row["decrease_se"]) for row in rows.values()) > 10
    for place, row in rows.items():
        if row["decrease_se"] is None:
            assert scaled[place]["decrease_se"] is None
        else:
            assert scaled[place]["decrease_se"] == pytest.approx(row["decrease_se"], rel=1e-6)


def test_the_fraction_may_be_another_one() -> None:
    exact, half, eighth = (Run(OPTIMIZERS["adam"], fraction=fraction) for fraction in (1, 0.5, 0.125))
    near(exact, half)
    near(exact, eighth)
    errors = [
        sum(row["decrease_se"] or 0.0 for row in run.rows if row["kind"] == "predicted") for run in (half, eighth)
    ]
    assert errors[0] < errors[1]


def test_measured_steps_and_censuses_are_exact() -> None:
    run = Run(OPTIMIZERS["adam"], fraction=0.25)
    sampled = {row["step"] for row in run.rows if row.get("decrease_se")}
    measured = {row["step"] for row in run.rows if row["kind"] == "measured"}
    assert measured == {0, 10, 20}
    # The predicted steps 1, 2, 4, 8 and 16 by number: 1, 2, 4, 8 and, as step 10 is measured, 17.
    assert sampled == set(range(30)) - measured - {1, 2, 4, 8, 17}
    assert all(row["decrease_se"] is None for row in run.rows if row["kind"] == "measured")
    assert all(row["decrease_se"] == 0 for row in run.rows if row.get("step") in (1, 2, 4, 8, 17))


def transposed(model: Any) -> None:
    """Replaces a matrix by its transposed view, so that it is not contiguous."""
    weight = model.blocks[1].linear.weight
    weight.data = weight.data.T.contiguous().T


@pytest.mark.parametrize(
    "change",
    [
        transposed,
        lambda model: model.blocks[0].requires_grad_(False),
        lambda model: setattr(model.blocks[2].linear, "weight", model.blocks[1].linear.weight),
    ],
    ids=["not contiguous", "frozen", "tied"],
)
def test_parameters_of_all_kinds(change: Any) -> None:
    exact, sampled = (Run(OPTIMIZERS["adam"], fraction=fraction, change=change) for fraction in (1, 0.25))
    near(exact, sampled)
    exact.same_training(sampled)


@pytest.mark.parametrize("optimizers", [muon, one(torch.optim.Rprop)], ids=["muon", "rprop"])
def test_updates_from_copies_are_exact(optimizers: Optimizers) -> None:
    exact, sampled = (Run(optimizers, fraction=fraction) for fraction in (1, 0.25))
    assert [row.get("decrease_se") for row in sampled.rows] == [None] * len(sampled.rows)
    for place, row in sampled.by_place.items():
        assert row["aligned_decrease"] == exact.by_place[place]["aligned_decrease"]


def test_small_models_are_read_completely(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the chunks of the monitor, the record of this model is bitwise the same as with fraction 1."""
    monkeypatch.setattr(monitor_module, "Parameters", Parameters)
    exact, default = (Run(OPTIMIZERS["adam"], fraction=fraction) for fraction in (1, 0.25))
    for place, row in default.by_place.items():
        for key in ("aligned_decrease", "decrease_se", "parameter_norm", "parameter_update_norm", "gradient_norm"):
            assert row[key] == exact.by_place[place][key]


def test_a_non_finite_gradient_in_the_sample_is_null() -> None:
    backwards = 0

    def hook(gradient: Tensor) -> Tensor:
        nonlocal backwards
        backwards += 1
        return gradient * torch.nan if backwards == 26 else gradient

    def change(model: Any) -> None:
        model.blocks[1].linear.weight.register_hook(hook)

    rows = Run(OPTIMIZERS["adam"], fraction=0.25, steps=26, change=change).by_place
    assert math.isfinite(rows[25, 0]["aligned_decrease"])
    assert rows[25, 0]["decrease_se"] > 0
    for layer in (1, 2):
        assert math.isnan(rows[25, layer]["aligned_decrease"])
        assert math.isnan(rows[25, layer]["decrease_se"])


def test_zeros_in_the_sample_do_not_hide_an_unknown_factor() -> None:
    """A gradient of zeros could be scaled by any factor; from a sample nobody knows that it is zero everywhere."""

    def spoil(model: Any, step: int) -> None:
        gradient = model.blocks[1].linear.weight.grad
        gradient.zero_()
        nn.utils.clip_grad_value_([model.blocks[2].linear.weight], 1e-3)

    exact, sampled = (Run(OPTIMIZERS["adam"], fraction=fraction, steps=12, spoil=spoil) for fraction in (1, 0.25))
    for place, row in sampled.by_place.items():
        if not math.isnan(row["aligned_decrease"]):
            assert row["decrease_why"] is None
            assert not math.isnan(exact.by_place[place]["aligned_decrease"])
        else:
            assert row["decrease_why"] is not None


def test_steps_that_read_the_same_elements_add_their_standard_errors() -> None:
    model = Net(width=64).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = Parameters(check_optimizers(model, optimizer), snapshot=False, sampled_every=4, least_chunk=CHUNK)

    def step(number: int) -> None:
        for n, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * number + n), dtype=p.dtype)
        parameters.before(0, False)
        optimizer.step()
        parameters.after(0, False)

    def errors(found: MeasuredUpdate) -> Tensor:
        assert found.sampling is not None
        return found.sampling[:, 0].sqrt()

    for _ in range(2):  # a census
        step(0)
        parameters.take(torch.device("cpu"))
    alone = []
    for number in (3, 5):
        step(number)
        if number == 3:  # the 4th is a census
            alone.append(parameters.take(torch.device("cpu")))
            step(4)
            parameters.take(torch.device("cpu"))
        else:
            alone.append(parameters.take(torch.device("cpu")))
    assert errors(alone[0]).any()
    step(3)
    step(5)
    together = parameters.take(torch.device("cpu"))
    assert torch.allclose(errors(together), errors(alone[0]) + errors(alone[1]), rtol=1e-9)
    assert torch.allclose(together.stats.dot, alone[0].stats.dot + alone[1].stats.dot, rtol=1e-6)


def test_a_resumed_run_draws_the_same_sample() -> None:
    first = Run(OPTIMIZERS["adam"], fraction=0.25, steps=8)
    assert first.monitor is not None
    state, model = first.monitor.state_dict(), copy.deepcopy(first.model)
    rows: list[Row] = []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with fastfs.Monitor(
        model, optimizer, every=10, aligned_every=1, layers=BLOCKS, alerts=(), verbose=False, sinks=[rows.extend]
    ) as monitor:
        monitor.load_state_dict(state)
        for _ in range(6):
            model.zero_grad()
            F.cross_entropy(model(torch.randn(32, 8, dtype=torch.float64)), torch.randint(3, (32,))).backward()
            optimizer.step()
    errors = [row["decrease_se"] for row in rows if row["kind"] == "predicted"]
    assert any(errors)
    assert None not in errors


@pytest.mark.parametrize("fraction", [0.3, 0.0, -0.25, 1.5, 2, math.nan, math.inf])
def test_fractions_that_are_none(fraction: float) -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"^aligned_fraction: expected 1 or 1/k for an integer k, such as 0.25, got"):
        fastfs.Monitor(model, torch.optim.SGD(model.parameters()), aligned_fraction=fraction, sinks=[lambda _: None])


@pytest.mark.parametrize("fraction", [True, "0.25", None])
def test_fractions_of_a_wrong_type(fraction: Any) -> None:
    model = Net()
    with pytest.raises(TypeError, match=r"^aligned_fraction: expected a number, got"):
        fastfs.Monitor(model, torch.optim.SGD(model.parameters()), aligned_fraction=fraction, sinks=[lambda _: None])


def test_header_and_description() -> None:
    model = Net()
    monitor = fastfs.Monitor(
        model, torch.optim.SGD(model.parameters()), aligned_every=1, sinks=[lambda _: None], verbose=False
    )
    assert "about 0.25 of the elements of large ones" in monitor.description
    monitor.close()
    monitor = fastfs.Monitor(
        model,
        torch.optim.SGD(model.parameters()),
        aligned_every=1,
        aligned_fraction=1,
        sinks=[lambda _: None],
        verbose=False,
    )
    assert "of large ones" not in monitor.description
    monitor.close()
