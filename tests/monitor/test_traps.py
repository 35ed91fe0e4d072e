"""What a loop may do that would make numbers wrong: they are right, or the record says that they are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs.models import ResNet
from tests.helpers.monitor_cases import measured_into, rows, sgd

KEYS = ("angle", "update_rms", "backward_rms", "feature_rms", "aligned_decrease", "residual", "micro_batches")


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def run(
    before: Callable[[nn.Module, Tensor, tuple[Tensor, Tensor]], object] = lambda *_: None,
    after: Callable[[nn.Module], object] = lambda _: None,
    steps: int = 4,
    make: Callable[[], nn.Module] = lambda: ResNet(8, 16, 3, 3),
    **options: Any,
) -> list[dict[str, Any]]:
    """A loop that does something between forward and backward, and between backward and step; all rows."""
    torch.manual_seed(0)
    model = make()
    optimizer = sgd(model)
    seen: list[dict[str, Any]] = []
    settings = {"every": 2, "aligned_every": 1, "layers": r"blocks\.\d+$", "verbose": False, "sinks": [seen.extend]}
    with fastfs.Monitor(model, optimizer, **{**settings, **options}):
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_of(model, rows(step))
            before(model, loss, rows(step))
            loss.backward()
            after(model)
            optimizer.step()
    return [row for row in seen if row["kind"] in ("measured", "predicted")]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected) == 4 * 3
    for a, b in zip(found, expected, strict=True):
        assert a["kind"] == b["kind"]
        for key in KEYS:
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-6, nan_ok=True), (a["kind"], key)


def test_gradients_that_are_asked_for_before_the_backward_do_not_count() -> None:
    def norms(model: nn.Module, loss: Tensor, _batch: Any) -> None:
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        torch.autograd.grad(loss, model.blocks[1].linear.weight, retain_graph=True)

    assert_same(run(norms), run())


def test_gradients_of_functions_do_not_count() -> None:
    def norms(model: nn.Module, _loss: Tensor, batch: tuple[Tensor, Tensor]) -> None:
        def loss(values: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, values, (batch[0],)), batch[1])

        torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})

    assert_same(run(norms), run())


def test_an_inner_loop_on_the_inputs_does_not_count() -> None:
    def attack(model: nn.Module, _loss: Tensor, batch: tuple[Tensor, Tensor]) -> None:
        x = batch[0].clone()
        for _ in range(2):
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(model, (x, batch[1])), x)
            x = x + 0.01 * gradient.sign()

    assert_same(run(attack), run())


def test_clipping_some_parameters_only_is_divided_out_of_their_gradients_alone() -> None:
    def clip(model: nn.Module) -> None:
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.dim() > 1], 0.01)

    def make() -> nn.Module:
        model = nn.Sequential()
        model.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        model.forward = lambda x: model.blocks[2](torch.tanh(model.blocks[1](torch.tanh(model.blocks[0](x)))))[:, :3]
        return model

    found = run(after=clip, make=make)
    measured = [row for row in found if row["kind"] == "measured"]
    assert measured
    for row in measured:
        assert abs(row["residual"]) < 0.05
        assert row["decrease_why"] is None


def test_a_micro_batch_that_was_left_out_is_said_in_every_row() -> None:
    model = ResNet(8, 16, 3, 3)
    optimizer = sgd(model)
    seen: list[dict[str, Any]] = []
    monitor = fastfs.Monitor(
        model, optimizer, layers=r"blocks\.\d+$", every=1, memory=2500, sinks=[measured_into(seen)], verbose=False
    )
    x, y = torch.cat([rows(0)[0]] * 8), torch.cat([rows(0)[1]] * 8)
    loss_of(model, (x[:8], y[:8])).backward()
    with pytest.warns(RuntimeWarning, match="memory budget"):
        loss = loss_of(model, (x, y))
    loss.backward()
    optimizer.step()
    monitor.close()
    assert [row["why"] for row in seen] == ["a micro-batch of the step was left out"] * 3
    assert all(math.isnan(row["residual"]) for row in seen)


def test_parameters_written_to_between_forward_and_step_are_said() -> None:
    def move(model: nn.Module) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))

    found = [row for row in run(after=move) if row["kind"] == "measured"]
    assert {row["why"] for row in found} == {"parameters were written to between the forward and the step"}


class MovesFirst(torch.optim.SGD):
    """Evaluates its closure at other parameters than those that the step began with."""

    back = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        old = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(0.1 * torch.ones_like(p))
        with torch.enable_grad():
            closure()
        if self.back:
            for p, value in zip(parameters, old, strict=True):
                p.copy_(value)
        return super().step()


class MovesFor(MovesFirst):
    back = False


@pytest.mark.parametrize("kind", [MovesFirst, MovesFor])
@pytest.mark.parametrize("options", [{}, {"amplify": True}, {"mode": "jvp"}], ids=["plain", "amplified", "jvp"])
def test_features_of_a_closure_at_other_parameters_are_not_valid(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ResNet(8, 16, 2, 3)
    optimizer = kind(model.parameters(), lr=0.1)
    seen: list[dict[str, Any]] = []
    settings: dict[str, Any] = {"layers": r"blocks\.\d+$", "every": 1, "sinks": [measured_into(seen)], "verbose": False}
    with fastfs.Monitor(model, optimizer, **settings, **options):
        for step in range(2):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, rows(step))
                loss.backward()
                return loss

            optimizer.step(closure)
    reason = "parameters changed between the beginning of the step and the evaluation of its closure"
    assert {(row["why"], row["decrease_why"]) for row in seen} == {(reason, reason)}


class Switching(nn.Module):
    """Residual from the second half on."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.residual = False

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.blocks[0](x))
        second = torch.tanh(self.blocks[1](first))
        return (self.blocks[2](second) + (first if self.residual else 0.0))[:, :3]


