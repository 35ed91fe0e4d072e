"""Which backwards count: those that add to ``.grad``, as training does, and not those of ``torch.autograd.grad``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastfs.monitor.capture.taps import Hook, Switch

__all__ = ["Backwards", "current"]


def current() -> int:
    """Number of the backward that is running in this thread; -1 outside of one."""
    return torch._C._current_graph_task_id()


class Backwards:
    """Notes the numbers of the backwards that reach a parameter's ``.grad``."""

    def __init__(self, switch: Switch) -> None:
        self._switch = switch
        self._numbers: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def watch(self, parameters: Sequence[Tensor]) -> None:
        """These parameters, instead of those before."""
        self.close()
        note = _Note(self._switch, self._numbers)
        self._handles = [
            p.register_post_accumulate_grad_hook(note) for p in parameters if p.requires_grad and p.is_leaf
        ]

    def counts(self, number: int) -> bool:
        """Whether that backward was one of training; if none is known to be, all are."""
        return not self._numbers or number in self._numbers

    def clear(self) -> None:
        self._numbers.clear()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Note(Hook):
    def __init__(self, switch: Switch, numbers: set[int]) -> None:
        self.switch = switch
        self.numbers = numbers

    def __call__(self, _parameter: Tensor) -> None:
        if self.switch.on:
            self.numbers.add(current())
