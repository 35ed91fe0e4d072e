"""Calls as CUDA graphs, on a fake of the part of torch.cuda that captures and replays them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from benchmarks.ops import graphs
from fastfs._bench.inputs import RoundRobin


class NoGraphs:
    """The part of torch.cuda that :func:`graphs.as_graphs` calls, with captures that fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.modes: list[int | str] = [0]
        self.streams: list[str] = ["one"]
        for name, value in (
            ("CUDAGraph", self.fails),
            ("graph_pool_handle", lambda: None),
            ("synchronize", lambda: None),
            ("current_stream", lambda: self.streams[-1]),
            ("set_stream", self.streams.append),
            ("get_sync_debug_mode", lambda: self.modes[-1]),
            ("set_sync_debug_mode", self.modes.append),
        ):
            monkeypatch.setattr(torch.cuda, name, value)

    def fails(self) -> None:
        self.streams.append("that of the capture")
        raise RuntimeError("no graphs here")


def test_an_implementation_that_cannot_be_captured_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = NoGraphs(monkeypatch)
    calls = [lambda: 1, lambda: 2]
    assert graphs.as_graphs(calls) == (
        calls,
        "calls, because they cannot be captured as a graph: RuntimeError: no graphs here",
    )
    assert cuda.modes == [0, "error", 0]
    assert cuda.streams == ["one", "that of the capture", "one"]
    many = calls * graphs.MOST_COPIES
    assert graphs.as_graphs(many) == (many, "calls")


def test_an_implementation_that_waits_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = NoGraphs(monkeypatch)

    def waits() -> None:
        if cuda.modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    found, timed_as = graphs.as_graphs([waits])
    assert found == [waits]
    assert timed_as.endswith("RuntimeError: called a synchronizing CUDA operation")
    assert cuda.modes == [0, "error", 0]
    assert "that of the capture" not in cuda.streams


class Buffer:
    """Memory that was allocated before the capture."""


class Graph:
    """A graph that keeps addresses, not what lies at them, as a captured one does."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.addresses: list[weakref.ref[Buffer]] = []

    def replay(self) -> None:
        if any(address() is None for address in self.addresses):
            raise RuntimeError("an illegal memory access was encountered")


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def capture(graph: Graph, pool: object) -> Iterator[None]:
        assert pool == "the pool"
        monkeypatch.setattr(Graph, "capturing", graph)
        yield
        monkeypatch.setattr(Graph, "capturing", None)

    replaced: dict[str, Any] = {
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": lambda: "the pool",
        "synchronize": lambda: None,
        "current_stream": lambda: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)


def with_table(number: int) -> Callable[[], int]:
    """Return a call that owns a table, as those of the Triton kernels do."""
    table = Buffer()

    def call() -> int:
        if Graph.capturing is not None:
            Graph.capturing.addresses.append(weakref.ref(table))
        return number

    return call


def test_what_a_captured_call_owns_lives_as_long_as_its_graph(fake_graphs: None) -> None:
    """The caller keeps only what as_graphs returns, as benchmarks.ops.feature_stats does."""
    replays, timed_as = graphs.as_graphs([with_table(1), with_table(2)])
    assert timed_as == "graph"
    tables = [address for replay in replays for address in replay.graph.addresses]  # type: ignore[attr-defined]
    assert len(tables) == 2
    turns = RoundRobin(2).over(replays)
    del replays
    gc.collect()
    assert [turns() for _ in range(4)] == [1, 2, 1, 2]
    del turns
    gc.collect()
    assert [address() for address in tables] == [None, None]
