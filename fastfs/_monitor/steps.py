"""When a training step begins and when it is over, told from the hooks of one or several optimizers."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from fastfs._monitor.optimizers import TrainingOptimizer, has_hooks

__all__ = ["OptimizerSteps", "StepListener"]


class StepListener(Protocol):
    """What happens around optimizer steps."""

    def enter(self, optimizer: int) -> None:
        """An optimizer's step that has a closure begins."""

    def evaluate(self, optimizer: int) -> None:
        """Its closure is about to be evaluated: has anything moved since ``enter``?"""

    def before(self, optimizer: int, first: bool) -> None:
        """Right before an optimizer's step, gradients at hand; ``first`` in this training step.

        Again for every evaluation of a closure: the last one counts.
        """

    def after(self, optimizer: int) -> None:
        """Right after it."""

    def finish(self) -> None:
        """All optimizers have stepped, or the next forward begins, or the backward in which they step is over."""

    def failed(self, error: Exception) -> None:
        """Something above has raised an exception, which was caught: this step is not to be measured."""


class OptimizerSteps:
    """Turns the steps of optimizers into training steps.

    A training step is over when every optimizer has stepped. Optimizers that step within the backward (from hooks on
    the gradients) make it end with the backward. Those that do not step this time do not hold it up: the next forward
    of the model ends it, too. A closure that is given to ``step`` computes the gradients within it: the step begins
    when the closure is over, the last time if it is called several times.

    Steps within steps (``super().step()``, a wrapper) are one: the outermost counts, and of a wrapper only if an
    optimizer within it has stepped. A step that ended with an exception, an interrupt included, is forgotten.
    """

    def __init__(self, optimizers: Sequence[TrainingOptimizer], listener: StepListener) -> None:
        self._count = len(optimizers)
        self._listener = listener
        self._first: int | None = None  # of the optimizers, in the training step under way
        self._stepped: set[int] = set()
        self._queued = -1  # the backward at whose end the step ends
        self._handles: list[RemovableHandle] = []
        self._levels = [_Levels(self, index) for index in range(len(optimizers))]
        self._overrides: list[_Override] = []
        for found, levels in zip(optimizers, self._levels, strict=True):
            for each in {id(each): each for each in (found.outer, *found.real)}.values():
                real = any(each is one for one in found.real)
                if has_hooks(each):
                    self._handles.append(each.register_step_pre_hook(_Before(levels)))
                    self._handles.append(each.register_step_post_hook(_After(levels, real)))
                else:
                    self._overrides.append(_Override(each, levels, real))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for override in self._overrides:
            override.remove()
        self._handles.clear()
        self._overrides.clear()
        for levels in self._levels:
            levels.frames.clear()

    def forward_begins(self) -> None:
        """The model is called in training."""
        if self._in_backward():
            return
        for levels in self._levels:
            levels.forget_ended(sys._getframe())
        if self._stepped:
            self._finish()
        self._first = None  # nor does a step that raised go on

    def enter(self, index: int) -> None:
        self._told(lambda: self._listener.enter(index))

    def evaluate(self, index: int) -> None:
        self._told(lambda: self._listener.evaluate(index))

    def before(self, index: int) -> None:
        if self._first is None:
            self._first = index
        self._told(lambda: self._listener.before(index, self._first == index))

    def after(self, index: int) -> None:
        self._told(lambda: self._listener.after(index))
        self._stepped.add(index)
        if self._in_backward():
            number = torch._C._current_graph_task_id()
            if self._queued != number:
                self._queued = number
                torch.autograd.Variable._execution_engine.queue_callback(self._backward_over)
        elif len(self._stepped) == self._count:
            self._finish()

    def failed(self, index: int, error: Exception) -> None:
        """What was to be told is not known: the next forward ends this step at the latest, for the one after it."""
        if not isinstance(error, Warning):  # that the user wants to be an error: it ends the call of ``step``
            self._stepped.add(index)
        self._listener.failed(error)

    def _backward_over(self) -> None:
        self._queued = -1
        if self._stepped:
            self._finish()

    def _finish(self) -> None:
        self._first = None
        self._stepped.clear()
        if not self._told(self._listener.finish):
            self._told(self._listener.finish)  # it has not begun, and the step has to end

    def _told(self, tell: Callable[[], None]) -> bool:
        """No exception of the listener's reaches the training loop, but for what it says about it; False after one."""
        try:
            tell()
        except Exception as error:
            self._listener.failed(error)
            return False
        return True

    @staticmethod
    def _in_backward() -> bool:
        return torch._C._current_graph_task_id() != -1


