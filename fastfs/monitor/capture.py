"""The hooks: what the watched layers put out in a forward, and the backward vectors that come back to them.

    forward of the model -> Pass (inputs copied, state taken) -> per watched layer: Visit(before)
    backward                                                                     -> Visit.backward
    collect()            -> the passes whose gradients the optimizer step used
    replay(pass)         -> the same forward once more, without gradient: features after, per layer and visit

Until its backward comes a Pass is kept alive by the autograd graph alone (through the tensor hooks on the features), so
forwards that lead nowhere - an evaluation without no_grad, an exception - leave nothing behind. After it, until
:meth:`Capture.clear`.

A pass that cannot be captured, for its inputs or for want of memory, is dropped with a warning: training goes on.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from fastfs.monitor.inputs import UnknownArgumentError, copy_arguments
from fastfs.monitor.layers import Layer
from fastfs.monitor.replay import ForwardState

__all__ = ["Capture", "Pass", "Visit"]


def _inert(*_args: Any, **_kwargs: Any) -> None:
    """What a hook becomes in a copy of the model: a copy is not watched."""


def _make_inert() -> Callable[..., None]:
    return _inert


class _Hook:
    """A hook that neither ``copy.deepcopy`` nor ``pickle`` of the model follows into the monitor."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if not torch.compiler.is_compiling():  # inside a compiled graph there is nothing to capture into
            self.function(*args, **kwargs)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_inert, ()


class Visit:
    """One call of a watched layer: shape and copy of its features, and the backward vector once it has come.

    ``before`` is None if the features were outside the autograd graph (frozen, or under ``no_grad``). If they were
    inside and no gradient ever comes, the backward vector is zero.
    """

    __slots__ = ("backward", "before", "shape")

    def __init__(self, features: Tensor) -> None:
        self.shape = features.shape
        self.before = features.detach().clone() if features.requires_grad else None
        self.backward: Tensor | None = None


class Pass:
    """One forward of the model with gradient: a micro-batch. Empty until inputs and state are set."""

    def __init__(self, layers: int, turn: int) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.state: ForwardState | None = None
        self.turn = turn  # which step it is of
        self.dropped = False  # could not be captured
        self.visits: list[list[Visit]] = [[] for _ in range(layers)]
        self.has_backward = False
        # A parameter and its gradient as they were when the next pass began: same object later, still accumulating.
        self.witness: tuple[Tensor, weakref.ref[Tensor]] | None = None

    def drop(self) -> None:
        """Give up, and give back the memory, also that of copies which the autograd graph keeps alive."""
        self.dropped = True
        self.args, self.kwargs, self.state = (), {}, None
        for visit in (visit for visits in self.visits for visit in visits):
            visit.before = visit.backward = None
        self.visits = []

    def accumulates(self) -> bool:
        """False if the gradient of this pass has been thrown away by ``zero_grad()`` (to None)."""
        if self.witness is None:
            return True
        parameter, gradient = self.witness
        return parameter.grad is not None and parameter.grad is gradient()


