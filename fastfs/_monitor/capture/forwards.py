"""Questions about a forward that is running: is it nested, on inputs of its own, with the weights of the model?"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._network.autograd_graph import Trace

__all__ = ["calls_under_way", "depends_on", "places_of", "runs_on_own", "sequence_number", "uses_older"]

Place = tuple[dict[str, Any], str, Tensor]
"""Where a module keeps a parameter: the dictionary, the name in it, and the parameter."""


def calls_under_way(model: nn.Module) -> int:
    """How many calls of the model this thread is in: more than one if the model calls itself.

    A forward that an interrupt has ended tells no hook, so the calls are counted on the stack.
    """
    count = 0
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is model:
            count += 1
        frame = frame.f_back
    return count


def places_of(model: nn.Module, parameters: Iterable[Tensor]) -> list[Place]:
    """Where the model keeps these parameters."""
    wanted = set(map(id, parameters))
    return [
        (module._parameters, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None and id(p) in wanted
    ]


def runs_on_own(places: Iterable[Place]) -> bool:
    """False while ``torch.func.functional_call`` has put other tensors in the place of parameters."""
    return all(entries.get(name) is p for entries, name, p in places)


def depends_on(inputs: Iterable[Tensor], parameters: Sequence[Tensor]) -> bool:
    """Whether the graph of an input reaches a parameter, whose effect a forward on a copy would miss."""
    open_nodes = [x.grad_fn for x in inputs if x.grad_fn is not None]
    if not open_nodes:
        return False
    wanted = set(map(id, parameters))
    seen = set(open_nodes)
    while open_nodes:
        node = open_nodes.pop()
        if id(getattr(node, "variable", None)) in wanted:
            return True
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                open_nodes.append(below)
    return False


def uses_older(trace: Trace, since: int) -> bool:
    """Whether a forward used results of parameters that were computed before it began.

    Args:
        trace: the forward's graph.
        since: autograd's sequence number at its beginning.
    """
    older = [number for number, made in enumerate(trace.sequence.tolist()) if 0 <= made < since]
    starts, targets, parameters = trace.starts.tolist(), trace.targets.tolist(), trace.parameters.tolist()
    seen = set(older)
    while older:
        number = older.pop()
        if parameters[number] >= 0:
            return True
        for below in targets[starts[number] : starts[number + 1]]:
            if below not in seen:
                seen.add(below)
                older.append(below)
    return False


def sequence_number() -> int:
    """The number that autograd will give to the next function made in this thread."""
    return int(torch._C._autograd._get_sequence_nr())