class _Levels:
    """The calls of ``step`` of one optimizer that are running, one in another.

    They are told by their frames: one that is no longer on the stack has ended with an exception. (In what
    torch.compile makes of ``step`` the end is reached in a frame within that of the beginning.)
    """

    def __init__(self, steps: OptimizerSteps, index: int) -> None:
        self.steps = steps
        self.index = index
        self.frames: list[types.FrameType] = []
        self.happened = False  # an optimizer has stepped
        self.begun = False  # the listener has been told

    def enter(self, frame: types.FrameType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of ``step`` begins.

        Args:
            frame: that of the call.
            args, kwargs: its arguments, without the optimizer itself.

        Returns:
            Others to be used in their place, or None.
        """
        self.forget_ended(frame)
        self.frames.append(frame)
        if len(self.frames) > 1:
            return None
        self.happened = self.begun = False
        if args and callable(args[0]):
            self.steps.enter(self.index)
            return (self._then(args[0]), *args[1:]), kwargs
        if callable(kwargs.get("closure")):
            self.steps.enter(self.index)
            return args, {**kwargs, "closure": self._then(kwargs["closure"])}
        self._begin()
        return None

    def forget_ended(self, now: types.FrameType) -> None:
        """Let go of calls that have ended with an exception: their frames hold what was in them."""
        while self.frames and not _runs(self.frames[-1], now):
            self.frames.pop()

    def leave(self, frame: types.FrameType, real: bool) -> None:
        """A call of ``step`` is over; ``real``: of an optimizer, not only of a wrapper around one."""
        self.forget_ended(frame)
        if not self.frames:
            return  # it has begun before this was set up
        self.frames.pop()
        self.happened = self.happened or real
        if not self.frames and self.happened:
            if self.begun:
                self.steps.after(self.index)
            else:
                self.steps.failed(self.index, RuntimeError("a step did not evaluate the closure that it was given"))

    def _begin(self) -> None:
        self.begun = True
        self.steps.before(self.index)

    def _then(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():  # the step calls closures with gradients on
                self.steps.evaluate(self.index)
            loss = closure(*args, **kwargs)
            with torch.no_grad():
                self._begin()
            return loss

        return wrapped


def _runs(frame: types.FrameType, now: types.FrameType | None) -> bool:
    """Whether a frame is one of those that have led to the present one."""
    while now is not None:
        if now is frame:
            return True
        now = now.f_back
    return False


def _caller() -> types.FrameType:
    """The frame of the ``step`` that calls hooks, with or without torch.compile in between."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith((__name__, "torch._dynamo")):
        frame = frame.f_back
    return frame


class _Hook:
    """A step hook: not traced by torch.compile, and without exceptions."""

    def __init__(self, levels: _Levels) -> None:
        self._levels = levels
        self._outside = torch.compiler.disable(self._run)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        try:
            if torch.compiler.is_compiling():
                return self._outside(optimizer, args, kwargs)
            return self._tell(optimizer, args, kwargs)
        except Exception as error:
            self._levels.steps.failed(self._levels.index, error)
            return None

    def _run(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        return self._tell(optimizer, args, kwargs)

    def _tell(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class _Before(_Hook):
    """New arguments for ``step`` if it has a closure; ``args`` begin with the optimizer itself."""

    def _tell(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        changed = self._levels.enter(_caller(), args[1:], kwargs)
        return changed and ((optimizer, *changed[0]), changed[1])


class _After(_Hook):
    def __init__(self, levels: _Levels, real: bool) -> None:
        super().__init__(levels)
        self._real = real

    def _tell(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        self._levels.leave(_caller(), self._real)


class _Override:
    """The ``step`` of one object that has no step hooks, which tells when it begins and ends.

    It is set on the object, as a method, so that learning-rate schedulers can wrap it; a copy of the object, deep or
    pickled, steps as its class says.
    """

    def __init__(self, owner: Any, levels: _Levels, real: bool) -> None:
        if not hasattr(owner, "__dict__"):
            raise TypeError(f"optimizer: expected an object on which step can be set, got {type(owner).__name__}")
        original = owner.step
        own, levels_ref = weakref.ref(owner), weakref.ref(levels)

        @functools.wraps(getattr(original, "__func__", original))
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self is not own():
                return type(self).step(self, *args, **kwargs)
            now = levels_ref() if step.__dict__["watched"] else None
            if now is None:
                return original(*args, **kwargs)
            frame = sys._getframe()
            try:
                args, kwargs = now.enter(frame, args, kwargs) or (args, kwargs)
            except Exception as error:
                now.steps.failed(now.index, error)
            result = original(*args, **kwargs)
            try:
                now.leave(frame, real)
            except Exception as error:
                now.steps.failed(now.index, error)
            return result

        step.__name__ = "step"
        step.__dict__["watched"] = True
        self._owner, self._function = owner, step
        self._before = vars(owner).get("step")
        object.__setattr__(owner, "step", types.MethodType(step, owner))

    def remove(self) -> None:
        self._function.__dict__["watched"] = False
        if getattr(vars(self._owner).get("step"), "__func__", None) is not self._function:
            return  # a scheduler has wrapped it: it stays, without effect
        if self._before is None:
            object.__delattr__(self._owner, "step")
        else:
            object.__setattr__(self._owner, "step", self._before)
