"""Captures the features of the watched layers in the training forward and their gradients in the backward.

    model forward    -> ForwardCapture: copies of the inputs, state; LayerCall: sampled rows of the features
    backward         -> LayerCall.backward: the same rows of the backward vector
    Capture.collect  -> the forwards whose gradients the optimizer step uses

Before its backward, a ForwardCapture is kept alive by the autograd graph alone, through the tensor hooks on the
features. A forward without a backward (an evaluation without ``no_grad``, an exception) therefore leaves nothing
behind. After its backward, it lives until :meth:`Capture.clear`. Two kinds of layer calls have no tensor hook and are
held until then, too: calls inside compiled graphs, and calls under a reentrant checkpoint, whose backward vectors
arrive with the recomputation. The memory budget bounds them.

A forward whose inputs cannot be copied, or that does not fit into the budget, is dropped with a warning.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from fastfs._monitor.capture import taps
from fastfs._monitor.capture.backward_norms import BackwardNorms
from fastfs._monitor.capture.backwards import GradientWatch, TrainingBackwards, current, queue_last, stamps
from fastfs._monitor.capture.compiled_graphs import DynamoSettings, drop_unguarded
from fastfs._monitor.capture.fingerprints import Fingerprint
from fastfs._monitor.capture.forward_capture import ForwardCapture, scalar_outputs
from fastfs._monitor.capture.forwards import (
    ParameterSlot,
    active_calls,
    depends_on,
    runs_on_own,
    sequence_number,
    slots_of,
)
from fastfs._monitor.capture.graph_cache import GraphCache
from fastfs._monitor.capture.listener import CaptureListener
from fastfs._monitor.capture.memory_budget import MemoryBudget
from fastfs._monitor.capture.replay import OwnedState, Replayer
from fastfs._monitor.capture.sampling import RowSampler
from fastfs._monitor.capture.step_capture import StepCapture, reraise, transformed
from fastfs._network.fully_sharded import GraphLeaves
from fastfs._network.input_copies import UnknownArgumentError, copy_arguments
from fastfs._network.layers import Layer
from fastfs._network.placements import version
from fastfs._network.state import ForwardState

__all__ = ["Capture"]


class Capture(StepCapture):
    """Owns the hooks on the model and on its watched layers.

    Args:
        model: The module that the training loop calls.
        layers: The watched layers.
        parameters: The parameters that the optimizers update, by name.
        sampler: Chooses the rows that are kept.
        budget: Bounds the bytes that everything captured takes, features of second forwards included.
        select: Returns the features in a layer's output.
        listener: Is told about forwards, failures and warnings.
        owned: What training owns besides the parameters; second forwards leave it unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        parameters: dict[str, Tensor],
        sampler: RowSampler,
        budget: MemoryBudget,
        select: taps.Select,
        listener: CaptureListener,
        owned: OwnedState,
    ) -> None:
        super().__init__(layers, TrainingBackwards(lambda: self.leaves.now()), sampler, budget, listener)
        self.switch = taps.Switch()
        self.transformed = False  # the model was called inside a torch.func transform since clear()
        self.backwards_seen = 0  # backwards of the model since the monitor was attached, measured or not
        self.rewritten: list[Tensor] = []  # device flags: gradients were changed, not zeroed, between micro-batches
        self.replayer = Replayer(layers, self.switch, sampler, owned)
        self.gradients: GradientWatch | None = None
        self.inputs_count = False  # inputs stand for parameters of the stages before
        self.recover = listener.recover
        self._norms = BackwardNorms(len(layers))
        self._task = -1  # the backward that began last
        self._stamps: list[tuple[int, int] | None] = []  # of the gradients when it began
        self._touched = bytearray(len(parameters))  # parameters that have received a gradient in this step
        self._graphs = GraphCache()
        self._model = model
        self._tensors: list[Tensor] = []
        self._slots: list[ParameterSlot] = []
        self._fingerprint: Fingerprint | None = None  # the last one; the next one reuses its layout
        self._forward_begins, self._training_backward_begins = listener.forward_begins, listener.backward_begins
        self._open: ForwardCapture | None = None  # the forward that is running
        self._depth = 0
        self.set_parameters(parameters)
        self._handles: list[RemovableHandle] = []
        self.dynamo = DynamoSettings(r.dynamo for r in taps.receivers())
        self._key = taps.register(self)
        self._taps: list[taps.Tap] = []
        try:
            self._attach(select, self._key)
            self.drop_unguarded()
        except BaseException:
            self.close()
            raise

    def _attach(self, select: taps.Select, key: int) -> None:
        enter = taps.ModelHook(self._enter, self.switch, self.failed)
        self._handles.append(self._model.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        for layer in self._layers:  # before the hook that ends the forward, since the model may be a layer itself
            tap = taps.Tap(layer, self.switch, self, key, select, self.failed)
            self._handles.append(layer.module.register_forward_hook(tap))
            self._taps.append(tap)
        # always_call: also if the forward raises.
        leave = taps.ModelHook(self._leave, self.switch, self.failed)
        self._handles.append(self._model.register_forward_hook(leave, always_call=True))

    @property
    def replaying(self) -> bool:
        """Whether a forward of the monitor's own is running."""
        return self.replayer.handler is not None

    def hidden(self, layer: int) -> bool:
        """Returns whether a layer runs in a compiled graph of a torch release that does not allow taps there."""
        return self._taps[layer].hidden

    def close(self) -> None:
        """Removes every hook and forgets everything captured."""
        self.replayer.recover()
        self.switch.level = taps.OFF
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if taps.unregister(self._key):
            self.dynamo.release()

    def drop_unguarded(self) -> int:
        """Drops compiled graphs that would run past the taps; returns the number of code objects affected."""
        return drop_unguarded(self._model, [self._model, *(layer.module for layer in self._layers)])

    def clear(self) -> None:
        """Forgets everything captured. The next forward belongs to the next step."""
        self._generation += 1
        for captured in list(self.budget.live):  # a loop that keeps its loss keeps the graph, and with it the capture
            captured.drop()
        self._forwards = []
        self._held = []
        self._open = None
        self._depth = 0
        for handle in self._leaf_handles:
            handle.remove()
        self._leaf_handles = []
        self.forget_gradients()
        self._backwards.clear()
        self._touched = bytearray(len(self._tensors))
        self.rewritten = []
        self.seconds = 0.0
        self.dropped = 0
        self.rowless = self.transformed = False

    def backward_norms(self) -> list[tuple[int, list[tuple[Tensor, float]]]]:
        """Returns per layer the number of elements of its backward vectors and their sampled squared norms.

        Only at level GRADIENTS; see :meth:`BackwardNorms.per_layer`.
        """
        return self._norms.per_layer(self._backwards.counts)

    def forget_gradients(self) -> None:
        """Forgets the norms so far, because their gradients were discarded."""
        self._norms.clear()
        self._touched = bytearray(len(self._tensors))

    def step_key(self, ran: Sequence[bool]) -> tuple[bytes, tuple[bool, ...]]:
        """Returns which parameters have received a gradient in this step, and which layers ran."""
        return bytes(self._touched), tuple(ran)

    def collect(self) -> list[ForwardCapture]:
        """Hands over the forwards of this step that had a backward and whose gradients were not discarded."""
        forwards, self._forwards = self._forwards, []
        counts = self._backwards.counts
        for captured in forwards:
            captured.has_backward = captured.settle(counts)
        forwards = [captured for captured in forwards if captured.has_backward]
        if forwards:
            self.budget.learn(forwards, self.dropped)
        return forwards

    # The hooks on the model

    def _enter(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, traced: bool = False
    ) -> None:
        if not self.replaying or self.replayer.stale():
            self.recover()  # of what an interrupt has left changed, the gradient mode included
        if self.replaying or not torch.is_grad_enabled() or taps.another_replays(self):
            return
        if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func computes gradients of its own
            self.transformed = True
            return
        if self._open is not None:
            if not traced and active_calls(self._model) > 1:  # the model calls itself
                self._depth += 1
                return
            self._open.drop()  # an interrupt ended that forward
            self._open, self._depth = None, 0
        self._forward_begins()
        if self.switch.level == taps.OFF:
            return
        start = time.perf_counter()
        self._forget_discarded()
        self.seconds += time.perf_counter() - start
        self._open = captured = ForwardCapture(len(self._layers), self._generation)
        if self.switch.level != taps.EVERYTHING:
            return
        self.budget.live.add(captured)
        self._or_drop(captured, self._begin, captured, args, kwargs)

    def _begin(self, captured: ForwardCapture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.since = sequence_number()
        captured.other_weights = not runs_on_own(self._slots)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        captured.dependent = depends_on(tensors, self.leaves.now())
        captured.samples = self._sampler.subset_of((args, kwargs))
        # Inputs are copied. Parameters are passed by reference: the second forward has to use their new values.
        own = set(map(id, self._tensors))
        captured.args, captured.kwargs = copy_arguments(
            (args, kwargs), lambda x: x if id(x) in own else self._copy(captured, x)
        )
        captured.inputs_seen = [(x, version(x)) for x in tensors]
        captured.state = ForwardState.take(self._model, self._tensors, self.replayer.inventories)
        self._fingerprint = captured.fingerprint = Fingerprint(self._tensors, self._fingerprint)

    def _leave(self, _module: nn.Module, _args: Any, output: Any, *, traced: bool = False) -> None:
        if self._open is None or self.replaying or not torch.is_grad_enabled() or taps.another_replays(self):
            return
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return
        if self._depth:
            self._depth -= 1
            return
        captured, self._open = self._open, None
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        for index, x in enumerate(outputs):
            if x.requires_grad:
                begins = functools.partial(self._backward_begins, weakref.ref(captured), index, self._generation)
                self._hook(x, taps.Guarded(begins, self.failed))
        if self.switch.level != taps.EVERYTHING or captured.dropped:
            return
        captured.scalars = scalar_outputs(outputs)
        self._or_drop(captured, self._end, captured, outputs, traced)

    def _end(self, captured: ForwardCapture, outputs: list[Tensor], traced: bool) -> None:
        if traced and captured.state is not None and captured.state.randomness.moved():
            raise UnknownArgumentError(
                "random numbers in a graph that torch.compile made around the model after the monitor was "
                "attached. They cannot be drawn again from outside: attach it to the compiled model instead"
            )
        assert captured.fingerprint is not None
        captured.writes_inputs = any(version(x) != before for x, before in captured.inputs_seen)
        captured.writes_parameters = list(map(version, self._tensors)) != captured.fingerprint.versions
        inputs, captured.inputs_seen = [x for x, _ in captured.inputs_seen], []
        edges, captured.edges = captured.edges, []
        seen = all(len(own) == len(calls) for own, calls in zip(edges, captured.calls, strict=True))  # none compiled
        if seen and any(edge is not None for calls in edges for edge in calls):
            leaves = [x for x in inputs if self.inputs_count and x.requires_grad and x.is_leaf]
            captured.leaves, tensors = len(leaves), [*self.leaves.now(), *leaves]
            captured.signature, graph = self._graphs.find(edges, outputs, tensors, captured.since, inputs)
            captured.trace = graph.trace
            captured.dependent = captured.dependent or graph.older

    def set_parameters(self, parameters: dict[str, Tensor]) -> None:
        """Sets the parameters that the optimizers update, and forgets graphs that were traced for others."""
        self._parameters = parameters
        self._tensors = list(parameters.values())
        self.leaves = GraphLeaves(self._model, self._tensors)
        self._slots = slots_of(self._model, self.leaves.ungathered)
        self._graphs.clear()
        self._touched = bytearray(len(self._tensors))
        self.replayer.parameters = self._tensors

    # Called by the taps

    def features(self, layer: Layer, features: Tensor) -> None:
        if self.replayer.handler is not None:
            self.replayer.handler(layer, features)
        elif taps.another_replays(self):
            return
        elif self.switch.level == taps.GRADIENTS:
            if features.requires_grad and not transformed(features):
                generation = self._generation
                call = self._norms.next_call()
                hook = taps.Guarded(lambda grad: self._add_norm(layer.index, grad, generation, call), self.failed)
                self._hook(features, hook)
        elif self._open is None:
            self._recomputed(layer, features)
        elif not self._open.dropped:
            self._or_drop(self._open, self._record_call, self._open, layer.index, features)

    def no_features(self, error: Exception) -> None:
        if self._open is not None and not self._open.dropped and self.switch.level == taps.EVERYTHING:
            self._or_drop(self._open, reraise, error)

    def compiled_features(self, layer: int, features: Tensor) -> None:
        if self.replayer.handler is not None:
            self.replayer.handler(self._layers[layer], features)
        elif self._open is not None and not self._open.dropped and self.switch.level == taps.EVERYTHING:
            self._or_drop(self._open, self._record_compiled_call, self._open, layer, features)

    def compiled_gradient(self, layer: int, gradient: Tensor) -> None:
        if self.switch.level == taps.GRADIENTS:
            self._add_norm(layer, gradient, self._generation, self._norms.next_call())
        else:
            self._compiled_arrival(layer, gradient)

    # In the backward

    def _backward_begins(
        self, captured: weakref.ref[ForwardCapture], output: int, generation: int, gradient: Tensor
    ) -> None:
        """Called when a gradient arrives at an output of the model, before any arrives at its parameters."""
        if generation != self._generation or current() == -1:
            return
        seen = captured()
        number = self._backwards.note()
        if seen is not None:
            seen.reach(number, output, gradient)
        if self._task == number or not self._backwards.counts(number):
            return
        self._task = number
        self.backwards_seen += 1
        self._drop_discarded()
        self._training_backward_begins()
        self._stamps = stamps(self._tensors)
        queue_last(functools.partial(self._backward_over, generation), self.failed)
        if self.gradients is not None:
            self.gradients.note()

    def _backward_over(self, generation: int) -> None:
        if generation != self._generation:
            return
        for index, (before, now) in enumerate(zip(self._stamps, stamps(self._tensors), strict=True)):
            if before != now:
                self._touched[index] = 1

    def _add_norm(self, layer: int, gradient: Tensor, generation: int, call: int) -> None:
        if generation != self._generation:
            return
        start = time.perf_counter()
        try:
            self._norms.take(layer, call, self._backwards.note(), gradient, self._sampler)
        except Exception as error:  # costs the layer its prediction, and nothing else
            self._norms.lose(layer)
            name = self._layers[layer].name
            self._warn("square", f"has no norm of the backward vector of {name!r} ({type(error).__name__}: {error})")
        self.seconds += time.perf_counter() - start

    # Forwards whose gradient reaches no optimizer step

    def _forget_discarded(self) -> None:
        """Before a new forward, drops earlier ones whose gradients ``zero_grad`` has discarded.

        Only this tells a skipped optimizer step from accumulation. The others get a witness that tells it later.
        """
        self._drop_discarded()
        held = next((p for p in self._tensors if p.grad is not None), None)
        if held is None or held.grad is None:
            if self._forwards and not self.leaves.unreduced:
                self._forget_trained()
            return
        for captured in self._forwards:
            if captured.witness is None and self._backwards.trained(captured.backwards):
                captured.witness = (held, weakref.ref(held.grad))

    def _forget_trained(self) -> None:
        """Drops all forwards but those that only ``torch.autograd.grad`` has gone through, which await a backward."""
        self._forwards = [p for p in self._forwards if not self._backwards.trained(p.backwards)]

    def _drop_discarded(self) -> None:
        """Drops the forwards before a write to the gradients.

        Between micro-batches, gradients may only be set to zero, which is checked on the device without waiting for it.
        """
        if self.gradients is None or not (self._forwards or self._norms or any(self._touched)):
            return
        if self.gradients.written_since_backward():
            self._forget_trained()
            self.forget_gradients()
            self.rewritten.append(self.gradients.nonzero())
