"""Calls as CUDA graphs, so that what launches many kernels is not charged for the host that launches them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastfs.bench.race import reason

MOST_COPIES = 64
"""Graphs of one contestant: where more copies of the inputs are needed a call has few launches, which queue up."""


def as_graphs(calls: Sequence[Callable[[], object]]) -> tuple[Sequence[Callable[[], object]], str]:
    """Replays of the calls, and "graph"; or the calls themselves, and why.

    Every call must have run before.
    """
    if len(calls) > MOST_COPIES:
        return calls, "calls"
    replays = []
    pool = torch.cuda.graph_pool_handle()
    try:
        for call in calls:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                result = call()
            replays.append(_replay(graph, result))
        for replay in replays:
            replay()
        torch.cuda.synchronize()
    except Exception as error:  # whatever cannot be captured is timed as it is, and the result says so
        torch.cuda.synchronize()
        return calls, f"calls, for it cannot be captured as a graph: {reason(error)}"
    return replays, "graph"


def _replay(graph: torch.cuda.CUDAGraph, result: object) -> Callable[[], object]:
    def replay() -> object:
        graph.replay()
        return result  # lives as long as the graph that writes it

    return replay
