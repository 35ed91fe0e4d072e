"""Detects the begin and the end of training steps by hooks on one or several optimizers."""

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
    """Is told what happens around optimizer steps. Optimizers are given by their index."""

    def enter(self, optimizer: int) -> None:
        """Called when a step with a closure begins."""

    def evaluate(self, optimizer: int) -> None:
        """Called before the closure of the step is evaluated. Parameters may have moved since ``enter``."""

    def before(self, optimizer: int, first: bool) -> None:
        """Called right before an optimizer updates parameters, with gradients in place.

        With a closure, called after each evaluation; the last call counts.

        Args:
            optimizer: Index of the optimizer.
            first: Whether it is the first one in this training step.
        """

    def after(self, optimizer: int) -> None:
        """Called right after an optimizer has stepped."""

    def finish(self) -> None:
        """Called at the end of a training step.

        That is when all optimizers have stepped, the next forward begins, or the backward in which they step is over.
        """

    def failed(self, error: Exception) -> None:
        """Called with an exception that a call above has raised. This training step cannot be measured."""


class OptimizerSteps:
    """Combines the steps of optimizers to training steps.

    A training step ends when every optimizer has stepped. If optimizers step inside the backward, from hooks on the
    gradients, it ends with the backward. If an optimizer does not step, it ends with the next forward of the model. If
    ``step`` is given a closure, which computes the gradients, the update begins when the closure returns for the last
    time.

    Nested calls of ``step`` (``super().step()``, a wrapper) are one step, that of the outermost call; the step of a
    wrapper counts only if an optimizer inside has stepped. A step that ends with an exception or an interrupt does not
    count.

    Args:
        optimizers: The optimizers of the training loop.
        listener: Is told about steps.
    """

    def __init__(self, optimizers: Sequence[TrainingOptimizer], listener: StepListener) -> None:
        self._count = len(optimizers)
        self._listener = listener
        self._first: int | None = None  # optimizer that stepped first in the current training step
        self._stepped: set[int] = set()
        self._queued = -1  # number of the backward with which the step will end
        self._handles: list[RemovableHandle] = []
        self._calls = [_StepCalls(self, index) for index in range(len(optimizers))]
        self._patches: list[_PatchedStep] = []
        for found, calls in zip(optimizers, self._calls, strict=True):
            for each in {id(each): each for each in (found.outer, *found.real)}.values():
                real = any(each is one for one in found.real)
                if has_hooks(each):
                    self._handles.append(each.register_step_pre_hook(_Before(calls)))
                    self._handles.append(each.register_step_post_hook(_After(calls, real)))
                else:
                    self._patches.append(_PatchedStep(each, calls, real))

    def close(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        for patch in self._patches:
            patch.remove()
        self._handles.clear()
        self._patches.clear()
        for calls in self._calls:
            calls.frames.clear()

    def forward_begins(self) -> None:
        """Called when the model begins a training forward."""
        if self._in_backward():
            return
        for calls in self._calls:
            calls.forget_ended(sys._getframe())
        if self._stepped:
            self._finish()
        self._first = None  # a step that raised an exception is over, too

    def enter(self, index: int) -> None:
        """Called when a step with a closure begins."""
        self._tell_listener(lambda: self._listener.enter(index))

    def evaluate(self, index: int) -> None:
        """Called before a closure is evaluated."""
        self._tell_listener(lambda: self._listener.evaluate(index))

    def before(self, index: int) -> None:
        """Called right before an optimizer updates parameters."""
        if self._first is None:
            self._first = index
        self._tell_listener(lambda: self._listener.before(index, self._first == index))

    def after(self, index: int) -> None:
        """Called right after an optimizer has stepped; ends the training step if it was the last one."""
        self._tell_listener(lambda: self._listener.after(index))
        self._stepped.add(index)
        if self._in_backward():
            number = torch._C._current_graph_task_id()
            if self._queued != number:
                self._queued = number
                torch.autograd.Variable._execution_engine.queue_callback(self._backward_over)
        elif len(self._stepped) == self._count:
            self._finish()

    def failed(self, index: int, error: Exception) -> None:
        """Called with an exception in a hook. The next forward ends this step at the latest."""
        if not isinstance(error, Warning):  # a warning that a filter turns into an error ends the call of ``step``
            self._stepped.add(index)
        self._listener.failed(error)

    def _backward_over(self) -> None:
        self._queued = -1
        if self._stepped:
            self._finish()

    def _finish(self) -> None:
        self._first = None
        self._stepped.clear()
        if not self._tell_listener(self._listener.finish):
            self._tell_listener(self._listener.finish)  # the first call failed before it began, and the step has to end

    def _tell_listener(self, tell: Callable[[], None]) -> bool:
        """Calls the listener and returns whether that succeeded. It decides itself which exceptions reach the loop."""
        try:
            tell()
        except Exception as error:
            self._listener.failed(error)
            return False
        return True

    @staticmethod
    def _in_backward() -> bool:
        return torch._C._current_graph_task_id() != -1


class _StepCalls:
    """The running calls of ``step`` of one optimizer, the outermost first.

    Calls are identified by their frames. A frame that is no longer on the stack has ended with an exception. (If
    torch.compile has compiled ``step``, its end is reached in a frame inside that of its begin.)

    Args:
        steps: Is told about begin and end of the outermost call.
        index: Index of the optimizer.
    """

    def __init__(self, steps: OptimizerSteps, index: int) -> None:
        self.steps = steps
        self.index = index
        self.frames: list[types.FrameType] = []
        self.happened = False  # an optimizer, and not only a wrapper, has stepped
        self.begun = False  # the listener knows of the step

    def enter(self, frame: types.FrameType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called when a call of ``step`` begins.

        Args:
            frame: Frame of the call.
            args: Its positional arguments, without the optimizer itself.
            kwargs: Its keyword arguments.

        Returns:
            Arguments to use instead, or None.
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
        """Drops calls that have ended with an exception, because their frames keep local variables alive."""
        while self.frames and not _runs(self.frames[-1], now):
            self.frames.pop()

    def leave(self, frame: types.FrameType, real: bool) -> None:
        """Called when a call of ``step`` returns; ``real`` if it is that of an optimizer and not of a wrapper only."""
        self.forget_ended(frame)
        if not self.frames:
            return  # the call began before the hooks were set
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
            with torch.no_grad():  # optimizers evaluate closures with gradients enabled
                self.steps.evaluate(self.index)
            loss = closure(*args, **kwargs)
            with torch.no_grad():
                self._begin()
            return loss

        return wrapped


def _runs(frame: types.FrameType, now: types.FrameType | None) -> bool:
    """Returns whether a frame is on the stack of ``now``."""
    while now is not None:
        if now is frame:
            return True
        now = now.f_back
    return False


def _caller() -> types.FrameType:
    """Returns the frame of the ``step`` that calls hooks, with or without torch.compile in between."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith((__name__, "torch._dynamo")):
        frame = frame.f_back
    return frame


class _Hook:
    """A step hook that torch.compile does not trace and that raises no exception."""

    def __init__(self, calls: _StepCalls) -> None:
        self._calls = calls
        self._outside = torch.compiler.disable(self._run)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        try:
            if torch.compiler.is_compiling():
                return self._outside(optimizer, args, kwargs)
            return self._tell(optimizer, args, kwargs)
        except Exception as error:
            self._calls.steps.failed(self._calls.index, error)
            return None

    def _run(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        return self._tell(optimizer, args, kwargs)

    def _tell(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class _Before(_Hook):
    """The step pre-hook. Returns new arguments if ``step`` has a closure; ``args`` begin with the optimizer itself."""

    def _tell(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        changed = self._calls.enter(_caller(), args[1:], kwargs)
        return changed and ((optimizer, *changed[0]), changed[1])


class _After(_Hook):
    """The step post-hook."""

    def __init__(self, calls: _StepCalls, real: bool) -> None:
        super().__init__(calls)
        self._real = real

    def _tell(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        self._calls.leave(_caller(), self._real)


class _PatchedStep:
    """Replaces ``step`` of an object without step hooks by a method that reports its begin and end.

    The method is set on the object, so that learning-rate schedulers can wrap it. Copies of the object, deep or
    pickled, use the ``step`` of its class.
    """

    def __init__(self, owner: Any, calls: _StepCalls, real: bool) -> None:
        if not hasattr(owner, "__dict__"):
            raise TypeError(f"optimizer: expected an object on which step can be set, got {type(owner).__name__}")
        original = owner.step
        own, calls_ref = weakref.ref(owner), weakref.ref(calls)

        @functools.wraps(getattr(original, "__func__", original))
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self is not own():
                return type(self).step(self, *args, **kwargs)
            now = calls_ref() if step.__dict__["watched"] else None
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
            return  # a scheduler has wrapped the method, which stays without effect
        if self._before is None:
            object.__delattr__(self._owner, "step")
        else:
            object.__setattr__(self._owner, "step", self._before)
