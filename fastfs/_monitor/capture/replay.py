"""Forwards of the monitor's own: in the state of a training forward, guarded, with everything put back afterwards."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastfs._monitor.capture import taps
from fastfs._monitor.capture.passes import Pass
from fastfs._monitor.capture.sampling import Sampler
from fastfs._network.feature_tensors import strided
from fastfs._network.guard import FunctionGuard, Guard, Plans, WriteError, pop_ended
from fastfs._network.input_copies import copy_arguments, tensors_in
from fastfs._network.inventory import Inventories
from fastfs._network.journal import Journal
from fastfs._network.layers import Layer
from fastfs._network.state import ForwardState

__all__ = ["Replay", "Replayer", "Sink"]

Sink = Callable[[Layer, Tensor], None]
"""Takes the features of a layer in a forward of the monitor's own."""

T = TypeVar("T")

_NEEDS_GRAPH = ("does not require grad", "does not have a grad_fn", "appears to not have been used in the graph")


@dataclass(frozen=True)
class Replay:
    """What a second forward gave.

    Attributes:
        after: per layer and visit the shape of the features, and the rows of them that the visit has kept.
        coarsest: per layer, spacing at 1 of the coarsest numbers computed with so far; None where it was not seen.
        choices: integer results of top-k and argmax, in order.
        cut: layers before which the forward had cut off a first-order change.
    """

    after: list[list[tuple[torch.Size, Tensor | None]]]
    coarsest: list[float] | None
    choices: list[Tensor]
    cut: set[int]


class Replayer:
    """Runs forwards of the monitor's own.

    Args:
        layers: the watched layers.
        switch: of the taps.
        sampler: which rows are kept.
        owned: gives the tensors that training owns: parameters, their gradients, the optimizers' state.
    """

    def __init__(
        self, layers: Sequence[Layer], switch: taps.Switch, sampler: Sampler, owned: Callable[[], Iterable[Tensor]]
    ) -> None:
        self.journal = Journal()
        self.inventories = Inventories()  # of the model
        self._plans: Plans = {}
        self.sink: Sink | None = None  # not None: such a forward runs
        self.parameters: Sequence[Tensor] = ()  # trained ones; gradients and flags are put back
        self.others: Callable[[], Iterable[Any]] = tuple  # containers that are put back, too
        self._layers = tuple(layers)
        self._switch = switch
        self._sampler = sampler
        self._owned = owned
        self._with_graph = False  # the forward takes derivatives of its own with respect to its inputs

    def recover(self) -> None:
        """Put back what an interrupt has left changed."""
        if self.journal.pending:
            self.journal.restore()
        pop_ended()

    def stale(self) -> bool:
        """Whether a forward of ours seems to run but none does: an interrupt has ended it."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is Replayer.run.__code__ and frame.f_locals.get("self") is self:
                return False
            frame = frame.f_back
        return True

    def run(
        self,
        state: ForwardState,
        sink: Sink,
        forward: Callable[[Guard | None], Any],
        *,
        grad: bool = False,
        guarded: bool = True,
        **options: Any,
    ) -> Any:
        """Run a forward of the monitor's own.

        Args:
            state: that it is to find.
            sink: takes the features of the watched layers in it.
            forward: called with the guard.
            grad: record gradients.
            guarded: by a :class:`Guard`. Not where compiled graphs are to run as they are.
            options: of the guard.

        Returns:
            What ``forward`` gives.
        """
        try:
            with OwnForward(self, state, sink, grad, guarded, options) as guard:
                return forward(guard)
        finally:
            self.recover()  # what an interrupt on the way into the forward has left

    def replay(
        self,
        passed: Pass,
        forward: Callable[..., Any],
        see: Callable[[Tensor], Tensor] = Tensor.detach,
        *,
        guarded: bool = True,
        single: bool = False,
        strict: bool = False,
    ) -> Replay:
        """A second forward on the same inputs and in the same state.

        Args:
            passed: of which forward.
            forward: called with its arguments; the model, or the model at other parameters.
            see: what of the features to take.
            guarded: watched operation by operation.
            single: compute in float32 what the model computes in 16 bits.
            strict: a compiled forward is to follow, where nobody looks on: refuse what could only be put back here.

        Raises:
            WriteError: the forward wants to write to what is not its own; nothing has been changed.
        """

        def attempt(_grad: bool) -> Replay:
            return self._replay(passed, forward, see, guarded, single, strict)

        try:
            return self.with_graph_if_needed(attempt)
        except WriteError as error:
            if not error.inputs or passed.writes_inputs:
                raise
            passed.writes_inputs = True
        return self.with_graph_if_needed(attempt)

    def with_graph_if_needed(self, attempt: Callable[[bool], T]) -> T:
        """Call a function that runs a forward, without gradient, or with it where the forward differentiates itself.

        Args:
            attempt: takes whether to record gradients; may be called twice.
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
        passed: Pass,
        forward: Callable[..., Any],
        see: Callable[[Tensor], Tensor],
        guarded: bool,
        single: bool,
        strict: bool,
    ) -> Replay:
        assert passed.state is not None
        after: list[list[tuple[torch.Size, Tensor | None]]] = [[] for _ in self._layers]
        coarsest = [0.0] * len(self._layers)
        watching: list[Guard] = []
        cut: set[int] = set()

        def sink(layer: Layer, features: Tensor) -> None:
            number = len(after[layer.index])
            visits = passed.visits[layer.index]
            before = visits[number].before if number < len(visits) else None
            rows = None
            if before is not None and features.shape == visits[number].shape:
                rows = self._rows(features, see, before.values.shape[0])
            after[layer.index].append((features.shape, rows))
            for guard in watching:
                coarsest[layer.index] = guard.coarsest
                if guard.cut:
                    cut.add(layer.index)

        args, kwargs = passed.args, passed.kwargs
        renewed = passed.writes_inputs or self._with_graph
        if renewed:
            with torch.set_grad_enabled(self._with_graph):  # clones of leaves are none: they may be written to
                args, kwargs = copy_arguments((args, kwargs), Tensor.clone)
        copies = tensors_in((args, kwargs))
        options: dict[str, Any] = {"single": single, "strict": strict}
        options["allowed" if renewed else "inputs"] = copies

        def run(guard: Guard | None) -> None:
            watching.extend([] if guard is None else [guard])
            forward(*args, **kwargs)

        self.run(passed.state, sink, run, grad=self._with_graph, guarded=guarded, **options)
        if not watching:
            return Replay(after, None, [], cut)
        return Replay(after, coarsest, watching[0].choices, cut)

    def _rows(self, features: Tensor, see: Callable[[Tensor], Tensor], kept: int) -> Tensor:
        """A copy, like the features before: a following operation may work in place."""
        if type(features) is not Tensor:
            return self._sampler.keep(see(strided(features)), kept).values
        past_dispatch: Any = torch._C._DisableTorchDispatch()
        with past_dispatch, torch._C.DisableTorchFunction():  # no operations of the forward
            return self._sampler.keep(see(strided(features)), kept).values


