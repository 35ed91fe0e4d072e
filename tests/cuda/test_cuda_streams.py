"""Every op on a real GPU: on several streams at once, captured in graphs, on another device, without waiting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.ops.graphs import nothing_waits
from tests.helpers.busy_device import occupied
from tests.helpers.compare import assert_same
from tests.helpers.op_cases import OPS, Call

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("name", OPS)]


def assert_all_same(found: list[Tensor], expected: list[Tensor], what: str = "") -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_same(a, b, f"{what} result {i}")


def two(name: str) -> list[tuple[Call, list[Tensor]]]:
    """Two calls on different inputs, with what they give one after the other."""
    made = [OPS[name]("cuda") for _ in range(2)]
    found = [(call, call()) for call in made]
    torch.cuda.synchronize()
    return found


def captured(call: Call) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def test_two_streams_at_once(name: str) -> None:
    pair = two(name)
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    results: list[list[list[Tensor]]] = [[], []]
    for stream in streams:
        with torch.cuda.stream(stream):
            occupied(0.1)  # so that the calls of both are queued when the first of them starts
    for _ in range(40):
        for i, (call, _) in enumerate(pair):
            with torch.cuda.stream(streams[i]):
                results[i].append(call())
    torch.cuda.synchronize()
    for (_, expected), found in zip(pair, results, strict=True):
        for again in found:
            assert_all_same(again, expected)


def test_two_graphs_and_calls_at_once(name: str) -> None:
    """Replays on two streams, while calls run on the stream that the graphs were captured from."""
    pair = two(name)
    graphs = [captured(call) for call, _ in pair]
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for _, results in graphs:
        for x in results:
            x.fill_(-1)
    torch.cuda.synchronize()
    calls: list[list[list[Tensor]]] = [[], []]
    for _ in range(20):
        for i, (call, _) in enumerate(pair):
            with torch.cuda.stream(streams[i]):
                graphs[i][0].replay()
            calls[i].append(call())
    torch.cuda.synchronize()
    for i, (_, expected) in enumerate(pair):
        assert_all_same(graphs[i][1], expected, "replayed")
        for found in calls[i]:
            assert_all_same(found, expected, "called")


def test_nothing_waits_for_the_device(name: str) -> None:
    call = OPS[name]("cuda")
    expected = call()
    torch.cuda.synchronize()
    with nothing_waits():
        found = call()
    assert_all_same(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_of_the_tensors_not_the_current_one(name: str) -> None:
    torch.manual_seed(1)
    expected = OPS[name]("cuda:0")()
    torch.manual_seed(1)
    found = OPS[name]("cuda:1")()
    assert torch.cuda.current_device() == 0
    assert {x.device for x in found} == {torch.device("cuda:1")}
    assert_all_same([x.cpu() for x in found], [x.cpu() for x in expected])
