"""What the watched layers put out in a forward, and the backward vectors that come back to them.

    forward of the model -> Pass (inputs copied, state taken) -> per watched layer: Visit (rows of the features kept)
    backward                                                  -> Visit.backward (the same rows)
    collect()            -> the passes whose gradients the optimizer step used
    replayer             -> the same forward once more, without gradient: features after, per layer and visit

Until its backward comes a Pass is kept alive by the autograd graph alone (through the tensor hooks on the features), so
forwards that lead nowhere - an evaluation without no_grad, an exception - leave nothing behind. After it, until
:meth:`Capture.clear`. Two kinds have no tensor hook of ours yet and are held until then: visits inside of compiled
graphs, and of blocks under a reentrant checkpoint, whose backward vectors come with the recomputation. The memory
budget bounds them.

A pass that cannot be captured, for its inputs or for want of memory, is dropped with a warning: training goes on.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from fastfs._monitor.capture import taps
from fastfs._monitor.capture.backward_norms import Squares
from fastfs._monitor.capture.backwards import Backwards, GradientWatch, current, stamps
from fastfs._monitor.capture.compiled_graphs import DynamoSettings, drop_unguarded
from fastfs._monitor.capture.fingerprints import Fingerprint
from fastfs._monitor.capture.forwards import Place, calls_under_way, depends_on, places_of, runs_on_own, sequence_number
from fastfs._monitor.capture.known_graphs import Traces
from fastfs._monitor.capture.memory_budget import Budget
from fastfs._monitor.capture.passes import Pass
from fastfs._monitor.capture.replay import Replayer
from fastfs._monitor.capture.sampling import Sampler
from fastfs._monitor.capture.step_capture import Keeping, throw, transformed
from fastfs._network.feature_tensors import strided
from fastfs._network.input_copies import UnknownArgumentError, copy_arguments
from fastfs._network.layers import Layer
from fastfs._network.state import ForwardState

__all__ = ["Capture"]

_SQUARED = 256  # rows that the norm of a backward vector is taken of, where it is for a prediction only


class Capture(Keeping):
    """Owns the hooks on the model and its watched layers.

    Args:
        model: the module that is called in training.
        layers: the watched modules.
        parameters: those that the optimizer updates, and their names.
        sampler: which rows are kept.
        budget: bytes that everything captured may take; features of forwards of the monitor's own included.
        select: the features in a layer's output.
        warn: called with a kind and a message when something cannot be captured.
        begins: called when the model begins a forward with gradient, captured or not.
        failed: called with an exception in a hook; it does not reach the training loop.
        owned: gives the tensors that training owns besides parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        parameters: dict[str, Tensor],
        sampler: Sampler,
        budget: Budget,
        select: taps.Select,
        warn: Callable[[str, str], None],
        begins: Callable[[], None],
        failed: Callable[[Exception], None],
        owned: Callable[[], Iterable[Tensor]],
    ) -> None:
        super().__init__(layers, Backwards(list(parameters.values())), sampler, budget, warn, failed)
        self.switch = taps.Switch()
        self.transformed = False  # the model was called inside of a torch.func transform since clear()
        self.seen = 0  # backwards of the model since it was attached, whether measured or not
        self.rewritten: list[Tensor] = []  # device flags: gradients were not zeroed but changed between micro-batches
        self.replayer = Replayer(layers, self.switch, sampler, owned)
        self.gradients: GradientWatch | None = None
        self.recover: Callable[[], None] = self.replayer.recover  # called before each forward of the loop's
        self._squares = Squares(len(layers))
        self._task = -1  # the backward that has begun last
        self._stamps: list[tuple[int, int] | None] = []  # of the gradients when it began
        self._touched = bytearray(len(parameters))  # parameters that a backward has brought a gradient to
        self._traces = Traces()
        self._model = model
        self._parameters: dict[str, Tensor] = {}
        self._tensors: list[Tensor] = []
        self._places: list[Place] = []
        self._fingerprint: Fingerprint | None = None  # the last one: the next is taken in the same way
        self._begins = begins
        self._open: Pass | None = None  # the forward that is running
        self._depth = 0
        self.parameters_are(parameters)
        self._handles: list[RemovableHandle] = []
        others = [r.dynamo for r in taps.receivers()]
        self.dynamo = DynamoSettings(others)
        self._key = taps.register(self)
        self._taps: list[taps.Tap] = []
        try:
            self._attach(select, self._key)
            self.drop_unguarded()
        except BaseException:
            self.close()
            raise

    def _attach(self, select: taps.Select, key: int) -> None:
        enter = taps.Around(self._enter, self.switch, self.failed)
        self._handles.append(self._model.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        for layer in self._layers:  # before the hook that ends the forward: the model itself may be a layer
            tap = taps.Tap(layer, self.switch, self, key, select, self.failed)
            self._handles.append(layer.module.register_forward_hook(tap))
            self._taps.append(tap)
        # always_call: also when the forward raises
        leave = taps.Around(self._leave, self.switch, self.failed)
        self._handles.append(self._model.register_forward_hook(leave, always_call=True))

    @property
    def replaying(self) -> bool:
        return self.replayer.sink is not None

    def hidden(self, layer: int) -> bool:
        """Whether a layer runs in compiled graphs of a torch release in which it cannot be tapped."""
        return self._taps[layer].hidden

    def close(self) -> None:
        """Remove every hook and forget everything captured."""
        self.replayer.recover()
        self.switch.level = taps.OFF
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if taps.unregister(self._key):
            self.dynamo.release()

    def drop_unguarded(self) -> int:
        """Drop compiled graphs that would run past the taps; of how many code objects."""
        return drop_unguarded(self._model, [self._model, *(layer.module for layer in self._layers)])

    def clear(self) -> None:
        """Forget everything captured: the next forward belongs to the next step."""
        self._turn += 1
        for passed in list(self.budget.live):  # a loop that keeps its last loss keeps the graph, which holds the pass
            passed.drop()
        self._passes = []
        self._held = []
        self._open = None
        self._depth = 0
        for handle in self._leaf_handles:
            handle.remove()
        self._leaf_handles = []
        self.forget_squares()
        self._backwards.clear()
        self._touched = bytearray(len(self._tensors))
        self.rewritten = []
        self.seconds = 0.0
        self.dropped = 0
        self.transformed = False

    def squares(self) -> list[tuple[int, list[tuple[Tensor, float]]]]:
        """At level GRADIENTS: per layer how many elements the backward vectors have, and what the sampler gave."""
        return self._squares.per_layer(self._backwards.counts)

    def forget_squares(self) -> None:
        """The gradients so far were thrown away."""
        self._squares.clear()
        self._touched = bytearray(len(self._tensors))

    def kind(self, ran: Sequence[bool]) -> tuple[bytes, tuple[bool, ...]]:
        """What kind of step this is: which parameters have got a gradient, and which layers have run."""
        return bytes(self._touched), tuple(ran)

    def collect(self) -> list[Pass]:
        """Hand over the passes since the last step that had a backward and whose gradients were not thrown away."""
        passes, self._passes = self._passes, []
        counts = self._backwards.counts
        for passed in passes:
            settled = [visit.settle(counts) for visits in passed.visits for visit in visits]
            passed.has_backward = any(settled)
            found = [outputs for number, outputs in passed.reached.items() if counts(number)]
            passed.outputs = sorted(set().union(*found))
        passes = [passed for passed in passes if passed.has_backward]
        if passes:
            self.budget.learn(passes, self.dropped)
        return passes

    # The hooks on the model

    def _enter(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, traced: bool = False
    ) -> None:
        if not self.replaying or self.replayer.stale():
            self.recover()  # what an interrupt has left, the gradient mode too
        if self.replaying or not torch.is_grad_enabled() or taps.another_replays(self):
            return
        if torch._C._functorch.peek_interpreter_stack() is not None:  # gradients of torch.func are no training
            self.transformed = True
            return
        if self._open is not None:
            if not traced and calls_under_way(self._model) > 1:  # the model calls itself
                self._depth += 1
                return
            self._open.drop()  # an interrupt has ended that forward
            self._open, self._depth = None, 0
        self._begins()
        if self.switch.level == taps.OFF:
            return
        start = time.perf_counter()
        self._forget_thrown_away()
        self.seconds += time.perf_counter() - start
        self._open = passed = Pass(len(self._layers), self._turn)
        if self.switch.level != taps.EVERYTHING:
            return
        self.budget.live.add(passed)
        self._or_drop(passed, self._begin, passed, args, kwargs)

    def _begin(self, passed: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passed.since = sequence_number()
        passed.other_weights = not runs_on_own(self._places)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        passed.dependent = depends_on(tensors, self._tensors)
        # A parameter is meant as it is after the step.
        own = set(map(id, self._tensors))
        passed.args, passed.kwargs = copy_arguments(
            (args, kwargs), lambda x: x if id(x) in own else self._copy(passed, x)
        )
        passed.inputs_seen = [(x, x._version) for x in tensors]
        passed.state = ForwardState.take(self._model, self._tensors, self.replayer.inventories)
        self._fingerprint = passed.fingerprint = Fingerprint(self._tensors, self._fingerprint)

    def _leave(self, _module: nn.Module, _args: Any, output: Any, *, traced: bool = False) -> None:
        if self._open is None or self.replaying or not torch.is_grad_enabled() or taps.another_replays(self):
            return
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return
        if self._depth:
            self._depth -= 1
            return
        passed, self._open = self._open, None
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        for index, x in enumerate(outputs):
            if x.requires_grad:
                begins = functools.partial(self._begins_backward, weakref.ref(passed), index, self._turn)
                self._hook(x, taps.Guarded(begins, self.failed))
        if self.switch.level != taps.EVERYTHING or passed.dropped:
            return
        self._or_drop(passed, self._end, passed, outputs, traced)

    def _end(self, passed: Pass, outputs: list[Tensor], traced: bool) -> None:
        if traced and passed.state is not None and passed.state.randomness.moved():
            raise UnknownArgumentError(
                "random numbers in a graph that torch.compile made around the model after the monitor was "
                "attached. They cannot be drawn again from outside: attach it to the compiled model instead"
            )
        assert passed.fingerprint is not None
        passed.writes_inputs = any(x._version != version for x, version in passed.inputs_seen)
        passed.writes_parameters = [p._version for p in self._tensors] != passed.fingerprint.versions
        inputs, passed.inputs_seen = [x for x, _ in passed.inputs_seen], []
        edges, passed.edges = passed.edges, []
        if any(edge is not None for visits in edges for edge in visits):
            passed.signature, known = self._traces.of(edges, outputs, self._tensors, passed.since, inputs)
            passed.trace = known.trace
            passed.dependent = passed.dependent or known.older

    def parameters_are(self, parameters: dict[str, Tensor]) -> None:
        """Those that the optimizers update: what the graph shows has to be looked at again when they change."""
        self._parameters = parameters
        self._tensors = list(parameters.values())
        self._places = places_of(self._model, self._tensors)
        self._traces.clear()
        self._touched = bytearray(len(self._tensors))
        self._backwards.parameters = self._tensors
        self.replayer.parameters = self._tensors

    # From the taps

    def visit(self, layer: Layer, features: Tensor) -> None:
        if self.replayer.sink is not None:
            self.replayer.sink(layer, features)
        elif taps.another_replays(self):
            return
        elif self.switch.level == taps.GRADIENTS:
            if features.requires_grad and not transformed(features):
                turn = self._turn
                visit = self._squares.visit()
                square = taps.Guarded(lambda gradient: self._square(layer.index, gradient, turn, visit), self.failed)
                self._hook(features, square)
        elif self._open is None:
            self._recomputed(layer, features)
        elif not self._open.dropped:
            self._or_drop(self._open, self._visit, self._open, layer.index, features)

    def unseen(self, error: Exception) -> None:
        """A layer has no features: its forward cannot be captured."""
        if self._open is not None and not self._open.dropped and self.switch.level == taps.EVERYTHING:
            self._or_drop(self._open, throw, error)

    def compiled_features(self, layer: int, features: Tensor) -> None:
        if self.replayer.sink is not None:
            self.replayer.sink(self._layers[layer], features)
        elif self._open is not None and not self._open.dropped and self.switch.level == taps.EVERYTHING:
            self._or_drop(self._open, self._visit_compiled, self._open, layer, features)

    def compiled_gradient(self, layer: int, gradient: Tensor) -> None:
        if self.switch.level == taps.GRADIENTS:
            self._square(layer, gradient, self._turn, self._squares.visit())
        else:
            self._came_compiled(layer, gradient)

    # In the backward

    def _begins_backward(self, passed: weakref.ref[Pass], output: int, turn: int, _gradient: Tensor) -> None:
        """A gradient has come to an output of the model, and so far to none of its parameters."""
        if turn != self._turn or current() == -1:
            return
        seen = passed()
        number = self._backwards.note()
        if seen is not None:
            seen.reached.setdefault(number, set()).add(output)
        if self._task == number or not self._backwards.counts(number):
            return
        self._task = number
        self.seen += 1
        self._drop_thrown_away()
        self._stamps = stamps(self._tensors)
        torch.autograd.Variable._execution_engine.queue_callback(
            taps.Guarded(functools.partial(self._backward_over, turn), self.failed)
        )
        if self.gradients is not None:
            self.gradients.note()

    def _backward_over(self, turn: int) -> None:
        if turn != self._turn:
            return
        for index, (before, now) in enumerate(zip(self._stamps, stamps(self._tensors), strict=True)):
            if before != now:
                self._touched[index] = 1

    def _square(self, layer: int, gradient: Tensor, turn: int, visit: int) -> None:
        if turn != self._turn:
            return
        start = time.perf_counter()
        try:
            square = self._sampler.squares(strided(gradient), _SQUARED)
            self._squares.add(layer, visit, self._backwards.note(), gradient.numel(), square)
        except Exception as error:  # the layer's prediction is lost, not the training run
            self._squares.lose(layer)
            name = self._layers[layer].name
            self._warn("square", f"has no norm of the backward vector of {name!r} ({type(error).__name__}: {error})")
        self.seconds += time.perf_counter() - start

    # Passes whose gradient never reaches a step

    def _forget_thrown_away(self) -> None:
        """Before a new pass: drop earlier ones if ``zero_grad`` came after them; else remember how to tell later.

        That is how a skipped optimizer step differs from gradient accumulation.
        """
        self._drop_thrown_away()
        held = next((p for p in self._tensors if p.grad is not None), None)
        if held is None or held.grad is None:
            self._forget_trained()
            return
        for passed in self._passes:
            if passed.witness is None and self._backwards.trained(passed.backwards):
                passed.witness = (held, weakref.ref(held.grad))

    def _forget_trained(self) -> None:
        """All passes but those that ``torch.autograd.grad`` alone has gone through: their backward is yet to come."""
        self._passes = [p for p in self._passes if not self._backwards.trained(p.backwards)]

    def _drop_thrown_away(self) -> None:
        """Passes before something wrote to the gradients: nothing but zeros comes between micro-batches of a step.

        Whether it was zeros is asked on the device, without waiting for it.
        """
        if self.gradients is None or not (self._passes or self._squares or any(self._touched)):
            return
        if self.gradients.written_since_backward():
            self._forget_trained()
            self.forget_squares()
            self.rewritten.append(self.gradients.nonzero())
