"""Calls as CUDA graphs, so that implementations with many kernels are not charged for launching them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fastfs._bench.comparison import reason

MOST_COPIES = 64
"""Largest number of graphs per implementation; calls that need more copies of the inputs have few launches."""


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Make calls that wait for the GPU raise RuntimeError inside of the ``with`` block."""
    before = torch.cuda.get_sync_debug_mode()
    _set_mode("error")
    try:
        yield
    finally:
        _set_mode(before)


def _set_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once that the mode is a prototype
        torch.cuda.set_sync_debug_mode(mode)


def as_graphs(calls: Sequence[Callable[[], object]]) -> tuple[Sequence[Callable[[], object]], str]:
    """Capture calls as graphs.

    Each call runs once before the capture. Calls that wait for the device are not captured: a failed capture would
    leave torch's allocator in a state that affects later calls.

    Returns:
        Replays of the calls and "graph"; or the calls themselves, and the reason.
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
    except Exception as error:  # calls that cannot be captured are timed as they are, as the result says
        torch.cuda.set_stream(stream)  # a failed capture does not restore it
        torch.cuda.synchronize()
        return calls, f"calls, because they cannot be captured as a graph: {reason(error)}"
    return replays, "graph"


def _replay(graph: torch.cuda.CUDAGraph, result: object) -> Callable[[], object]:
    def replay() -> object:
        graph.replay()
        return result  # keeps the output alive as long as the graph that writes to it

    return replay
