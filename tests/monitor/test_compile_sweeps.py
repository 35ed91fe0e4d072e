"""Several models of one class in a process, compiled: each is measured, whoever was compiled before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import fastfs
from tests.helpers import monitor_loops as loops
from tests.helpers.monitor_cases import measured_into, rows, sgd, train
from tests.helpers.monitor_loops import Net
from tests.monitor.test_compile import WAYS

INDUCTORS = "ignore:.torch.jit.*is deprecated:DeprecationWarning"  # when torch loads it
pytestmark = [pytest.mark.graphs, pytest.mark.filterwarnings(loops.DYNAMO), pytest.mark.filterwarnings(INDUCTORS)]
CONFIG = torch._dynamo.config


@pytest.fixture(autouse=True)
def fresh(threads: Any) -> Iterator[None]:
    threads(1)
    torch._dynamo.reset()
    counters.clear()
    before = CONFIG.recompile_limit
    with CONFIG.patch(skip_nnmodule_hook_guards=True):  # as in a new process
        yield
    assert CONFIG.recompile_limit == before
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Watched:
    """A model with its optimizer, and what its monitor has recorded."""

    def __init__(self, way: str, backend: str = "eager", *, attach: bool = True, **options: Any) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Net(depth=2)
        if way != "uncompiled":
            self.model = WAYS[way](self.model, backend)
        self.optimizer = sgd(self.model)
        self.rows: list[dict[str, Any]] = []
        self.options = {"layers": loops.BLOCKS, "every": 1, "verbose": False} | options
        self.monitor = self.attach() if attach else None

    def attach(self) -> fastfs.Monitor:
        self.rows = []
        sinks = [measured_into(self.rows)]
        self.monitor = fastfs.Monitor(self.model, self.optimizer, sinks=sinks, **self.options)
        return self.monitor

    def train(self, steps: int = 2) -> None:
        train(self.model, self.optimizer, steps)

    def close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None


def state(watched: Watched) -> list[torch.Tensor]:
    return [p.detach().clone() for p in watched.model.parameters()]


def assert_same_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for a, b in zip(expected, found, strict=True):
        assert (a["name"], a["valid"]) == (b["name"], b["valid"])
        for key in ("angle", "update_rms", "feature_rms", "backward_rms", "aligned_decrease"):
            assert b[key] == pytest.approx(a[key], rel=2e-4), key


@pytest.fixture
def expected() -> Any:
    watched = Watched("uncompiled")
    watched.train()
    watched.close()
    assert len(watched.rows) == 4
    return watched.rows


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True], ids=["one after the other", "together"])
@pytest.mark.parametrize("order", ["pm", "mp", "ppmmp", "mpmpm", "mmmmm"])
@pytest.mark.parametrize("way", WAYS)
def test_models_with_and_without_a_monitor_in_any_order(way: Any, order: str, together: bool, expected: Any) -> None:
    """p: without, m: with. All are trained the same, and there are no more graphs for five models than for two."""
    sweep, trained = [], []
    for kind in order:
        watched = Watched(way, attach=kind == "m")
        watched.train()
        sweep.append(watched)
        trained.append(state(watched))
        if not together:
            watched.close()
    for watched in sweep:
        if together:
            watched.train(1)  # the graphs of the others have come to the front meanwhile
            watched.close()
    for kind, watched in zip(order, sweep, strict=True):
        if kind == "m":
            assert len(watched.rows) == (6 if together else 4)
            assert_same_rows(watched.rows[:4], expected)
    assert all(torch.equal(a, b) for other in trained[1:] for a, b in zip(trained[0], other, strict=True))
    # With taps, with gradient and without; without hooks, once more if that was made before the first monitor.
    # Compiled in place, each hook is a graph of its own.
    assert graphs() <= 4


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
def test_backends(way: Any, backend: str, expected: Any) -> None:
    plain = Watched(way, backend, attach=False)
    plain.train()
    watched = Watched(way, backend)
    watched.train()
    watched.close()
    assert_same_rows(watched.rows, expected)
    assert all(torch.equal(a, b) for a, b in zip(state(plain), state(watched), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_attached_after_the_first_call_and_again_after_close(way: Any) -> None:
    watched = Watched(way, attach=False)
    watched.train(1)
    for _ in range(3):
        watched.attach()
        watched.train()
        watched.close()
        assert [row["step"] for row in watched.rows] == [0, 0, 1, 1]
        assert all(row["valid"] for row in watched.rows)
        before = len(watched.rows)
        watched.train(1)  # without
        assert len(watched.rows) == before
    assert graphs() <= 4


@pytest.mark.parametrize("way", WAYS)
def test_after_close_the_graph_is_that_of_the_model_alone(way: Any) -> None:
    captured: list[list[str]] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        captured.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    plain = Watched(way, backend, attach=False)
    plain.train(1)
    alone = list(captured)
    watched = Watched(way, backend)
    watched.train(1)
    watched.close()
    del captured[:]
    torch._dynamo.reset()
    watched.train(1)
    assert captured == alone
    assert not any("tap" in name for nodes in captured for name in nodes)


@pytest.mark.parametrize("way", WAYS)
def test_two_monitors_of_one_model(way: Any, expected: Any) -> None:
    watched = Watched(way, attach=False)
    watched.train(1)
    watched = Watched(way)
    others: list[dict[str, Any]] = []
    options: dict[str, Any] = watched.options | {"every": 2}
    with fastfs.Monitor(watched.model, watched.optimizer, sinks=[measured_into(others)], **options):
        watched.train()
    watched.close()
    assert_same_rows(watched.rows, expected)
    assert_same_rows(others, expected[:2])


class Step:
    """What torch.compile takes that is no module: the model is called inside of a method."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) * 1.0


