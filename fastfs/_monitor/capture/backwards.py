"""Which backwards count: those that add to ``.grad``, as training does, and not those of ``torch.autograd.grad``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Backwards", "GradientWatch", "current", "stamps"]


class GradientWatch(Protocol):
    """Compares the gradients at the end of a backward with those that are there later."""

    def note(self) -> None:
        """Notes that a backward which adds to gradients runs in this thread."""

    def written_since_backward(self) -> bool:
        """Returns whether a gradient was replaced or written to since the last backward; False inside a backward."""

    def nonzero(self) -> Tensor:
        """Returns whether any sampled element of the gradients is nonzero now: bool () on a device."""


def current() -> int:
    """Number of the backward that is running in this thread; -1 outside of one."""
    return torch._C._current_graph_task_id()


class Backwards:
    """Asks of every backward that brings a gradient whether it reaches a parameter's ``.grad``.

    A hook on every parameter would tell as much, at the price of a call per parameter in every backward.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self._known: dict[int, bool] = {}  # by number

    def note(self) -> int:
        """The number of the backward that is running in this thread, which is asked if it is new."""
        number = current()
        if number not in self._known:
            self._known[number] = any(map(_accumulated, self.parameters))
        return number

    def counts(self, number: int) -> bool:
        """Whether that backward was one of training; if none is known to be, all are."""
        return self._known.get(number, False) or not any(self._known.values())

    def trained(self, numbers: Iterable[int]) -> bool:
        """Whether one of these backwards is known to be one of training."""
        return any(self._known.get(number, False) for number in numbers)

    def clear(self) -> None:
        self._known.clear()


def stamps(tensors: Sequence[Tensor]) -> list[tuple[int, int] | None]:
    """Which gradients there are, and how often each has been written to."""
    return [None if (g := p.grad) is None else (id(g), g._version) for p in tensors]


def _accumulated(p: Tensor) -> bool:
    """Whether the backward that is running adds to the gradient of this parameter, if nothing fails."""
    if not (p.requires_grad and p.is_leaf):
        return False
    with torch.enable_grad():
        function = p.view_as(p).grad_fn  # the usual way to the node that accumulates
    # Not kept: a node that outlives the graph is in the way of model.to(dtype).
    node = None if function is None else function.next_functions[0][0]
    if node is None:  # in torch.func, which has gradients of its own
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch's answer for what torch.autograd.grad is asked for
        return False
