"""Second forwards: they run in the state of a training forward, guarded, and leave everything as they found it."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastfs._monitor.capture import taps
from fastfs._monitor.capture.forward_capture import ForwardCapture, scalar_outputs
from fastfs._monitor.capture.sampling import RowChoice, RowSampler
from fastfs._network.feature_tensors import strided
from fastfs._network.guard import CallObserver, FunctionGuard, Guard, Plans, WriteError, pop_ended
from fastfs._network.input_copies import copy_arguments, tensors_in
from fastfs._network.inventory import Inventories
from fastfs._network.journal import Journal
from fastfs._network.layers import Layer
from fastfs._network.state import ForwardState

__all__ = ["FeatureHandler", "Features", "ForwardObserver", "OwnedState", "ReplayedForward", "Replayer"]

FeatureHandler = Callable[[Layer, Tensor], None]
"""Takes the features of a layer in a second forward."""

Features = list[list[tuple[torch.Size, Tensor | None]]]
"""Shape and kept rows of the features, per layer and call."""


class ForwardObserver(CallObserver, Protocol):
    """Looks into the second forwards that repeat training forwards."""

    def begin(self, captured: ForwardCapture) -> None:
        """Called when a second forward begins, perhaps for another time."""

    def leave(self, layer: Layer, features: Tensor, guard: Guard) -> None:
        """Called when a watched layer has returned."""


class OwnedState(Protocol):
    """What belongs to training, and what a second forward must therefore leave unchanged."""

    def tensors(self) -> Iterable[Tensor]:
        """Returns parameters, buffers, gradients and the tensors in the optimizers' states."""

    def containers(self) -> Iterable[Any]:
        """Returns what the optimizers hold besides tensors: parameter groups and states."""


T = TypeVar("T")

_NEEDS_GRAPH = ("does not require grad", "does not have a grad_fn", "appears to not have been used in the graph")


@dataclass(frozen=True)
class ReplayedForward:
    """The result of a second forward.

    Attributes:
        after: Per layer and call, the shape of the features and the rows of them that the first forward kept. A forward
            on some samples gives the shape for the whole batch.
        coarsest: Per layer, spacing at 1 of the coarsest numbers that were computed with up to it; None if unknown.
        choices: Integer results of top-k and argmax, in order.
        cut: Layers before which the forward detached a first-order change.
        scalars: Outputs that may be a loss, by their number.
    """

    after: Features
    coarsest: list[float] | None
    choices: list[Tensor]
    cut: set[int]
    scalars: dict[int, Tensor]


