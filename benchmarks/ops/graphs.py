"""Calls as CUDA graphs, so that implementations with many kernels are not charged for launching them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class CapturedCall:
    """A call as a graph, which replays the call when it is called.

    A graph launches kernels on the addresses that the call used when it was captured. It owns the memory that was
    allocated during the capture, but nothing that existed before: inputs, tables and buffers that the call holds, and
    compiled kernels. The call is therefore kept as long as the graph.

    Args:
        graph: the captured graph.
        call: the call that was captured.
        result: what the call returned, to which the graph writes.
    """

    graph: torch.cuda.CUDAGraph
    call: Callable[[], object]
    result: object

    @classmethod
    def capture(cls, call: Callable[[], object], pool: Any) -> CapturedCall:
        """Capture a call, with its memory from the given pool of graphs."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = call()
        return cls(graph, call, result)

    def __call__(self) -> object:
        """Replay the graph and return the result of the call."""
        self.graph.replay()
        return self.result


def as_graphs(calls: Sequence[Callable[[], object]]) -> tuple[Sequence[Callable[[], object]], str]:
    """Capture calls as graphs.

    Each call runs once before the capture. Calls that wait for the device are not captured: a failed capture would
    leave torch's allocator in a state that affects later calls.

    Returns:
        A :class:`CapturedCall` for each call, and "graph"; or the calls themselves, and the reason.
    """
    if len(calls) > MOST_COPIES:
        return calls, "calls"
    stream = torch.cuda.current_stream()
    try:
        for call in calls:
            call()
        torch.cuda.synchronize()
        with nothing_waits():
            calls[0]()
        pool = torch.cuda.graph_pool_handle()
        replays = [CapturedCall.capture(call, pool) for call in calls]
        for replay in replays:
            replay()
        torch.cuda.synchronize()
    except Exception as error:  # calls that cannot be captured are timed as they are, as the result says
        torch.cuda.set_stream(stream)  # a failed capture does not restore it
        torch.cuda.synchronize()
        return calls, f"calls, because they cannot be captured as a graph: {reason(error)}"
    return replays, "graph"
