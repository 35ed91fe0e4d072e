"""Taps: hooks on the watched layers that also work inside of graphs that torch.compile has compiled.

Outside of a compiled graph a tap hands the features to the capture directly. Inside, where no Python of ours runs, it
is the op ``fastfs::tap(features, anchor)``, and a second one on the gradient: Dynamo traces both into the graph, whose
calls come back to the capture when the graph runs. The anchor is a small tensor on the CPU whose *content* says to
whom: (key of the capture, layer, direction). So one graph serves every block of a model, and nothing is compiled again
for the next block or the next step. It counts as written to, which keeps the op from being optimised away.

Whether a step is tapped is :attr:`Switch.on`, a Python flag that Dynamo guards on: two cached graphs, and the one for
off is exactly that of the model without a monitor.
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
from fastfs._network.state import own_forward_runs

__all__ = [
    "EVERYTHING",
    "GRADIENTS",
    "OFF",
    "Guarded",
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
"""Levels of a switch: nothing; backward vectors only; features, too."""

FORWARD, BACKWARD = 0, 1

HOOKS_IN_GRAPHS = importlib.util.find_spec("torch._higher_order_ops.register_hook") is not None
"""Whether Dynamo traces hooks on tensors as hooks. Before torch 2.13 it makes views of the tensors, on which a
following operation in place fails, and training with it: there, taps stay out of compiled graphs."""

Select = Callable[[Any], Tensor]
"""Takes a layer's output and gives the features in it."""


class Receiver(Protocol):
    """What taps hand features to."""

    @property
    def replaying(self) -> bool:
        """In a forward of its own."""

    @property
    def dynamo(self) -> DynamoSettings:
        """As it has set them."""

    def visit(self, layer: Layer, features: Tensor) -> None:
        """The features of a layer, in eager execution: still in the autograd graph."""

    def unseen(self, error: Exception) -> None:
        """A layer's output has no features."""

    def failed(self, error: Exception) -> None:
        """Something went wrong in a hook."""

    def compiled_features(self, layer: int, features: Tensor) -> None:
        """The features of a layer, out of a compiled graph."""

    def compiled_gradient(self, layer: int, gradient: Tensor) -> None:
        """The backward vector of a layer, out of a compiled graph."""


class Switch:
    """How much is tapped in the next forward.

    Dynamo guards on ``on`` alone: between the two levels that are on, the receiver decides when the graph runs.
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


# Ops know tensors only: this is how one finds its receiver. Weak, so it keeps no monitor alive.
_RECEIVERS: weakref.WeakValueDictionary[int, Receiver] = weakref.WeakValueDictionary()
_KEYS = itertools.count()


def register(receiver: Receiver) -> int:
    """A key for the anchors of this receiver."""
    key = next(_KEYS)
    _RECEIVERS[key] = receiver
    return key


def receivers() -> list[Receiver]:
    """Those that are attached."""
    return list(_RECEIVERS.values())


def unregister(key: int) -> bool:
    """Graphs with taps find this receiver no longer. Returns whether it was the last one."""
    return _RECEIVERS.pop(key, None) is not None and not _RECEIVERS


def another_replays(receiver: Receiver) -> bool:
    """Whether a forward that is running is one of fastfs that this monitor has not asked for: no training forward."""
    return own_forward_runs() and not receiver.replaying


def _tap(features: Tensor, anchor: Tensor) -> None:
    key, layer, direction = anchor.tolist()
    receiver = _RECEIVERS.get(key)
    if receiver is None:
        return
    try:
        (receiver.compiled_gradient if direction == BACKWARD else receiver.compiled_features)(layer, features)
    except Exception as error:  # not through the compiled graph, which is training's
        receiver.failed(error)


def _tap_fake(features: Tensor, anchor: Tensor) -> None:
    pass


LIBRARY.define("tap(Tensor features, Tensor(a!) anchor) -> ()")
LIBRARY.impl("tap", _tap, "CompositeExplicitAutograd")
LIBRARY.impl("tap", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("fastfs::tap", _tap_fake, lib=LIBRARY)


def inert(*_args: Any, **_kwargs: Any) -> None:
    """What a hook becomes in a copy of the model: a copy is not watched."""


def _make_inert() -> Callable[..., None]:
    return inert


class Hook:
    """A hook that neither ``copy.deepcopy`` nor ``pickle`` of the model follows into the monitor."""

    __slots__ = ()

    def __deepcopy__(self, _memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_inert, ()

    @property
    def __name__(self) -> str:
        """What torch.jit.script asks hooks for first: the error is to say what to do."""
        raise AttributeError(
            "a model that a fastfs.Monitor watches cannot be scripted, since its hooks are no TorchScript: script it "
            "before the monitor is attached or after close()"
        )


Failed = Callable[[Exception], None]
"""Takes an exception that must not reach the training loop."""


class Guarded(Hook):
    """A hook out of which no exception gets: torch would end the training's forward or backward with it.

    It leaves the gradient mode as it was, also after an interrupt.
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
    """The forward hook of one watched layer."""

    def __init__(
        self, layer: Layer, switch: Switch, receiver: Receiver, key: int, select: Select, failed: Failed
    ) -> None:
        self.layer = layer
        self.switch = switch
        self.receiver = receiver
        self.select = select
        self.failed = failed
        self.hidden = False  # the layer has run in a graph where it could not be tapped
        self.forward_anchor = torch.tensor([key, layer.index, FORWARD])
        self.backward_anchor = torch.tensor([key, layer.index, BACKWARD])

    def __call__(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        try:
            if not self.switch.on or _exported():
                return
            compiling = torch.compiler.is_compiling()
            if not compiling and not _recorded():  # a graph that is being recorded would take our operations along
                self.take(module, output)
        except Exception as error:
            self.failed(error)
            return
        if compiling:  # outside of the try block, in which torch.compile cannot break a graph
            self.trace(output)

    def take(self, module: nn.Module, output: Any) -> None:
        """Hand the features over."""
        try:
            features = self.features(module, output)
        except Exception as error:  # of a function of the user's, or an output without any
            self.receiver.unseen(error)
        else:
            self.receiver.visit(self.layer, features)

    def trace(self, output: Any) -> None:
        """Become a part of the graph that torch.compile makes."""
        if not HOOKS_IN_GRAPHS:
            self.hidden = True
            return
        features = self.select(output)
        torch.ops.fastfs.tap(features, self.forward_anchor)
        if features.requires_grad:
            anchor = self.backward_anchor
            features.register_hook(lambda gradient: torch.ops.fastfs.tap(gradient, anchor))

    def features(self, module: nn.Module, output: Any) -> Tensor:
        """Raises TypeError if the output has no features."""
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


class Around(Hook):
    """A hook on the model as a whole.

    In a graph that torch.compile makes around it, it breaks the graph while the monitor looks on, and only then: inputs
    and random states can only be seen from outside.
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
            if not compiling and not _recorded():
                self.function(*args, **kwargs)
        except Exception as error:
            self.failed(error)
            return
        if compiling and self.switch.on:  # outside of the try block, in which torch.compile cannot break a graph
            self.outside(*args, **kwargs)


def _exported() -> bool:
    """Whether torch.export is at work.

    In graphs of torch 2.11, ``torch.compiler.is_exporting()`` is always true; the flag behind it is not.
    """
    return torch.compiler.is_exporting() if HOOKS_IN_GRAPHS else torch.compiler._is_exporting_flag


def _recorded() -> bool:
    """Whether torch.jit.trace, torch.fx or make_fx is recording what runs."""
    return (
        torch._C._get_tracing_state() is not None
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )
