"""What the watched layers put out in a forward, and the backward vectors that come back to them.

    forward of the model -> Pass (inputs copied, state taken) -> per watched layer: Visit (rows of the features kept)
    backward                                                  -> Visit.backward (the same rows)
    collect()            -> the passes whose gradients the optimizer step used
    replay(pass)         -> the same forward once more, without gradient: features after, per layer and visit

Until its backward comes a Pass is kept alive by the autograd graph alone (through the tensor hooks on the features), so
forwards that lead nowhere - an evaluation without no_grad, an exception - leave nothing behind. After it, until
:meth:`Capture.clear`. Two kinds have no tensor hook of ours yet and are held until then: visits inside of compiled
graphs, and of blocks under a reentrant checkpoint, whose backward vectors come with the recomputation. The memory
budget bounds them.

A pass that cannot be captured, for its inputs or for want of memory, is dropped with a warning: training goes on.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from fastfs.monitor.capture import taps
from fastfs.monitor.capture.backwards import Backwards, current
from fastfs.monitor.capture.budget import Budget
from fastfs.monitor.capture.passes import Pass, Visit
from fastfs.monitor.capture.sampling import Kept, Sampler, row_dims
from fastfs.network.inputs import UnknownArgumentError, copy_arguments
from fastfs.network.layers import Layer
from fastfs.network.state import ForwardState
from fastfs.network.structure import Edge, Structure, analyse, edge_of

__all__ = ["Capture", "Sink"]

Sink = Callable[[Layer, Tensor], None]
"""Takes the features of a layer in a forward of the monitor's own."""


_SQUARED = 256  # rows that the norm of a backward vector is taken of, where it is for a prediction only


