"""Queries about a running forward: whether it is nested, what its inputs depend on, and whose weights it uses."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._network.autograd_graph import Trace

__all__ = ["ParameterSlot", "active_calls", "depends_on", "runs_on_own", "sequence_number", "slots_of", "uses_older"]

ParameterSlot = tuple[dict[str, Any], str, Tensor]
"""Where a module stores a parameter: the dictionary, the key, and the parameter."""


def active_calls(model: nn.Module) -> int:
    """Returns the number of calls of the model on this thread's stack: more than one if the model calls itself.

    The stack is inspected because no hook runs when an interrupt ends a forward.
    """
    count = 0
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is model:
            count += 1
        frame = frame.f_back
    return count


def slots_of(model: nn.Module, parameters: Iterable[Tensor]) -> list[ParameterSlot]:
    """Returns where the model stores these parameters."""
    wanted = set(map(id, parameters))
    return [
        (module._parameters, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None and id(p) in wanted
    ]


def runs_on_own(places: Iterable[ParameterSlot]) -> bool:
    """Returns False while ``torch.func.functional_call`` has replaced parameters by other tensors."""
    return all(entries.get(name) is p for entries, name, p in places)


def depends_on(inputs: Iterable[Tensor], parameters: Sequence[Tensor]) -> bool:
    """Returns whether the graph of an input reaches a parameter. A forward on copied inputs would miss its effect."""
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
    """Returns whether a forward used tensors that were computed from parameters before it began.

    Args:
        trace: The forward's graph.
        since: Autograd's sequence number at the begin of the forward.
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
    """Returns the sequence number that autograd will assign to the next node created in this thread."""
    return int(torch._C._autograd._get_sequence_nr())