def test_functions_around_the_model() -> None:
    """Two of one code: the second is watched."""
    found = []
    for attach in (False, True):
        torch.manual_seed(0)
        model = Net(depth=2)
        optimizer = sgd(model)
        call = torch.compile(Step(model).__call__, backend="eager")
        seen: list[dict[str, Any]] = []
        options: dict[str, Any] = {"layers": loops.BLOCKS, "every": 1, "sinks": [measured_into(seen)], "verbose": False}
        monitor = fastfs.Monitor(model, optimizer, **options) if attach else None
        for step in range(2):
            x, y = rows(step)
            optimizer.zero_grad()
            F.cross_entropy(call(x), y).backward()
            optimizer.step()
        if monitor is not None:
            monitor.close()
        found.append(seen)
    assert [(row["step"], row["valid"]) for row in found[1]] == [(0, True), (0, True), (1, True), (1, True)]


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


class Iterating(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_forward_that_iterates_over_its_blocks() -> None:
    """Of a model that was compiled and trained before without a monitor, by another way of guards in Dynamo."""
    found: list[list[dict[str, Any]]] = []
    for order in ("watched", "unwatched, watched"):
        torch._dynamo.reset()
        CONFIG.skip_nnmodule_hook_guards = True
        for each in order.split(", "):
            torch.manual_seed(0)
            model: Any = torch.compile(Iterating(), backend="eager")
            optimizer = sgd(model)
            seen: list[dict[str, Any]] = []
            options: dict[str, Any] = {"layers": loops.BLOCKS, "every": 1, "verbose": False}
            with (
                fastfs.Monitor(model, optimizer, sinks=[measured_into(seen)], **options)
                if each == "watched"
                else (nullcontext())
            ):
                train(model, optimizer, 2)
        found.append(seen)
    assert len(found[0]) == 6
    assert_same_rows(found[1], found[0])


class Third(Other):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2.0


def test_unrelated_models_are_not_compiled_again() -> None:
    """Both have Linear layers, which are watched in one of them."""
    other = torch.compile(Iterating(), backend="eager")
    train(other, sgd(other), 1)
    model = torch.compile(Third(), backend="eager")
    train(model, sgd(model), 1)
    optimizer = sgd(model)
    seen: list[Any] = []
    options: dict[str, Any] = {"layers": r"blocks\.\d", "every": 1, "sinks": [measured_into(seen)], "verbose": False}
    with fastfs.Monitor(model, optimizer, **options):
        train(model, optimizer, 1)
        before = graphs()
        train(other, sgd(other), 2)
        assert graphs() == before
    assert len(seen) == 2


def test_the_last_monitor_puts_the_limit_of_recompilations_back() -> None:
    before = CONFIG.recompile_limit
    first, second = Watched("uncompiled"), Watched("uncompiled")
    assert CONFIG.recompile_limit == 4 * before
    first.close()
    assert CONFIG.recompile_limit == 4 * before
    second.close()
    assert CONFIG.recompile_limit == before
    third = Watched("uncompiled")
    with CONFIG.patch(recompile_limit=5):  # the user's own
        third.close()
        assert CONFIG.recompile_limit == 5
    CONFIG.recompile_limit = before


def test_graphs_made_past_the_settings_are_found_when_nothing_is_measured() -> None:
    """In another context, or by somebody who has set them back."""
    watched = Watched("whole")
    with CONFIG.patch(skip_nnmodule_hook_guards=True):
        plain = Watched("whole", attach=False)
        plain.train(1)
    with pytest.warns(RuntimeWarning, match="know of no hooks were found and dropped"):
        watched.train(1)
    watched.train(1)
    watched.close()
    assert [row["step"] for row in watched.rows] == [1, 1]


@pytest.mark.slow
def test_no_more_kinds_of_calls_are_too_many_than_without_a_monitor() -> None:
    """Four sizes, trained and evaluated: as many graphs as Dynamo allows. ``fullgraph`` makes one more an error."""
    for attach in (False, True):
        torch._dynamo.reset()
        watched = Watched("whole", attach=attach, every=2)
        with CONFIG.patch(automatic_dynamic_shapes=False):
            for size in (16, 5, 9, 7):
                x, y = torch.randn(size, 8), torch.randint(3, (size,))
                for _ in range(2):
                    with torch.no_grad():
                        watched.model.eval()(x)
                    watched.model.train()
                    watched.optimizer.zero_grad()
                    F.cross_entropy(watched.model(x), y).backward()
                    watched.optimizer.step()
        watched.close()
    assert {row["step"] for row in watched.rows} == {0, 2, 4, 6}