class Replayer:
    """Runs second forwards.

    Args:
        layers: The watched layers.
        switch: The switch of the taps.
        sampler: Chooses the rows that are kept.
        owned: What training owns.

    Attributes:
        handler: Takes features while a second forward runs; None while none does.
        parameters: The trained parameters, whose gradients and flags are restored.
        collectives: Whether the forwards may communicate with other ranks, because they all run them.
        together: Whether they do: a failure that can wait then waits until all of them have run.
        begun: Whether the forwards that the ranks have agreed upon have begun on this one.
        observer: Looks into guarded forwards that repeat training forwards; None for nobody.
    """

    def __init__(self, layers: Sequence[Layer], switch: taps.Switch, sampler: RowSampler, owned: OwnedState) -> None:
        self.journal = Journal()
        self.inventories = Inventories()  # of the model
        self._plans: Plans = {}
        self.handler: FeatureHandler | None = None
        self.parameters: Sequence[Tensor] = ()
        self.collectives = True
        self.together = False
        self.begun = False
        self.observer: ForwardObserver | None = None
        self._layers = tuple(layers)
        self._switch = switch
        self._sampler = sampler
        self._owned = owned
        self._with_graph = False  # the model's forward differentiates with respect to its inputs

    def recover(self) -> None:
        """Restores what an interrupt has left changed."""
        if self.journal.pending:
            self.journal.restore()
        pop_ended()

    def stale(self) -> bool:
        """Returns whether :attr:`handler` is set although no second forward is running: an interrupt ended it."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is Replayer.run.__code__ and frame.f_locals.get("self") is self:
                return False
            frame = frame.f_back
        return True

    def run(
        self,
        state: ForwardState,
        handler: FeatureHandler,
        forward: Callable[[Guard | None], Any],
        *,
        grad: bool = False,
        guarded: bool = True,
        **options: Any,
    ) -> Any:
        """Runs a second forward.

        Args:
            state: State of the model in which the forward runs.
            handler: Takes the features of the watched layers.
            forward: Called with the guard; runs the model.
            grad: Whether to record gradients.
            guarded: Whether a :class:`Guard` watches every operation. Compiled graphs only run as they are without it.
            options: Options of the guard.

        Returns:
            The result of ``forward``.
        """
        try:
            with OwnForward(self, state, handler, grad, guarded, options) as guard:
                return forward(guard)
        finally:
            self.recover()  # from an interrupt on the way into the forward

    def replay(
        self,
        captured: ForwardCapture,
        forward: Callable[..., Any],
        see: Callable[[Tensor], Tensor] = Tensor.detach,
        *,
        guarded: bool = True,
        single: bool = False,
        strict: bool = False,
    ) -> ReplayedForward:
        """Repeats a training forward on the same inputs and in the same state.

        Args:
            captured: The training forward.
            forward: Called with its arguments: the model, or the model at other parameters.
            see: What to take of the features.
            guarded: Whether every operation is watched.
            single: Whether to compute in float32 what the model computes in 16 bits.
            strict: Whether a compiled forward will follow, which is not watched. Writes that could be undone here are
                then refused.

        Returns:
            What the second forward has given.

        Raises:
            WriteError: The forward would write to what belongs to training. Nothing has been changed.
        """

        def attempt(_grad: bool) -> ReplayedForward:
            return self._replay(captured, forward, see, guarded, single, strict)

        try:
            return self.with_graph_if_needed(attempt)
        except WriteError as error:
            if not error.inputs or captured.writes_inputs:
                raise
            captured.writes_inputs = True
        return self.with_graph_if_needed(attempt)

    def with_graph_if_needed(self, attempt: Callable[[bool], T]) -> T:
        """Calls a function that runs a forward, without gradient unless the forward itself needs a graph.

        Args:
            attempt: Takes whether to record gradients; may be called twice.

        Returns:
            The result of ``attempt``.

        Raises:
            RuntimeError: ``attempt`` fails for another reason than a missing graph.
        """
        if not self._with_graph:
            try:
                return attempt(False)
            except RuntimeError as error:
                if not any(text in str(error) for text in _NEEDS_GRAPH):
                    raise
            self._with_graph = True
        return attempt(True)

    def _replay(
        self,
        captured: ForwardCapture,
        forward: Callable[..., Any],
        see: Callable[[Tensor], Tensor],
        guarded: bool,
        single: bool,
        strict: bool,
    ) -> ReplayedForward:
        assert captured.state is not None
        after: Features = [[] for _ in self._layers]
        coarsest = [0.0] * len(self._layers)
        watching: list[Guard] = []
        cut: set[int] = set()

        def handle(layer: Layer, features: Tensor) -> None:
            number = len(after[layer.index])
            calls = captured.calls[layer.index]
            shape, rows = features.shape, None
            if number < len(calls) and captured.replayed_shape(calls[number].shape) in (None, shape):
                shape, before = calls[number].shape, calls[number].before
                if before is not None:
                    rows = self._rows(features, see, before.choice, captured.samples is not None)
            after[layer.index].append((shape, rows))
            for guard in watching:
                if observer is not None:
                    observer.leave(layer, features, guard)
                coarsest[layer.index] = guard.coarsest
                if guard.cut:
                    cut.add(layer.index)

        args, kwargs = captured.args, captured.kwargs
        renewed = captured.writes_inputs or self._with_graph
        if renewed:
            with torch.set_grad_enabled(self._with_graph):  # a clone of a leaf is no leaf and may be written to
                args, kwargs = copy_arguments((args, kwargs), Tensor.clone)
        copies = tensors_in((args, kwargs))
        observer = self.observer if guarded else None
        options: dict[str, Any] = {"single": single, "strict": strict, "observer": observer}
        options["allowed" if renewed else "inputs"] = copies

        def run(guard: Guard | None) -> Any:
            watching.extend([] if guard is None else [guard])
            return forward(*args, **kwargs)

        if observer is not None:
            observer.begin(captured)
        output = self.run(captured.state, handle, run, grad=self._with_graph, guarded=guarded, **options)
        scalars = scalar_outputs(output)
        if not watching:
            return ReplayedForward(after, None, [], cut, scalars)
        return ReplayedForward(after, coarsest, watching[0].choices, cut, scalars)

    def _rows(self, features: Tensor, see: Callable[[Tensor], Tensor], choice: RowChoice, within: bool) -> Tensor:
        """Copies rows, as of the features before: a later operation may modify the features in place."""
        if type(features) is not Tensor:
            return self._sampler.keep(see(strided(features)), choice, within=within).values
        past_dispatch: Any = torch._C._DisableTorchDispatch()
        with past_dispatch, torch._C.DisableTorchFunction():  # the guard must not see these operations
            return self._sampler.keep(see(strided(features)), choice, within=within).values


class OwnForward:
    """The context of :meth:`Replayer.run`.

    A class and not a generator, because an interrupt can leave a generator suspended, to be closed much later.
    """

    def __init__(
        self,
        replayer: Replayer,
        state: ForwardState,
        handler: FeatureHandler,
        grad: bool,
        guarded: bool,
        options: dict[str, Any],
    ) -> None:
        self._replayer = replayer
        self._applied = state.applied(
            replayer.journal, grad=grad, parameters=replayer.parameters, others=replayer._owned.containers()
        )
        self._handler = handler
        self._guarded = guarded
        self._options = options

    def __enter__(self) -> Guard | None:
        try:
            return self._enter()
        except BaseException:  # __exit__ is not called then
            self._replayer.journal.restore()
            raise

    def _enter(self) -> Guard | None:
        replayer, switch = self._replayer, self._replayer._switch
        copies = self._applied.__enter__()
        level = switch.level

        def forget() -> None:
            replayer.handler, switch.level = None, level

        replayer.journal.note(forget)
        replayer.handler, switch.level = self._handler, taps.EVERYTHING
        # A reentrant checkpoint warns if nothing requires a gradient.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
        if not self._guarded:
            return None
        allowed = [*copies, *self._options.pop("allowed", ())]
        strict, observer = self._options.pop("strict", False), self._options.pop("observer", None)
        guard = Guard(
            replayer.journal,
            allowed,
            collectives=replayer.collectives,
            protected=replayer._owned.tensors,
            plans=replayer._plans,
            **self._options,
        )
        replayer.journal.note(guard.end)
        guard.orders = None if observer is None else []
        guard.__enter__()  # type: ignore[no-untyped-call]  # left by the journal, which restores its settings
        functions = FunctionGuard(guard, replayer.journal, strict=strict, observer=observer)
        functions.__enter__()  # type: ignore[no-untyped-call]
        return guard

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._applied.__exit__(kind, error, trace)
