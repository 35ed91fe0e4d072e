"""A cache of traced autograd graphs, so that a measured step walks its graph only if it may be a new one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from torch import Tensor

from fastfs._monitor.capture.forwards import uses_older
from fastfs._network.autograd_graph import Edge, Trace, signature, trace

__all__ = ["CachedGraph", "GraphCache"]

_CAPACITY = 32  # cached graphs


class CachedGraph:
    """A traced graph.

    Attributes:
        trace: The graph as numbers.
        older: Whether the forward used tensors that were computed from parameters before it began.
        uses: How often the graph was found again.
        reliable: Whether its signature has told it from all other graphs so far.
    """

    def __init__(self, trace: Trace, older: bool) -> None:
        self.trace = trace
        self.older = older
        self.uses = 0
        self.reliable = True


class GraphCache:
    """Traces graphs and remembers them by signature.

    Two graphs may share a signature. A cached graph is therefore traced again at its 2nd, 4th, 8th, ... use, and at
    every use once its signature has turned out to be ambiguous.
    """

    def __init__(self) -> None:
        self._cached: OrderedDict[Hashable, CachedGraph] = OrderedDict()
        self.walks = 0

    def find(
        self,
        edges: Sequence[Sequence[Edge | None]],
        outputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        since: int,
        inputs: Sequence[Tensor] = (),
    ) -> tuple[Hashable, CachedGraph]:
        """Returns the key and the graph of a forward.

        Args:
            edges: Positions of every layer's calls in the graph.
            outputs: Outputs of the forward.
            parameters: The parameters that the optimizers update.
            since: Autograd's sequence number at the begin of the forward.
            inputs: Inputs of the forward.
        """
        older = any(_is_older(edge, since) for calls in edges for edge in calls)
        key = signature(edges, outputs, parameters, inputs), older
        cached = self._cached.get(key)
        if cached is not None:
            self._cached.move_to_end(key)
            cached.uses += 1
            if cached.reliable and cached.uses & (cached.uses - 1):
                return key, cached
        found = trace(edges, outputs, parameters)
        self.walks += 1
        if cached is None:
            cached = self._cached[key] = CachedGraph(found, uses_older(found, since))
            if len(self._cached) > _CAPACITY:
                self._cached.popitem(last=False)
        elif not cached.reliable or not found.same_as(cached.trace):
            cached.trace, cached.older, cached.reliable = found, uses_older(found, since), False
            return (key, self.walks), CachedGraph(cached.trace, cached.older)
        else:
            cached.older = cached.older or uses_older(found, since)
        return key, cached

    def clear(self) -> None:
        """Forgets all graphs."""
        self._cached.clear()


def _is_older(edge: Edge | None, since: int) -> bool:
    return edge is not None and 0 <= edge[0]._sequence_nr() < since
