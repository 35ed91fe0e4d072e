"""What is kept of the forwards of a measured step: inputs, state, and rows of features and of backward vectors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastfs._monitor.capture import taps
from fastfs._monitor.capture.backwards import Backwards, current
from fastfs._monitor.capture.memory_budget import Budget
from fastfs._monitor.capture.passes import Pass, Visit
from fastfs._monitor.capture.recomputation import Recomputation, contexts
from fastfs._monitor.capture.sampling import Kept, Sampler, row_dims
from fastfs._monitor.row_reasons import NO_GRAPH, NO_ROOM, TRANSFORMED
from fastfs._network.autograd_graph import edge_of
from fastfs._network.feature_tensors import strided
from fastfs._network.input_copies import UnknownArgumentError
from fastfs._network.layers import Layer

__all__ = ["Keeping", "throw", "transformed"]


class Keeping:
    """Keeps what passes need, within the budget; gives up a pass of which something cannot be kept.

    Args:
        layers: the watched modules.
        backwards: which of them count.
        sampler: which rows are kept.
        budget: bytes that everything captured may take.
        warn: called with a kind and a message when something cannot be captured.
        failed: called with an exception in a hook; it does not reach the training loop.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        backwards: Backwards,
        sampler: Sampler,
        budget: Budget,
        warn: Callable[[str, str], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.budget = budget
        self.failed = failed
        self.seconds = 0.0  # host time spent in the hooks since clear()
        self.dropped = 0  # passes that could not be captured since clear()
        self._layers = tuple(layers)
        self._backwards = backwards
        self._sampler = sampler
        self._warn = warn
        self._passes: list[Pass] = []  # those with a backward
        self._held: list[Pass] = []  # those that no tensor hook of ours holds
        self._turn = 0
        self._leaf_handles: list[RemovableHandle] = []

    @property
    def waiting(self) -> list[Pass]:
        """The passes so far that had a backward."""
        return self._passes

    def account(self) -> Pass:
        """What rows that a mode keeps by itself are counted on; their memory counts as long as it lives."""
        self.budget.single()
        passed = Pass(len(self._layers), self._turn)
        self.budget.live.add(passed)
        return passed

    def keep(self, passed: Pass, features: Tensor) -> Kept | None:
        """As many rows as are wanted, or as fit into this visit's share of the budget."""
        features = strided(features)
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

    def _copy(self, passed: Pass, argument: Tensor) -> Tensor:
        """Of an input, since it may be changed in place."""
        size = nbytes(argument)
        self.budget.take(passed, size, "a copy of the model's inputs")
        passed.inputs += size
        copy = argument.detach().clone()
        return copy.requires_grad_() if argument.requires_grad and copy.is_leaf else copy

    def _visit(self, passed: Pass, index: int, features: Tensor) -> None:
        if transformed(features):
            passed.visits[index].append(Visit(features.shape, None, False, TRANSFORMED))
            passed.edges[index].append(None)
            return
        inside = features.requires_grad
        hidden = not inside and not torch.is_grad_enabled()  # its gradient may come with a recomputation
        kept = self.keep(passed, features) if inside or hidden else None
        absent = 0 if kept is not None else NO_ROOM if inside or hidden else NO_GRAPH
        visit = Visit(features.shape, kept, inside, absent)
        passed.visits[index].append(visit)
        passed.edges[index].append(edge_of(features))
        if hidden:
            visit.contexts = contexts()
            self._hold(passed)
        elif kept is not None:
            self._hook(features, Arrival(self, passed, visit))

    def _visit_compiled(self, passed: Pass, index: int, features: Tensor) -> None:
        passed.visits[index].append(Visit(features.shape, self.keep(passed, features), False))
        self._hold(passed)

    def _recomputed(self, layer: Layer, features: Tensor) -> None:
        """A forward outside of one of the model: the recomputation of a reentrant checkpoint, or none of ours."""
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
            passed, visit = found
            visit.inside = True
            self._hook(features, Arrival(self, passed, visit))

    def _came_compiled(self, layer: int, gradient: Tensor) -> None:
        """A backward vector out of a compiled graph: the last forward comes back first."""
        for passed in reversed(self._held):
            for visit in reversed([] if passed.dropped else passed.visits[layer]):
                if current() not in visit.parts and visit.before is not None and visit.shape == gradient.shape:
                    self.receive(passed, visit, gradient)
                    return

    def receive(self, passed: Pass, visit: Visit, gradient: Tensor) -> None:
        """The backward vector of a visit."""
        if not passed.dropped and passed.turn == self._turn and visit.before is not None:  # else its step is over
            self._or_drop(passed, self._receive, passed, visit, visit.before, gradient)

    def _receive(self, passed: Pass, visit: Visit, before: Kept, gradient: Tensor) -> None:
        if not passed.has_backward:
            passed.has_backward = True
            self._passes = [*(p for p in self._passes if p.accumulates()), passed]
        if visit.parts:  # one more than the budget has reckoned with
            self.budget.take(passed, before.values.nbytes, "another backward vector")
        rows = self._sampler.keep(strided(gradient), before.values.shape[0]).values
        number = self._backwards.note()
        passed.backwards.add(number)
        visit.arrive(number, rows)

    def _hook(self, features: Tensor, hook: Callable[[Tensor], None]) -> None:
        handle = features.register_hook(hook)
        if features.is_leaf:  # outlives the step, and would keep this pass
            self._leaf_handles.append(handle)

    def _hold(self, passed: Pass) -> None:
        if not self._held or self._held[-1] is not passed:
            self._held.append(passed)

    def _or_drop(self, passed: Pass, function: Callable[..., None], *args: Any) -> None:
        """Call a function. What fails in it ends the capture of this pass, not the training run."""
        start = time.perf_counter()
        message: tuple[str, str] | None = None
        try:
            function(*args)
        except Exception as error:
            message = _message(error)
        if message is not None:  # out of the handler, whose traceback holds tensors
            self._drop(passed, message)
        self.seconds += time.perf_counter() - start

    def _drop(self, passed: Pass, message: tuple[str, str]) -> None:
        passed.drop()
        self._passes = [p for p in self._passes if p is not passed]
        self.dropped += 1
        self._warn(*message)


class Arrival(taps.Hook):
    """A hook on features: their backward vector comes to the visit. No exception gets out of it."""

    __slots__ = ("keeping", "passed", "visit")

    def __init__(self, keeping: Keeping, passed: Pass, visit: Visit) -> None:
        self.keeping = keeping
        self.passed = passed
        self.visit = visit

    def __call__(self, gradient: Tensor) -> None:
        try:
            self.keeping.receive(self.passed, self.visit, gradient)
        except Exception as error:
            self.keeping.failed(error)


def nbytes(x: Tensor) -> int:
    """Memory of a tensor's values."""
    values = strided(x)
    return values.numel() * values.element_size()


def transformed(features: Tensor) -> bool:
    """Inside of ``torch.func.vmap`` and its like."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(features))


def _message(error: Exception) -> tuple[str, str]:
    if isinstance(error, UnknownArgumentError):
        return "argument", f"has a forward with {error}: this forward is left out"
    return "copy", f"has a forward that could not be copied and is left out ({type(error).__name__}: {error})"


def throw(error: Exception) -> None:
    raise error
