"""Models that torch.compile has compiled: what is recorded, how many graphs there are, what cannot be seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import fastfs
from tests.helpers import monitor_loops as loops
from tests.helpers.monitor_cases import measured_into, sgd, train
from tests.helpers.monitor_loops import Net

INDUCTORS = "ignore:.torch.jit.*is deprecated:DeprecationWarning"  # when torch loads it
pytestmark = [pytest.mark.graphs, pytest.mark.filterwarnings(loops.DYNAMO), pytest.mark.filterwarnings(INDUCTORS)]
BLOCKS = loops.BLOCKS


@pytest.fixture(autouse=True)
def fresh(threads: Any) -> Iterator[None]:
    """No graphs of other tests, and a recompilation past the bounds is an error."""
    threads(1)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def watch(model: nn.Module, **options: Any) -> tuple[torch.optim.Optimizer, list[dict[str, Any]], fastfs.Monitor]:
    optimizer = sgd(model)
    seen: list[dict[str, Any]] = []
    keywords: dict[str, Any] = {"layers": BLOCKS, "every": 1, "verbose": False} | options
    return optimizer, seen, fastfs.Monitor(model, optimizer, sinks=[measured_into(seen)], **keywords)


def whole(model: nn.Module, backend: str = "aot_eager") -> nn.Module:
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    return compiled


def by_blocks(model: nn.Module, backend: str = "aot_eager") -> nn.Module:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend=backend, fullgraph=True)
    return model


def in_place(model: nn.Module, backend: str = "aot_eager") -> nn.Module:
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    return model


WAYS = {"whole": whole, "by blocks": by_blocks, "in place": in_place}
INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
@pytest.mark.parametrize("way", WAYS)
def test_records_are_those_of_the_eager_model(way: Any, backend: Any) -> None:
    """An in-place ReLU follows the last watched block."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Net(depth=2)
        if compiled:
            model = WAYS[way](model, backend)
        optimizer, seen, monitor = watch(model, every=2)
        train(model, optimizer, 3)
        monitor.close()
        found.append(seen)
    assert [(row["step"], row["name"]) for row in found[0]] == [(s, f"blocks.{i}") for s in (0, 2) for i in (0, 1)]
    for a, b in zip(*found, strict=True):
        assert b["valid"]
        assert b["name"] == a["name"]
        for key in ("angle", "update_rms", "feature_rms", "backward_rms", "aligned_decrease"):
            assert b[key] == pytest.approx(a[key], rel=2e-4), key
        assert b["residual"] == pytest.approx(a["residual"], abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_number_of_graphs_does_not_grow_with_blocks_and_steps(way: Any) -> None:
    """There is one graph for taps on and one for off, and none is compiled for the next block or step.

    If a block is compiled in place, its hook is a graph of its own, with gradients and without.
    """
    counts = {}
    for monitored in (False, True):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = WAYS[way](Net(depth=12))
        optimizer = sgd(model)
        options: dict[str, Any] = {
            "layers": BLOCKS,
            "every": 3,
            "aligned_every": 1,
            "sinks": [lambda rows: None],
            "verbose": False,
        }
        monitor = fastfs.Monitor(model, optimizer, **options) if monitored else None
        train(model, optimizer, 4)
        counts[monitored] = graphs()
        with torch._dynamo.config.patch(error_on_recompile=True):
            train(model, optimizer, 12)
        assert graphs() == counts[monitored]
        if monitor is not None:
            monitor.close()
    assert counts[False] == 1
    assert counts[True] == (4 if way == "in place" else 2)


def test_steps_that_are_not_due_run_the_graph_of_the_model_alone() -> None:
    captured: list[list[str]] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        captured.append([str(node.target) for node in graph.graph.nodes if node.op != "placeholder"])
        return graph

    plain = torch.compile(Net(), backend=backend, fullgraph=True)
    train(plain, sgd(plain), 1)
    torch._dynamo.reset()
    model = torch.compile(Net(), backend=backend, fullgraph=True)
    optimizer, seen, monitor = watch(model, every=2)
    train(model, optimizer, 2)
    monitor.close()
    assert len(seen) == 3
    off = [nodes for nodes in captured[1:] if not any("tap" in node for node in nodes)]
    on = [nodes for nodes in captured[1:] if any("tap" in node for node in nodes)]
    assert off == captured[:1]
    assert on


def test_a_model_compiled_in_place_before_attaching_is_an_error() -> None:
    model = Net()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"Attach to compiled = torch.compile\(model\) instead"):
        watch(model)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_the_second_forward_draws_the_same_masks(backend: Any) -> None:
    """Without a step nothing moves, exactly."""
    model: Any = torch.compile(Net(drop=0.5), backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen: list[dict[str, Any]] = []
    with fastfs.Monitor(model, optimizer, layers=BLOCKS, every=1, sinks=[measured_into(seen)], verbose=False):
        train(model, optimizer, 2)
    assert [row["update_rms"] for row in seen] == [0.0] * 6
    assert {row["why"] for row in seen} == {"no update of the features"}


@pytest.mark.parametrize("options", [{"mode": "jvp"}, {"amplify": True}], ids=["jvp", "amplify"])
@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_modes_that_run_eagerly_say_when_they_see_other_masks(
    backend: Any, drop: float, options: dict[str, Any]
) -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Net(drop=drop)
        if compiled:
            model = whole(model, backend)
        optimizer, seen, monitor = watch(model, **options)
        train(model, optimizer, 2)
        monitor.close()
        found.append(seen)
    for a, b in zip(*found, strict=True):
        assert a["valid"]
        if b["valid"]:
            for key in ("angle", "update_rms", "residual"):
                assert b[key] == pytest.approx(a[key], rel=0.02, abs=1e-3), key
        else:
            assert b["why"].startswith("torch.compile draws other random numbers")
    assert all(b["valid"] for b in found[1]) == (drop == 0.0 or backend != "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_training_under_inductor_is_bitwise_the_same(way: Any) -> None:
    loop = loops.Loop(
        "inductor", strict=False, model=lambda: Net(drop=0.2), prepare=lambda model: WAYS[way](model, "inductor")
    )
    off, _ = loop.train(10, None)
    torch._dynamo.reset()
    on, (seen,) = loop.train(10, {"every": 3, "aligned_every": 1})
    loops.assert_bitwise(off, on)
    assert [row["valid"] for row in seen if row["kind"] == "measured"] == [True] * 12
    assert len([row for row in seen if row["kind"] == "predicted"]) == 18


class InHalf(nn.Module):
    """Computes a part of its layers in 16 bits, by autocast or by hand, whatever the loop does.

    Args:
        how: "autocast" or "cast"; the last block only with ``late``.
    """

    def __init__(self, how: str, *, late: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)
        self.how, self.late = how, late
        self.in_half = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            if not self.in_half or (self.late and index < 2):
                x = torch.tanh(block(x))
            elif self.how == "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    x = torch.tanh(block(x)).float()
            else:
                x = torch.tanh(block(x.bfloat16().float()))
        return self.head(x)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_the_precision_within_a_compiled_forward_is_seen(how: str, late: bool) -> None:
    """Small moves drown in 16 bits: no row is valid and wrong. Per layer and step: every other one is in float32."""
    torch.manual_seed(0)
    inner = InHalf(how, late=late)
    model: Any = torch.compile(inner, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen: list[dict[str, Any]] = []
    options: dict[str, Any] = {"layers": r"^blocks\.\d$", "every": 1, "verbose": False, "sinks": [measured_into(seen)]}
    with fastfs.Monitor(model, optimizer, **options):
        for step in range(4):
            inner.in_half = step % 2 == 0
            train(model, optimizer, 1)
    valid = [[row["valid"] for row in seen if row["step"] == step] for step in range(4)]
    assert valid == [[late, late, False], [True, True, True]] * 2
    for row in seen:
        assert row["valid"] or "rounding noise" in row["why"] or row["why"] == "no update of the features"