class Capture:
    """Owns all hooks on the model. Does nothing while not ``armed``.

    Args:
        model: the module that is called in training.
        layers: the watched modules.
        parameters: those that the optimizer updates.
        warn: called with a kind and a message when a pass cannot be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        parameters: Sequence[Tensor],
        warn: Callable[[str, str], None],
    ) -> None:
        self.armed = False
        self.seconds = 0.0  # host time spent in the hooks since clear()
        self.dropped = 0  # passes that could not be captured since clear()
        self._model = model
        self._layers = tuple(layers)
        self._parameters = tuple(parameters)
        self._warn = warn
        self._passes: list[Pass] = []  # those with a backward
        self._open: Pass | None = None  # the forward that is running
        self._depth = 0
        self._turn = 0
        self._after: list[list[Tensor]] | None = None  # not None: replaying
        self._leaf_handles: list[RemovableHandle] = []
        self._handles = [
            model.register_forward_pre_hook(_Hook(self._enter), prepend=True, with_kwargs=True),
            # always_call: also when the forward raises
            model.register_forward_hook(_Hook(self._leave), always_call=True),
        ]
        for layer in self._layers:
            self._handles.append(layer.module.register_forward_hook(_Hook(self._tap(layer))))

    @property
    def replaying(self) -> bool:
        return self._after is not None

    def close(self) -> None:
        """Remove every hook and forget everything captured."""
        self.armed = False
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forget everything captured: the next forward belongs to the next step."""
        self._passes = []
        self._open = None
        self._depth = 0
        self._turn += 1
        for handle in self._leaf_handles:
            handle.remove()
        self._leaf_handles = []
        self.seconds = 0.0
        self.dropped = 0

    def collect(self) -> list[Pass]:
        """Hand over the passes since the last step that had a backward and whose gradients were not thrown away."""
        passes, self._passes = self._passes, []
        return passes

    def replay(self, passed: Pass) -> list[list[Tensor]]:
        """Features of every layer and visit in a second forward on the same inputs, with the parameters of now."""
        assert passed.state is not None
        self._after = [[] for _ in self._layers]
        try:
            with passed.state.applied():
                self._model(*passed.args, **passed.kwargs)
            return self._after
        finally:
            self._after = None

    # The hooks

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.armed or self.replaying or not torch.is_grad_enabled():
            return
        if self._open is not None:  # the model calls itself
            self._depth += 1
            return
        self._open = passed = Pass(len(self._layers), self._turn)
        with self._timed(), self._or_drop(passed):
            self._forget_thrown_away()
            passed.args, passed.kwargs = copy_arguments((args, kwargs), self._copy)
            passed.state = ForwardState.take(self._model)

    def _copy(self, argument: Tensor) -> Tensor:
        """Of an input, since it may be changed in place; but a parameter is meant as it is after the step."""
        return argument if any(argument is p for p in self._parameters) else argument.detach().clone()

    def _leave(self, *_: Any) -> None:
        if self._open is not None and not self.replaying and torch.is_grad_enabled():
            if self._depth:
                self._depth -= 1
            else:
                self._open = None

    def _tap(self, layer: Layer) -> Callable[..., None]:
        def tap(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if self._after is not None:
                # Copied, like the features before: a following operation may work in place.
                self._after[layer.index].append(_features(layer.name, module, output).detach().clone())
            elif self._open is not None and not self._open.dropped:
                with self._timed():
                    features = _features(layer.name, module, output)  # a TypeError is the user's to see
                    with self._or_drop(self._open):
                        self._visit(self._open, layer.index, features)

        return tap

    def _visit(self, passed: Pass, index: int, features: Tensor) -> None:
        visit = Visit(features)
        passed.visits[index].append(visit)
        if visit.before is None:
            return

        def receive(gradient: Tensor) -> None:
            if passed.dropped or passed.turn != self._turn:  # too late: its step is over
                return
            with self._timed(), self._or_drop(passed):
                if not passed.has_backward:
                    passed.has_backward = True
                    self._passes = [*(p for p in self._passes if p.accumulates()), passed]
                gradient = gradient.detach()
                visit.backward = gradient.clone() if visit.backward is None else visit.backward + gradient

        handle = features.register_hook(receive)
        if features.is_leaf:  # outlives the step, and would keep this pass
            self._leaf_handles.append(handle)

    @contextmanager
    def _or_drop(self, passed: Pass) -> Iterator[None]:
        """What fails inside ends the capture of this pass, not the training run."""
        message: tuple[str, str] | None = None
        try:
            yield
        except UnknownArgumentError as error:
            message = "argument", f"has a forward with {error}: this forward is left out"
        except Exception as error:
            message = (
                "copy",
                f"has a forward that could not be copied and is left out ({type(error).__name__}: {error})",
            )
        if message is not None:  # out of the handler, whose traceback holds tensors
            passed.drop()
            self._passes = [p for p in self._passes if p is not passed]
            self.dropped += 1
            self._warn(*message)

    # Passes whose gradient never reaches a step

    def _forget_thrown_away(self) -> None:
        """Before a new pass: drop earlier ones if ``zero_grad`` came after them; else remember how to tell later.

        That is how a skipped optimizer step differs from gradient accumulation. Only ``set_to_none=True`` (the
        default) leaves a trace that can be read without waiting for the device.
        """
        if not self._passes:
            return
        held = next((p for p in self._parameters if p.grad is not None), None)
        if held is None or held.grad is None:
            self._passes.clear()
            return
        for passed in self._passes:
            if passed.witness is None:
                passed.witness = (held, weakref.ref(held.grad))

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


def _features(name: str, module: nn.Module, output: Any) -> Tensor:
    """The output itself, or the first floating-point tensor in a tuple, list or dict (depth first)."""
    leaves = [output] if isinstance(output, Tensor) else tree_leaves(output)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    found = ", ".join(str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves)
    raise TypeError(
        f"layer {name!r} ({type(module).__name__}): expected an output that is or holds a floating-point tensor, "
        f"got {type(output).__name__} of {found or 'nothing'}"
    )
