"""Tells backwards of training, which accumulate into ``.grad``, from those of ``torch.autograd.grad``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastfs._monitor.capture.taps import Guarded
from fastfs._network.placements import is_distributed, version

__all__ = ["GradientWatch", "TrainingBackwards", "current", "queue_last", "stamps"]


class GradientWatch(Protocol):
    """Compares the gradients at the end of a backward with those that are there later."""

    def note(self) -> None:
        """Notes that a backward which adds to gradients runs in this thread."""

    def written_since_backward(self) -> bool:
        """Returns whether a gradient was replaced or written to since the last backward; False inside a backward."""

    def nonzero(self) -> Tensor:
        """Returns whether any sampled element of the gradients is nonzero now: bool () on a device."""


def current() -> int:
    """Returns the number of the backward that runs in this thread, or -1 if none does."""
    return torch._C._current_graph_task_id()


def queue_last(function: Callable[[], None], failed: Callable[[Exception], None]) -> None:
    """Has a function called at the end of the running backward, after what others queue in this backward.

    DistributedDataParallel and FSDP2 do, and set gradients there.

    Args:
        function: The function.
        failed: Called with an exception in it.
    """
    engine = torch.autograd.Variable._execution_engine
    last = Guarded(function, failed)
    engine.queue_callback(Guarded(lambda: engine.queue_callback(last), failed))


class TrainingBackwards:
    """Determines for every backward that computes a gradient whether it accumulates into a parameter's ``.grad``.

    Hooks on all parameters would tell the same, at the cost of one call per parameter and backward.

    Args:
        leaves: Returns the leaves of the autograd graph that stand for the parameters that the optimizers update.
    """

    def __init__(self, leaves: Callable[[], Sequence[Tensor]]) -> None:
        self.leaves = leaves
        self._known: dict[int, bool] = {}  # by number

    def note(self) -> int:
        """Returns the number of the running backward, and classifies the backward if it is new."""
        number = current()
        if number not in self._known:
            self._known[number] = any(map(_accumulated, self.leaves()))
        return number

    def counts(self, number: int) -> bool:
        """Returns whether a backward is one of training. If none is known to be, all count."""
        return self._known.get(number, False) or not any(self._known.values())

    def trained(self, numbers: Iterable[int]) -> bool:
        """Returns whether one of these backwards is known to be one of training."""
        return any(self._known.get(number, False) for number in numbers)

    def clear(self) -> None:
        """Forgets the backwards of the step."""
        self._known.clear()


def stamps(tensors: Sequence[Tensor]) -> list[tuple[int, int] | None]:
    """Returns identity and version of every gradient, None where there is none."""
    return [None if (g := p.grad) is None else (id(g), version(g)) for p in tensors]


def _accumulated(p: Tensor) -> bool:
    """Returns whether the running backward will accumulate into the gradient of this parameter."""
    if not (p.requires_grad and p.is_leaf):
        return False
    with torch.enable_grad():
        # The documented way to the node that accumulates. A DTensor with uneven shards has no views of its shape.
        function = (torch.ops.aten.alias(p) if is_distributed(p) else p.view_as(p)).grad_fn
    # The node is not cached: one that outlives the graph breaks model.to(dtype).
    node = None if function is None else function.next_functions[0][0]
    if node is None:  # inside torch.func, which computes gradients of its own
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # raised for the inputs of torch.autograd.grad
        return False
