"""Forwards recorded for the analysis of their structure."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastfs._network.structure import Trace, edge_of, trace

UNUSED = "no output depends on it, or it is a view that was changed in place"
NESTED = "runs several times, one run using the result of another"


class Forward:
    """One forward: features with their positions in the graph, outputs, and the outputs that the loss uses."""

    def __init__(self, layers: int) -> None:
        self.values: list[list[Tensor]] = [[] for _ in range(layers)]
        self.edges: list[list[tuple[object, int] | None]] = [[] for _ in range(layers)]
        self.outputs: list[Tensor] = []
        self.used: list[int] = []

    def see(self, layer: int, value: Tensor) -> Tensor:
        self.values[layer].append(value)
        self.edges[layer].append(edge_of(value))
        return value

    def trace(self, parameters: Sequence[Tensor]) -> Trace:
        return trace(self.edges, self.outputs, parameters)
