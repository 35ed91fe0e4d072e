"""Taps: forward hooks on the watched layers that also work inside graphs of torch.compile.

Outside of a compiled graph, a tap passes the features to its receiver directly. Inside, where no Python runs, the tap
is the op ``fastfs::tap_both``, which AOTAutograd traces together with ``fastfs::tap`` on the gradient; they call the
receiver when the graph runs. (If Dynamo saw the hook on the gradient, it would restore its side effects behind it, and
torch 2.13 then loses attributes that the forward sets later.) The anchor is a small tensor on the CPU whose *values*
name the receiver: (key of the receiver, layer, direction). One graph therefore serves every block of a model, and no
block or step causes a recompilation. The ops are declared to mutate the anchor, so that they are not eliminated as dead
code.

Whether a step is tapped is :attr:`Switch.on`, a Python flag that Dynamo guards on. Two graphs are cached, and the one
for off is exactly the graph of the model without a monitor.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.fx
from torch import Tensor, nn

from fastfs._core.ops import LIBRARY
from fastfs._monitor.capture.compiled_graphs import DynamoSettings
from fastfs._network.feature_tensors import first_floating, kinds
from fastfs._network.layers import Layer
from fastfs._network.placements import is_distributed
from fastfs._network.state import own_forward_runs

__all__ = [
    "EVERYTHING",
    "GRADIENTS",
    "OFF",
    "Guarded",
    "Hook",
    "ModelHook",
    "Receiver",
    "Select",
    "Switch",
    "Tap",
    "another_replays",
    "inert",
    "receivers",
    "register",
    "unregister",
]

OFF, GRADIENTS, EVERYTHING = 0, 1, 2
"""Levels of a switch: nothing; norms of backward vectors; features and backward vectors."""

FORWARD, BACKWARD = 0, 1

HOOKS_IN_GRAPHS = importlib.util.find_spec("torch._higher_order_ops.register_hook") is not None
"""Whether Dynamo traces tensor hooks as hooks. Before torch 2.13 it creates views of the tensors, on which a later
in-place operation fails. With such releases, taps stay out of compiled graphs."""

Select = Callable[[Any], Tensor]
"""Returns the features in a layer's output."""


class Receiver(Protocol):
    """Takes what taps see."""

    @property
    def replaying(self) -> bool:
        """Whether the receiver runs a forward of its own."""

    @property
    def dynamo(self) -> DynamoSettings:
        """Dynamo's settings as the receiver has changed them."""

    def features(self, layer: Layer, features: Tensor) -> None:
        """Takes the features of a layer in eager execution, attached to the autograd graph."""

    def no_features(self, error: Exception) -> None:
        """Called if a layer's output has no features; ``error`` says why."""

    def failed(self, error: Exception) -> None:
        """Called with an exception in a hook."""

    def compiled_features(self, layer: int, features: Tensor) -> None:
        """Takes the features of a layer from a compiled graph."""

    def compiled_gradient(self, layer: int, gradient: Tensor) -> None:
        """Takes the backward vector of a layer from a compiled graph."""


class Switch:
    """Holds what the taps capture in the next forward.

    Dynamo guards on ``on`` alone. The receiver distinguishes the other two levels when the graph runs.

    Attributes:
        on: Whether anything is captured.
        level: ``OFF``, ``GRADIENTS`` or ``EVERYTHING``.
    """

    def __init__(self) -> None:
        self.on = False
        self._level = OFF

    @property
    def level(self) -> int:
        return self._level

    @level.setter
    def level(self, level: int) -> None:
        self._level = level
        self.on = level != OFF


# Ops take tensors only and look their receiver up here. The table is weak, so that it keeps no monitor alive.
_RECEIVERS: weakref.WeakValueDictionary[int, Receiver] = weakref.WeakValueDictionary()
_KEYS = itertools.count()


def register(receiver: Receiver) -> int:
    """Registers a receiver and returns the key for its anchors."""
    key = next(_KEYS)
    _RECEIVERS[key] = receiver
    return key