class OwnForward:
    """See :meth:`Replayer.run`; a class, since an interrupt may leave a generator to be closed much later."""

    def __init__(
        self,
        replayer: Replayer,
        state: ForwardState,
        sink: Sink,
        grad: bool,
        guarded: bool,
        options: dict[str, Any],
    ) -> None:
        self._replayer = replayer
        self._applied = state.applied(
            replayer.journal, grad=grad, parameters=replayer.parameters, others=replayer.others()
        )
        self._sink = sink
        self._guarded = guarded
        self._options = options

    def __enter__(self) -> Guard | None:
        try:
            return self._enter()
        except BaseException:  # no __exit__ comes then
            self._replayer.journal.restore()
            raise

    def _enter(self) -> Guard | None:
        replayer, switch = self._replayer, self._replayer._switch
        copies = self._applied.__enter__()
        level = switch.level

        def forget() -> None:
            replayer.sink, switch.level = None, level

        replayer.journal.note(forget)
        replayer.sink, switch.level = self._sink, taps.EVERYTHING
        # Without gradient a reentrant checkpoint has nothing to do, and says so.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
        if not self._guarded:
            return None
        allowed = [*copies, *self._options.pop("allowed", ())]
        strict = self._options.pop("strict", False)
        guard = Guard(replayer.journal, allowed, protected=replayer._owned, plans=replayer._plans, **self._options)
        replayer.journal.note(guard.end)
        guard.__enter__()  # type: ignore[no-untyped-call]  # it leaves with the settings that the journal restores
        FunctionGuard(guard, replayer.journal, strict=strict).__enter__()  # type: ignore[no-untyped-call]
        return guard

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._applied.__exit__(kind, error, trace)