def test_a_structure_that_changes_is_learned_again() -> None:
    torch.manual_seed(0)
    model = Switching()
    optimizer = sgd(model)
    seen: list[dict[str, Any]] = []
    with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d", every=1, sinks=[seen.extend], verbose=False):
        for step in range(4):
            model.residual = step >= 2
            optimizer.zero_grad()
            loss_of(model, rows(step)).backward()
            optimizer.step()
    learned = [row for row in seen if row["kind"] == "structure"]
    assert [row["step"] for row in learned] == [0, 2]
    assert [row["layers"]["cut"] for row in learned] == [[True, True, True], [True, False, False]]
    for row in seen:
        if row["kind"] == "measured":
            assert math.isnan(row["residual"]) == (row["step"] >= 2 and row["layer"] > 0)


def test_a_schedule_that_fails_ends_no_training() -> None:
    class Failing:
        def due(self, step: int) -> bool:
            return 1 // (2 - step) >= 0

    with pytest.warns(RuntimeWarning, match="the schedule failed") as caught:
        found = run(every=Failing(), aligned_every=None, steps=4)
    assert len(caught) == 1
    assert {row["step"] for row in found} == {0, 1}


def test_a_warning_that_is_to_be_an_error_ends_the_call_of_step_and_counts_no_step_twice() -> None:
    """Warnings are errors in tests."""

    class Failing:
        def due(self, step: int) -> bool:
            return 1 // (2 - step) <= 1

    model = ResNet(8, 16, 3, 3)
    optimizer = sgd(model)
    found: list[Any] = []
    raised: list[Any] = []
    with fastfs.Monitor(model, optimizer, layers=["stem"], every=Failing(), sinks=[found.extend], verbose=False) as one:
        for step in range(5):
            optimizer.zero_grad()
            loss_of(model, rows(step)).backward()
            try:
                optimizer.step()
            except RuntimeWarning as warning:
                raised.append((step, str(warning)))
        assert one.step == 5
    assert [step for step, _ in raised] == [1]
    assert "the schedule failed" in raised[0][1]
    assert [row["step"] for row in found if row["kind"] == "measured"] == [0, 1, 3, 4]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_tracing_a_watched_model_leaves_the_monitor_out() -> None:
    model = ResNet(8, 16, 3, 3)
    optimizer = sgd(model)
    with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", every=1, sinks=[lambda rows: None], verbose=False):
        traced = torch.jit.trace(model, rows(0)[0])
    assert "fastfs::" not in str(traced.inlined_graph)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripting_a_watched_model_is_refused_with_the_way_out() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    monitor = fastfs.Monitor(model, sgd(model), sinks=[lambda rows: None], verbose=False)
    with pytest.raises(AttributeError, match="before the monitor is attached"):
        torch.jit.script(model)
    monitor.close()
    torch.jit.script(model)


class Routed(nn.Module):
    """Each row goes to one of four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        weights, chosen = self.router(hidden).softmax(-1).topk(1)
        every = torch.stack([expert(hidden) for expert in self.experts], dim=1)
        return self.last(hidden + weights * every[torch.arange(len(x)), chosen[:, 0]])


@pytest.mark.parametrize("large", [False, True])
def test_choices_that_the_step_changes_are_counted(large: bool) -> None:
    torch.manual_seed(0)
    model = Routed()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0 if large else 0.0)
    seen: list[dict[str, Any]] = []
    with fastfs.Monitor(model, optimizer, layers=["first"], every=1, sinks=[measured_into(seen)], verbose=False):
        loss_of(model, rows(0)).backward()
        optimizer.step()
    assert seen[0]["choices"] == len(rows(0)[0])
    assert (seen[0]["choices_changed"] > 0) == large


def test_a_model_without_choices_has_no_such_columns() -> None:
    found = run(steps=1)
    assert all("choices" not in row for row in found)


@pytest.mark.parametrize("when", ["before the forward", "before the backward", "before the step"])
def test_parameters_that_are_added_in_the_middle_of_a_step(when: str) -> None:
    torch.manual_seed(0)
    model = ResNet(8, 16, 3, 3)
    last = list(model.blocks[2].parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if all(p is not q for q in last)], lr=0.1)
    seen: list[dict[str, Any]] = []
    with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", every=1, sinks=[measured_into(seen)], verbose=False):
        for step in range(3):
            optimizer.zero_grad()
            loss = None
            for moment in ("before the forward", "before the backward", "before the step"):
                if step == 1 and moment == when:
                    optimizer.add_param_group({"params": last})
                if moment == "before the forward":
                    loss = loss_of(model, rows(step))
                elif moment == "before the backward":
                    loss.backward()
            optimizer.step()
    assert [row["step"] for row in seen] == [step for step in range(3) for _ in range(3)]
    assert all(row["valid"] for row in seen)
    assert all(abs(row["residual"]) < 0.05 for row in seen if row["step"] != 1)