def receivers() -> list[Receiver]:
    """Returns the registered receivers."""
    return list(_RECEIVERS.values())


def unregister(key: int) -> bool:
    """Removes a receiver; returns whether it was the last one."""
    return _RECEIVERS.pop(key, None) is not None and not _RECEIVERS


def another_replays(receiver: Receiver) -> bool:
    """Returns whether the running forward is a second forward that this receiver has not asked for."""
    return own_forward_runs() and not receiver.replaying


def _tap(features: Tensor, anchor: Tensor) -> None:
    key, layer, direction = anchor.tolist()
    receiver = _RECEIVERS.get(key)
    if receiver is None:
        return
    try:
        (receiver.compiled_gradient if direction == BACKWARD else receiver.compiled_features)(layer, features)
    except Exception as error:  # must not reach the compiled graph, which belongs to training
        receiver.failed(error)


def _tap_fake(features: Tensor, anchor: Tensor) -> None:
    pass


def _tap_both(features: Tensor, anchor: Tensor, _gradient_anchor: Tensor) -> None:
    _tap(features, anchor)


def _tap_both_with_autograd(features: Tensor, anchor: Tensor, gradient_anchor: Tensor) -> None:
    """Also taps the gradient. AOTAutograd calls this while it traces forward and backward."""
    if features.requires_grad:
        features.register_hook(functools.partial(_tap_gradient, gradient_anchor))
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.fastfs.tap_both(features, anchor, gradient_anchor)


def _tap_gradient(anchor: Tensor, gradient: Tensor) -> None:
    torch.ops.fastfs.tap(gradient, anchor)


def _tap_both_fake(features: Tensor, anchor: Tensor, gradient_anchor: Tensor) -> None:
    pass