class Capture:
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
    ) -> None:
        self.switch = taps.Switch()
        self.budget = budget
        self.seconds = 0.0  # host time spent in the hooks since clear()
        self.dropped = 0  # passes that could not be captured since clear()
        self.structure: Structure | None = None
        self._squares: list[list[tuple[int, int, tuple[Tensor, float]]]] = [
            [] for _ in layers
        ]  # backward, elements, sum
        self._lost: set[int] = set()  # layers of which a sum is missing
        self._backwards = Backwards(list(parameters.values()))
        self._model = model
        self._layers = tuple(layers)
        self._parameters = parameters
        self._sampler = sampler
        self._warn = warn
        self._begins = begins
        self._passes: list[Pass] = []  # those with a backward
        self._held: list[Pass] = []  # those that no tensor hook of ours holds
        self._open: Pass | None = None  # the forward that is running
        self._depth = 0
        self._turn = 0
        self._sink: Sink | None = None  # not None: a forward of the monitor's own
        self._leaf_handles: list[RemovableHandle] = []
        key = taps.register(self)
        self._handles = [
            model.register_forward_pre_hook(taps.Around(self._enter, self.switch), prepend=True, with_kwargs=True)
        ]
        for layer in self._layers:  # before the hook that ends the forward: the model itself may be a layer
            tap = taps.Tap(layer, self.switch, self, key, select)
            self._handles.append(layer.module.register_forward_hook(tap))
        # always_call: also when the forward raises
        leave = taps.Around(self._leave, self.switch)
        self._handles.append(model.register_forward_hook(leave, always_call=True))

    @property
    def replaying(self) -> bool:
        return self._sink is not None

    def close(self) -> None:
        """Remove every hook and forget everything captured."""
        self.switch.level = taps.OFF
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forget everything captured: the next forward belongs to the next step."""
        for passed in list(self.budget.live):  # a loop that keeps its last loss keeps the graph, which holds the pass
            passed.drop()
        self._passes = []
        self._held = []
        self._open = None
        self._depth = 0
        self._turn += 1
        for handle in self._leaf_handles:
            handle.remove()
        self._leaf_handles = []
        self.forget_squares()
        self._backwards.clear()
        self.structure = None
        self.seconds = 0.0
        self.dropped = 0

    def squares(self) -> list[tuple[int, list[tuple[Tensor, float]]]]:
        """At level GRADIENTS: per layer how many elements the backward vectors have, and what the sampler gave."""
        counts = self._backwards.counts
        whole = ([] if layer in self._lost else parts for layer, parts in enumerate(self._squares))
        found = [[part for part in parts if counts(part[0])] for parts in whole]
        return [(sum(size for _, size, _ in parts), [square for *_, square in parts]) for parts in found]

    def forget_squares(self) -> None:
        """The gradients so far were thrown away."""
        self._squares = [[] for _ in self._layers]
        self._lost.clear()

    def collect(self) -> list[Pass]:
        """Hand over the passes since the last step that had a backward and whose gradients were not thrown away."""
        passes, self._passes = self._passes, []
        counts = self._backwards.counts
        for passed in passes:
            settled = [visit.settle(counts) for visits in passed.visits for visit in visits]
            passed.has_backward = any(settled)
        passes = [passed for passed in passes if passed.has_backward]
        if passes:
            self.budget.learn(passes, self.dropped)
        return passes

    @contextmanager
    def into(self, sink: Sink) -> Iterator[None]:
        """Forwards in the ``with`` block are the monitor's own: features go to ``sink``."""
        level = self.switch.level
        self._sink, self.switch.level = sink, taps.EVERYTHING
        try:
            with warnings.catch_warnings():
                # Without gradient a reentrant checkpoint has nothing to do, and says so.
                warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
                yield
        finally:
            self._sink, self.switch.level = None, level

    def replay(
        self, passed: Pass, forward: Callable[..., Any], see: Callable[[Tensor], Tensor] = Tensor.detach
    ) -> list[list[tuple[torch.Size, Tensor | None]]]:
        """A second forward on the same inputs and in the same state.

        Args:
            passed: of which forward.
            forward: called with its arguments; the model, or the model at other parameters.
            see: what of the features to take.

        Returns:
            Per layer and visit the shape of the features, and the rows of them that the visit has kept.
        """
        assert passed.state is not None
        after: list[list[tuple[torch.Size, Tensor | None]]] = [[] for _ in self._layers]

        def sink(layer: Layer, features: Tensor) -> None:
            number = len(after[layer.index])
            visits = passed.visits[layer.index]
            before = visits[number].before if number < len(visits) else None
            rows = None
            if before is not None and features.shape == visits[number].shape:
                # Copied, like the features before: a following operation may work in place.
                rows = self._sampler.keep(see(features), before.values.shape[0]).values
            after[layer.index].append((features.shape, rows))

        with self.into(sink), passed.state.applied():
            forward(*passed.args, **passed.kwargs)
        return after

    # The hooks on the model

    def _enter(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, traced: bool = False
    ) -> None:
        if self.replaying or not torch.is_grad_enabled() or taps.another_replays(self):
            return
        if self._open is not None:  # the model calls itself
            self._depth += 1
            return
        self._begins()
        if self.switch.level != taps.EVERYTHING:
            return
        self._open = passed = Pass(len(self._layers), self._turn)
        self.budget.live.add(passed)
        with self._timed(), self._or_drop(passed):
            self._forget_thrown_away()
            passed.args, passed.kwargs = copy_arguments((args, kwargs), lambda x: self._copy(passed, x))
            passed.state = ForwardState.take(self._model)
            passed.versions = self.versions()

    def _copy(self, passed: Pass, argument: Tensor) -> Tensor:
        """Of an input, since it may be changed in place; but a parameter is meant as it is after the step."""
        if any(argument is p for p in self._parameters.values()):
            return argument
        size = argument.numel() * argument.element_size()
        self.budget.take(passed, size, "a copy of the model's inputs")
        passed.inputs += size
        return argument.detach().clone()

    def _leave(self, _module: nn.Module, _args: Any, output: Any, *, traced: bool = False) -> None:
        if self._open is None or self.replaying or not torch.is_grad_enabled() or taps.another_replays(self):
            return
        if self._depth:
            self._depth -= 1
            return
        passed, self._open = self._open, None
        if traced and passed.state is not None and passed.state.randomness.moved():
            with self._or_drop(passed):
                raise UnknownArgumentError(
                    "random numbers in a graph that torch.compile made around the model after the monitor was "
                    "attached. They cannot be drawn again from outside: attach it to the compiled model instead"
                )
        if not passed.dropped and self.structure is None:
            with self._timed(), self._or_drop(passed):
                outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
                if outputs and any(edge is not None for edges in passed.edges for edge in edges):
                    self.structure = self.analyse(passed.edges, outputs, list(self._parameters.values()))
            passed.edges = []

    def analyse(
        self, edges: Sequence[Sequence[Edge | None]], outputs: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> Structure:
        """Which parameters are below which layer, and which layers are cuts.

        Args:
            edges: of every layer's visits.
            outputs: of the forward.
            parameters: the leaves that stood for the parameters in it, in their order.
        """
        return analyse(edges, outputs, parameters, list(self._parameters))

    def parameters_are(self, parameters: dict[str, Tensor]) -> None:
        """Those that the optimizers update have changed: what the graph shows has to be looked at again."""
        self._parameters = parameters
        self.structure = None
        self._backwards.parameters = list(parameters.values())

    def versions(self) -> int:
        """Changes whenever a parameter is written to."""
        return sum(p._version for p in self._parameters.values())

    def written_since(self) -> bool:
        """Whether a parameter has been written to since a forward that this step is of."""
        return any(passed.versions != self.versions() for passed in self._passes)

    def account(self) -> Pass:
        """What rows that a mode keeps by itself are counted on; their memory counts as long as it lives."""
        self.budget.single()
        passed = Pass(len(self._layers), self._turn)
        self.budget.live.add(passed)
        return passed

    # From the taps

    def visit(self, layer: Layer, features: Tensor) -> None:
        if self._sink is not None:
            self._sink(layer, features)
        elif taps.another_replays(self):
            return
        elif self.switch.level == taps.GRADIENTS:
            if features.requires_grad:
                turn = self._turn
                self._hook(features, lambda gradient: self._square(layer.index, gradient, turn))
        elif self._open is None:
            self._recomputed(layer, features)
        elif not self._open.dropped:
            with self._timed(), self._or_drop(self._open):
                self._visit(self._open, layer.index, features)

    def _visit(self, passed: Pass, index: int, features: Tensor) -> None:
        inside = features.requires_grad
        hidden = not inside and not torch.is_grad_enabled()  # its gradient may come with a recomputation
        visit = Visit(features.shape, self.keep(passed, features) if inside or hidden else None, inside)
        passed.visits[index].append(visit)
        if self.structure is None:
            passed.edges[index].append(edge_of(features))
        if hidden:
            self._hold(passed)
        elif visit.before is not None:
            self._hook(features, functools.partial(self._receive, passed, visit))

    def _recomputed(self, layer: Layer, features: Tensor) -> None:
        """A forward outside of one of the model: the recomputation of a reentrant checkpoint, or none of ours."""
        if not (self._held and features.requires_grad):
            return
        for passed in reversed(self._held):
            visits = [] if passed.dropped else passed.visits[layer.index]
            for visit in reversed(visits):
                if not visit.inside and visit.before is not None and visit.shape == features.shape:
                    visit.inside = True
                    self._hook(features, functools.partial(self._receive, passed, visit))
                    return

    def compiled_features(self, layer: int, features: Tensor) -> None:
        if self._sink is not None:
            self._sink(self._layers[layer], features)
        elif self._open is not None and not self._open.dropped and self.switch.level == taps.EVERYTHING:
            passed = self._open
            with self._timed(), self._or_drop(passed):
                passed.visits[layer].append(Visit(features.shape, self.keep(passed, features), False))
                self._hold(passed)

    def compiled_gradient(self, layer: int, gradient: Tensor) -> None:
        if self.switch.level == taps.GRADIENTS:
            self._square(layer, gradient, self._turn)
            return
        for passed in reversed(self._held):  # the last forward comes back first
            for visit in reversed([] if passed.dropped else passed.visits[layer]):
                if current() not in visit.parts and visit.before is not None and visit.shape == gradient.shape:
                    self._receive(passed, visit, gradient)
                    return

    def _hook(self, features: Tensor, receive: Callable[[Tensor], None]) -> None:
        handle = features.register_hook(receive)
        if features.is_leaf:  # outlives the step, and would keep this pass
            self._leaf_handles.append(handle)

    def _receive(self, passed: Pass, visit: Visit, gradient: Tensor) -> None:
        if passed.dropped or passed.turn != self._turn or visit.before is None:  # too late: its step is over
            return
        with self._timed(), self._or_drop(passed):
            if not passed.has_backward:
                passed.has_backward = True
                self._passes = [*(p for p in self._passes if p.accumulates()), passed]
            if visit.parts:  # one more than the budget has reckoned with
                self.budget.take(passed, visit.before.values.nbytes, "another backward vector")
            visit.arrive(self._backwards.note(), self._sampler.keep(gradient, visit.before.values.shape[0]).values)

    def _square(self, layer: int, gradient: Tensor, turn: int) -> None:
        if turn != self._turn:
            return
        start = time.perf_counter()
        try:
            square = self._sampler.squares(gradient, _SQUARED)
            self._squares[layer].append((self._backwards.note(), gradient.numel(), square))
        except Exception as error:  # the layer's prediction is lost, not the training run
            self._lost.add(layer)
            name = self._layers[layer].name
            self._warn("square", f"has no norm of the backward vector of {name!r} ({type(error).__name__}: {error})")
        self.seconds += time.perf_counter() - start

    # Memory

    def keep(self, passed: Pass, features: Tensor) -> Kept | None:
        """As many rows as are wanted, or as fit into this visit's share of the budget."""
        total = math.prod(features.shape[: row_dims(features)])
        size = self.budget.row_bytes(features)
        kept = min(self._sampler.wanted(total), self.budget.room(passed, size) if size else total)
        if kept == 0 < total:
            self._warn(
                "budget",
                f"has no room for even one row of {size // self.budget.copies:,} bytes of a layer: it gets a row of "
                f"nulls. Raise memory= above {self.budget.limit:,} bytes or watch fewer layers",
            )
            return None
        self.budget.take(passed, kept * size, "rows of features")
        return self._sampler.keep(features, kept)

    def _hold(self, passed: Pass) -> None:
        if not self._held or self._held[-1] is not passed:
            self._held.append(passed)

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
        held = next((p for p in self._parameters.values() if p.grad is not None), None)
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
