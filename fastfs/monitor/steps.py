"""When a training step begins and when it is over, told from the hooks of one or several optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

__all__ = ["OptimizerSteps", "StepListener"]


class StepListener(Protocol):
    """What happens around optimizer steps."""

    def before(self, optimizer: int, first: bool) -> None:
        """Right before an optimizer's step, gradients at hand; ``first`` in this training step."""

    def after(self, optimizer: int) -> None:
        """Right after it."""

    def finish(self) -> None:
        """All optimizers have stepped, or the next forward begins, or the backward in which they step is over."""


class OptimizerSteps:
    """Turns the steps of optimizers into training steps.

    A training step is over when every optimizer has stepped. Optimizers that step within the backward (from hooks on
    the gradients) make it end with the backward. Those that do not step this time do not hold it up: the next forward
    of the model ends it, too. A closure that is given to ``step`` computes the gradients within it: the step begins
    when the closure is over.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], listener: StepListener) -> None:
        self._count = len(optimizers)
        self._listener = listener
        self._begun = False
        self._stepped: set[int] = set()
        self._queued = False
        self._handles: list[RemovableHandle] = []
        for index, optimizer in enumerate(optimizers):
            self._handles.append(optimizer.register_step_pre_hook(_Before(self._before, index)))
            self._handles.append(optimizer.register_step_post_hook(_After(self._after, index)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def forward_begins(self) -> None:
        """The model is called in training."""
        if self._in_backward():
            return
        if self._stepped:
            self._finish()
        self._begun = False  # nor does a step that raised go on

    def _before(self, index: int) -> None:
        first, self._begun = not self._begun, True
        self._listener.before(index, first)

    def _after(self, index: int) -> None:
        self._listener.after(index)
        self._stepped.add(index)
        if self._in_backward():
            if not self._queued:
                self._queued = True
                torch.autograd.Variable._execution_engine.queue_callback(self._backward_over)
        elif len(self._stepped) == self._count:
            self._finish()

    def _backward_over(self) -> None:
        self._queued = False
        if self._stepped:
            self._finish()

    def _finish(self) -> None:
        self._begun = False
        self._stepped.clear()
        self._listener.finish()

    @staticmethod
    def _in_backward() -> bool:
        return torch._C._current_graph_task_id() != -1


class _Before:
    def __init__(self, function: Callable[[int], None], index: int) -> None:
        self._function = function
        self._index = index

    def __call__(self, _optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """New arguments for ``step`` if it has a closure; ``args`` begin with the optimizer itself."""
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._then(args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._then(kwargs["closure"])}
        self._function(self._index)
        return None

    def _then(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def wrapped() -> Any:
            loss = closure()
            with torch.no_grad():  # the step calls closures with gradients on
                self._function(self._index)
            return loss

        return wrapped


class _After:
    def __init__(self, function: Callable[[int], None], index: int) -> None:
        self._function = function
        self._index = index

    def __call__(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self._function(self._index)
