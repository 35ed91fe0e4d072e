"""What is kept of the forwards of a measured step: inputs, state, rows of features and of backward vectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastfs._monitor.capture import taps
from fastfs._monitor.capture.backwards import TrainingBackwards, current
from fastfs._monitor.capture.forward_capture import ForwardCapture, LayerCall
from fastfs._monitor.capture.listener import CaptureListener
from fastfs._monitor.capture.memory_budget import MemoryBudget
from fastfs._monitor.capture.recomputation import Recomputation, contexts
from fastfs._monitor.capture.row_keeper import RowKeeper
from fastfs._monitor.capture.sampling import KeptRows, RowSampler, row_dims
from fastfs._network.autograd_graph import edge_of
from fastfs._network.feature_tensors import strided
from fastfs._network.input_copies import UnknownArgumentError, tensors_in
from fastfs._network.layers import Layer
from fastfs._network.placements import is_distributed, is_partial, placed, placements_of, spread
from fastfs._record.row_reasons import NO_GRAPH, NO_ROOM, NO_SAMPLES, PARTIAL, TRANSFORMED

__all__ = ["StepCapture", "reraise", "transformed"]


class StepCapture:
    """Records forwards and layer calls within the memory budget, and drops a forward that cannot be recorded.

    Args:
        layers: The watched layers.
        backwards: Tells training backwards from others.
        sampler: Chooses the rows that are kept.
        budget: Bounds the bytes that everything captured takes.
        listener: Receives warnings, and exceptions raised in hooks.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        backwards: TrainingBackwards,
        sampler: RowSampler,
        budget: MemoryBudget,
        listener: CaptureListener,
    ) -> None:
        self.budget = budget
        self.keeper = RowKeeper(len(layers), sampler, budget, listener.warn)
        self.failed = listener.failed
        self.seconds = 0.0  # host time spent in the hooks since clear()
        self.dropped = 0  # forwards that could not be captured since clear()
        self.rowless = False  # a layer call had no rows that could be kept, since clear()
        self._layers = tuple(layers)
        self._backwards = backwards
        self._sampler = sampler
        self._warn = listener.warn
        self._forwards: list[ForwardCapture] = []  # those with a backward
        self._held: list[ForwardCapture] = []  # those that no tensor hook of the monitor keeps alive
        self._generation = 0
        self._leaf_handles: list[RemovableHandle] = []

    @property
    def waiting(self) -> list[ForwardCapture]:
        """The forwards of the current step that have had a backward of training so far."""
        counts = self._backwards.counts
        return [captured for captured in self._forwards if any(map(counts, captured.backwards))]

    def _copy(self, captured: ForwardCapture, argument: Tensor) -> Tensor:
        """Copies an input, which may be modified in place after the forward, or the chosen samples of it."""
        samples, size = captured.samples, nbytes(argument)
        if samples is not None and is_distributed(argument):
            raise UnknownArgumentError("a DTensor, of which samples= cannot take samples without communication")
        if samples is not None and not samples.splits(argument):
            samples = None
        if samples is not None:
            size = size // samples.batch * samples.kept
        self.budget.take(captured, size, "a copy of the model's inputs")
        captured.inputs += size
        copy = argument.detach()
        if samples is None:
            copy = copy.clone()
        else:
            copy = copy.index_select(0, self._sampler.samples_of(samples, argument.device))
        return copy.requires_grad_() if argument.requires_grad and copy.is_leaf else copy

    def _record_call(self, captured: ForwardCapture, index: int, features: Tensor) -> None:
        if transformed(features):
            captured.calls[index].append(LayerCall(features.shape, None, False, TRANSFORMED))
            captured.edges[index].append(None)
            return
        inside = features.requires_grad
        hidden = not inside and not torch.is_grad_enabled()  # a recomputation may compute its gradient
        kept, absent = self._keep(captured, index, features) if inside or hidden else (None, NO_GRAPH)
        where = placed(features, row_dims(features), lambda: tensors_in((captured.args, captured.kwargs)))
        call = LayerCall(features.shape, kept, inside, absent, where, placements_of(features))
        captured.calls[index].append(call)
        captured.edges[index].append(edge_of(features))
        if hidden:
            call.contexts = contexts()
            self._hold(captured)
        elif kept is not None:
            self._hook(features, BackwardHook(self, captured, call))

    def _record_compiled_call(self, captured: ForwardCapture, index: int, features: Tensor) -> None:
        kept, absent = self._keep(captured, index, features)
        captured.calls[index].append(LayerCall(features.shape, kept, False, absent))
        self._hold(captured)

    def _keep(self, captured: ForwardCapture, index: int, features: Tensor) -> tuple[KeptRows | None, int]:
        """Copies rows of a layer call; returns them, or None and the reason."""
        samples = captured.samples
        if is_partial(features):
            return None, PARTIAL
        if samples is not None and spread(features) not in (None, "replicate"):
            return None, NO_SAMPLES
        if samples is not None and samples.shape(features.shape) is None:
            self.rowless = True
            self._warn(
                "samples",
                f"layer {self._layers[index].name!r} has features of shape {tuple(features.shape)}, whose first "
                f"dimension does not count the {samples.batch} samples of the batch, as samples= needs: it gets a row "
                "of nulls",
            )
            return None, NO_SAMPLES
        kept = self.keeper.keep(captured, features)
        self.rowless = self.rowless or kept is None
        return kept, 0 if kept is not None else NO_ROOM

    def _recomputed(self, layer: Layer, features: Tensor) -> None:
        """Handles a layer call outside of a model forward: a reentrant checkpoint's recomputation, or none of ours."""
        if not self._held or current() == -1:
            return
        now = Recomputation(self._held, layer.index, features.shape)
        if not now.brings_gradients:
            return
        if not features.requires_grad:
            now.goes_deeper()
        elif (found := now.counterpart()) is None:
            now.refuse()
        else:
            captured, call = found
            call.inside = True
            self._hook(features, BackwardHook(self, captured, call))

    def _compiled_arrival(self, layer: int, gradient: Tensor) -> None:
        """Assigns a backward vector out of a compiled graph to a call. Backwards run in reverse order of forwards."""
        for captured in reversed(self._held):
            for call in reversed([] if captured.dropped else captured.calls[layer]):
                if current() not in call.parts and call.before is not None and call.shape == gradient.shape:
                    self.receive(captured, call, gradient)
                    return

    def receive(self, captured: ForwardCapture, call: LayerCall, gradient: Tensor) -> None:
        """Takes the backward vector of a layer call, unless the step of the call is over."""
        if not captured.dropped and captured.generation == self._generation and call.before is not None:
            self._or_drop(captured, self._receive, captured, call, call.before, gradient)

    def _receive(self, captured: ForwardCapture, call: LayerCall, before: KeptRows, gradient: Tensor) -> None:
        if not captured.has_backward:
            captured.has_backward = True
            self._forwards = [*(p for p in self._forwards if p.accumulates()), captured]
        if placements_of(gradient) != call.placements:
            call.refuse(PARTIAL)
            return
        if call.parts:  # the budget has accounted for one backward vector only
            self.budget.take(captured, before.values.nbytes, "another backward vector")
        rows = self._sampler.keep(strided(gradient), before.choice).values
        number = self._backwards.note()
        captured.backwards.add(number)
        call.arrive(number, rows)

    def _hook(self, features: Tensor, hook: Callable[[Tensor], None]) -> None:
        handle = features.register_hook(hook)
        if features.is_leaf:  # a leaf outlives the step, and its hook would keep the capture alive
            self._leaf_handles.append(handle)

    def _hold(self, captured: ForwardCapture) -> None:
        if not self._held or self._held[-1] is not captured:
            self._held.append(captured)

    def _or_drop(self, captured: ForwardCapture, function: Callable[..., None], *args: Any) -> None:
        """Calls a function; an exception in it drops this capture and does not reach the training loop."""
        start = time.perf_counter()
        message: tuple[str, str] | None = None
        try:
            function(*args)
        except Exception as error:
            message = _message(error)
        if message is not None:  # outside of the handler, whose traceback references tensors
            self._drop(captured, message)
        self.seconds += time.perf_counter() - start

    def _drop(self, captured: ForwardCapture, message: tuple[str, str]) -> None:
        captured.drop()
        self._forwards = [p for p in self._forwards if p is not captured]
        self.dropped += 1
        self._warn(*message)


class BackwardHook(taps.Hook):
    """A tensor hook on features that hands their gradient to the layer call. It raises no exception."""

    __slots__ = ("call", "captured", "owner")

    def __init__(self, owner: StepCapture, captured: ForwardCapture, call: LayerCall) -> None:
        self.owner = owner
        self.captured = captured
        self.call = call

    def __call__(self, gradient: Tensor) -> None:
        try:
            self.owner.receive(self.captured, self.call, gradient)
        except Exception as error:
            self.owner.failed(error)


def nbytes(x: Tensor) -> int:
    """Returns the bytes that a tensor's values take."""
    values = strided(x)
    return values.numel() * values.element_size()


def transformed(features: Tensor) -> bool:
    """Returns whether the tensor is a wrapper of ``torch.func.vmap`` or another transform."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(features))


def _message(error: Exception) -> tuple[str, str]:
    if isinstance(error, UnknownArgumentError):
        return "argument", f"has a forward with {error}: this forward is left out"
    return "copy", f"has a forward that could not be copied and is left out ({type(error).__name__}: {error})"


def reraise(error: Exception) -> None:
    """Raises an exception that was caught elsewhere."""
    raise error