LIBRARY.define("tap(Tensor features, Tensor(a!) anchor) -> ()")
LIBRARY.impl("tap", _tap, "CompositeExplicitAutograd")
LIBRARY.impl("tap", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("fastfs::tap", _tap_fake, lib=LIBRARY)
LIBRARY.define("tap_both(Tensor features, Tensor(a!) anchor, Tensor gradient_anchor) -> ()")
LIBRARY.impl("tap_both", _tap_both, "CompositeExplicitAutograd")
LIBRARY.impl("tap_both", _tap_both_with_autograd, "Autograd")
torch.library.register_fake("fastfs::tap_both", _tap_both_fake, lib=LIBRARY)


def inert(*_args: Any, **_kwargs: Any) -> None:
    """Replaces a hook in copies of the model, which are not watched."""


def _make_inert() -> Callable[..., None]:
    return inert


class Hook:
    """A hook that copies and pickles of the model replace by :func:`inert`, without following its references."""

    __slots__ = ()

    def __deepcopy__(self, _memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_inert, ()

    @property
    def __name__(self) -> str:
        """Raises an error that says what to do: torch.jit.script asks hooks for their name first."""
        raise AttributeError(
            "a model that a fastfs.Monitor watches cannot be scripted, since its hooks are no TorchScript: script it "
            "before the monitor is attached or after close()"
        )


Failed = Callable[[Exception], None]
"""Takes an exception that must not reach the training loop."""


class Guarded(Hook):
    """A hook that raises no exception, which would end the training's forward or backward.

    The gradient mode is restored, also after an interrupt.

    Args:
        function: Called with the hook's arguments.
        failed: Called with an exception that ``function`` raises.
    """

    def __init__(self, function: Callable[..., None], failed: Failed) -> None:
        self.function = function
        self.failed = failed

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        grad = torch.is_grad_enabled()
        try:
            self.function(*args, **kwargs)
        except Exception as error:
            self.failed(error)
        finally:
            torch._C._set_grad_enabled(grad)


class Tap(Hook):
    """The forward hook of one watched layer.

    Args:
        layer: The watched layer.
        switch: Whether anything is captured.
        receiver: Takes features and gradients.
        key: The receiver's key.
        select: Returns the features in the layer's output.
        failed: Called with an exception in the hook.

    Attributes:
        hidden: Whether the layer has run in a compiled graph without a tap.
    """

    def __init__(
        self, layer: Layer, switch: Switch, receiver: Receiver, key: int, select: Select, failed: Failed
    ) -> None:
        self.layer = layer
        self.switch = switch
        self.receiver = receiver
        self.select = select
        self.failed = failed
        self.hidden = False
        self.forward_anchor = torch.tensor([key, layer.index, FORWARD])
        self.backward_anchor = torch.tensor([key, layer.index, BACKWARD])

    def __call__(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        try:
            if not self.switch.on or _exported():
                return
            compiling = torch.compiler.is_compiling()
            if not compiling and not _recording():  # else the operations would become part of the recorded graph
                self.take(module, output)
        except Exception as error:
            self.failed(error)
            return
        if compiling:  # outside of the try block, inside which torch.compile cannot break a graph
            self.trace(output)

    def take(self, module: nn.Module, output: Any) -> None:
        """Passes the features in an output to the receiver."""
        try:
            features = self.features(module, output)
        except Exception as error:  # select= failed, or the output has no features
            self.receiver.no_features(error)
        else:
            self.receiver.features(self.layer, features)

    def trace(self, output: Any) -> None:
        """Adds the tap ops to the graph that torch.compile is tracing."""
        if not HOOKS_IN_GRAPHS:
            self.hidden = True
            return
        features = self.select(output)
        if is_distributed(features):  # DTensors dispatch only operations of torch
            self.hidden = True
            return
        torch.ops.fastfs.tap_both(features, self.forward_anchor, self.backward_anchor)

    def features(self, module: nn.Module, output: Any) -> Tensor:
        """Returns the features in an output.

        Raises:
            TypeError: The output has no features.
        """
        found = self.select(output)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            what = f"{found.dtype} tensor" if isinstance(found, Tensor) else type(found).__name__
            leaves = ", ".join(kinds(output)) or "nothing"
            raise TypeError(
                f"layer {self.layer.name!r} ({type(module).__name__}): expected an output that is or holds a "
                f"floating-point tensor, got {type(output).__name__} of {leaves}"
                + ("" if self.select is first_floating else f"; select= gave a {what}")
            )
        return found


class ModelHook(Hook):
    """A forward hook or forward pre-hook on the model as a whole.

    Inside a graph that torch.compile traces around the model, it breaks the graph while something is captured, and only
    then: inputs and random states are visible outside of the graph alone.

    Args:
        function: Called with the hook's arguments, and with ``traced=True`` from inside a graph.
        switch: Whether anything is captured.
        failed: Called with an exception in the hook.
    """

    def __init__(self, function: Callable[..., None], switch: Switch, failed: Failed) -> None:
        self.function = Guarded(function, failed)
        self.failed = failed
        self.switch = switch
        self.outside = torch.compiler.disable(
            functools.partial(self.function, traced=True),
            reason="a fastfs.Monitor was attached to this model before torch.compile(model, fullgraph=True), and the "
            "model's inputs cannot be seen from inside of the graph: attach it to the compiled model instead",
        )

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        try:
            if _exported():
                return
            compiling = torch.compiler.is_compiling()
            if not compiling and not _recording():
                self.function(*args, **kwargs)
        except Exception as error:
            self.failed(error)
            return
        if compiling and self.switch.on:  # outside of the try block, inside which torch.compile cannot break a graph
            self.outside(*args, **kwargs)


def _exported() -> bool:
    """Returns whether torch.export is running.

    Inside graphs of torch 2.11, ``torch.compiler.is_exporting()`` always returns True; the flag behind it is right.
    """
    return torch.compiler.is_exporting() if HOOKS_IN_GRAPHS else torch.compiler._is_exporting_flag


def _recording() -> bool:
    """Returns whether torch.jit.trace, torch.fx or make_fx is recording a graph."""
    return (
        torch._C._get_tracing_state() is not None
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )
