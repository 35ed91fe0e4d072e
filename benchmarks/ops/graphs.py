"""Calls as CUDA graphs, so that what launches many kernels is not charged for the host that launches them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fastfs._bench.comparison import reason

MOST_COPIES = 64
"""Graphs of one contestant: where more copies of the inputs are needed a call has few launches, which queue up."""


@contextmanager
def nothing_waits() -> Iterator[None]:
    """A call of torch in the ``with`` block that waits for the GPU raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    _set_mode("error")
    try:
        yield
    finally:
        _set_mode(before)


def _set_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that the mode is a prototype
        torch.cuda.set_sync_debug_mode(mode)


def as_graphs(calls: Sequence[Callable[[], object]]) -> tuple[Sequence[Callable[[], object]], str]:
    """Replays of the calls, and "graph"; or the calls themselves, and why.

    Each is called once before. One that waits for the device is not captured: a capture that fails leaves torch's
    allocator in a state that later calls suffer from.
    """
    if len(calls) > MOST_COPIES:
        return calls, "calls"
    replays = []
    stream = torch.cuda.current_stream()
    try:
        for call in calls:
            call()
        torch.cuda.synchronize()
        with nothing_waits():
            calls[0]()
        pool = torch.cuda.graph_pool_handle()
        for call in calls:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                result = call()
            replays.append(_replay(graph, result))
        for replay in replays:
            replay()
        torch.cuda.synchronize()
    except Exception as error:  # whatever cannot be captured is timed as it is, and the result says so
        torch.cuda.set_stream(stream)  # which a capture that fails leaves as it is
        torch.cuda.synchronize()
        return calls, f"calls, for it cannot be captured as a graph: {reason(error)}"
    return replays, "graph"


def _replay(graph: torch.cuda.CUDAGraph, result: object) -> Callable[[], object]:
    def replay() -> object:
        graph.replay()
        return result  # lives as long as the graph that writes it

    return replay
