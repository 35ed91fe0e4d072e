"""Graphs of forwards that are known: a measured step walks its graph only where it may be another one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from torch import Tensor

from fastfs._monitor.capture.forwards import uses_older
from fastfs._network.autograd_graph import Edge, Trace, signature, trace

__all__ = ["Known", "Traces"]

_MOST = 32  # graphs that are remembered


class Known:
    """A graph.

    Attributes:
        trace: of it.
        older: the forward used results of parameters that were computed before it began.
    """

    def __init__(self, trace: Trace, older: bool) -> None:
        self.trace = trace
        self.older = older
        self.uses = 0
        self.reliable = True  # whether its signature has told it from all other graphs so far


class Traces:
    """Walks graphs, and remembers them by signature.

    A signature may miss a difference, so a known graph is walked again at its second, fourth, eighth use and so on; one
    whose signature has failed is walked every time.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Known] = OrderedDict()
        self.walks = 0

    def of(
        self,
        edges: Sequence[Sequence[Edge | None]],
        outputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        since: int,
        inputs: Sequence[Tensor] = (),
    ) -> tuple[Hashable, Known]:
        """The key and the graph of a forward.

        Args:
            edges: of every layer's visits.
            outputs: of the forward.
            parameters: those that the optimizer updates.
            since: autograd's sequence number when the forward began.
            inputs: of the forward.
        """
        older = any(_is_older(edge, since) for visits in edges for edge in visits)
        key = signature(edges, outputs, parameters, inputs), older
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            known.uses += 1
            if known.reliable and known.uses & (known.uses - 1):
                return key, known
        found = trace(edges, outputs, parameters)
        self.walks += 1
        if known is None:
            known = self._known[key] = Known(found, uses_older(found, since))
            if len(self._known) > _MOST:
                self._known.popitem(last=False)
        elif not known.reliable or not found.same_as(known.trace):
            known.trace, known.older, known.reliable = found, uses_older(found, since), False
            return (key, self.walks), Known(known.trace, known.older)
        else:
            known.older = known.older or uses_older(found, since)
        return key, known

    def clear(self) -> None:
        self._known.clear()


def _is_older(edge: Edge | None, since: int) -> bool:
    return edge is not None and 0 <= edge[0]._sequence_nr() < since
