"""Short trainings of copies of a model and its optimizers; the originals and the random numbers stay as they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fastfs._functional import update_stats
from fastfs._network.linearization import LossFunction
from fastfs._network.state import ForwardState
from fastfs.formula._parameter_updates import copied_optimizer
from fastfs.scaling._roles import is_other, split

__all__ = ["Batches", "Trial", "Trials", "as_batches"]

Batches: TypeAlias = Callable[[int], Any]
"""A function of the step that returns its batch."""

_LAST = 0.2  # share of the steps over which the loss of a trial is averaged
_RACES = (0.25, 0.5)  # shares of the steps after which a trial that lags behind ends
_LAG = 0.25  # ... if its loss is larger than that of the best trial by this share
_GROWTH, _MOST_GROWTH = 1.3, 80  # of the rate per step, while the largest rate is looked for
_FIRST = 1e-4  # relative update of the first of these steps
_WINDOW = 3  # steps over which decreases are added


@dataclass(frozen=True)
class Trial:
    """A short training with one choice of rates.

    Attributes:
        rate: learning rate of the matrices.
        factor: learning rate of the other parameters, over ``rate``.
        steps: number of steps taken; fewer than requested if it was ended.
        loss: mean loss of the last fifth of the steps; infinite if it was ended.
        reason: why it was ended, or empty.
        losses: loss of every step.
    """

    rate: float
    factor: float
    steps: int
    loss: float
    reason: str = ""
    losses: tuple[float, ...] = field(default=(), repr=False)


def as_batches(batch: Any) -> tuple[Batches, bool]:
    """Return the batches as a function of the step, and whether they are more than one.

    Args:
        batch: a function of the step, a ``DataLoader``, or one batch of any other type.

    Returns:
        The function, and False for one batch.

    Raises:
        TypeError: it is an iterator, which a trial would use up.
        ValueError: the loader is empty.
    """
    if isinstance(batch, DataLoader):
        return _Loader(batch), True
    if isinstance(batch, Iterator):
        raise TypeError(
            f"batch: got an iterator ({type(batch).__name__}), which the trials would use up; expected one batch, a "
            "DataLoader, or a function of the step that returns the same batch for the same step"
        )
    if callable(batch) and not isinstance(batch, Tensor):
        return batch, True
    return lambda _step: batch, False


class _Loader:
    """The batches of a ``DataLoader`` by step, from the start of an epoch whenever step 0 is requested."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._generators = [g for g in (loader.generator, getattr(loader.sampler, "generator", None)) if g is not None]
        self._states = [g.get_state() for g in self._generators]
        self._batches: Iterator[Any] = iter(())

    def __call__(self, step: int) -> Any:
        if step == 0:
            self.restore()
            self._batches = iter(self._loader)
        for _ in range(2):
            for batch in self._batches:
                return batch
            self._batches = iter(self._loader)
        raise ValueError("batch: the DataLoader is empty")

    def restore(self) -> None:
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)


class Trials:
    """Trainings from the same start on the same batches with the same random numbers, one after the other.

    Args:
        model: the model, which is copied for each of them.
        loss_fn: function of the model and a batch.
        batches: batch of each step.
        steps: steps of a trial.

    Attributes:
        steps: steps of a trial.
        taken: number of steps of all trainings so far.
        done: the trials so far.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, batches: Batches, steps: int) -> None:
        self.steps = steps
        self.taken = 0
        self.done: list[Trial] = []
        self._model, self._loss_fn, self._batches = model, loss_fn, batches
        self._optimizers: Sequence[Optimizer] = ()
        self._others: frozenset[int] = frozenset()
        self._state = ForwardState.take(model).randomness

    def of(self, optimizers: Sequence[Optimizer], others: frozenset[int]) -> None:
        """Set the optimizers.

        Args:
            optimizers: optimizers of the model, copied with their state for each training.
            others: parameters, by id, whose rate is the rate of the matrices times a factor.
        """
        self._optimizers, self._others = optimizers, others

    def restore(self) -> None:
        """Restore the random numbers, also those of a loader; to be called after the last training."""
        self._state.restore()
        if isinstance(self._batches, _Loader):
            self._batches.restore()

    def largest_rate(self, factor: float) -> tuple[float, float]:
        """Return the learning rate at which steps from the start lower the loss by half of the first-order decrease.

        The rate grows from step to step, beginning at a relative update of 1e-4. The realized decrease is measured on
        the batch of the step.

        Args:
            factor: learning rate of the other parameters, over that of the matrices.

        Returns:
            The rate, and the relative update |dw| / |w| of the step with it.

        Raises:
            ValueError: no step moves the parameters, or the loss decreases as in first order up to the largest rate.
        """
        unit = next(self._run(1.0, factor, measured=True))
        if not (math.isfinite(unit.relative) and unit.relative > 0):
            raise ValueError(f"optimizer: expected a step that moves the parameters, got |dw| / |w| = {unit.relative}")
        start = rate = _FIRST / unit.relative
        recent: list[_Step] = []
        for count, step in enumerate(self._run(lambda i: start * _GROWTH**i, factor, measured=True)):
            rate = start * _GROWTH**count
            recent = [*recent, step][-_WINDOW:]
            expected, realized = sum(s.expected for s in recent), sum(s.realized for s in recent)
            if not (math.isfinite(realized) and math.isfinite(expected)) or (expected > 0 and realized < expected / 2):
                return rate, step.relative
            if count == _MOST_GROWTH:
                break
        raise ValueError(f"loss_fn: the loss decreases as in first order up to a learning rate of {rate:.3g}")

    def run(self, rate: float, factor: float) -> Trial:
        """Train a copy.

        Args:
            rate: learning rate of the matrices.
            factor: learning rate of the other parameters, over ``rate``.

        Returns:
            The trial, also kept in ``done``.
        """
        best = min(self.done, key=lambda trial: trial.loss, default=None)
        losses: list[float] = []
        reason = ""
        races = {round(share * self.steps) for share in _RACES}
        for step in self._run(rate, factor):
            losses.append(step.loss)
            count = len(losses)
            if not math.isfinite(step.loss):
                reason = "diverged"
            elif best is not None and count in races and not best.reason:
                mine, theirs = _end(losses, count), _end(best.losses, count)
                # Not against a trial that rose again after.
                reason = "lagged" if mine - theirs > _LAG * abs(theirs) and best.loss <= theirs else ""
            if reason or count == self.steps:
                break
        loss = math.inf if reason else _end(losses, self.steps)
        trial = Trial(rate, factor, len(losses), loss, reason, tuple(losses))
        self.done.append(trial)
        return trial

    def _run(self, rate: float | Callable[[int], float], factor: float, measured: bool = False) -> Iterator[_Step]:
        """Yield the steps of a training without end."""
        self._state.restore()
        memo: dict[int, Any] = {}
        model = copy.deepcopy(self._model, memo)
        clones = {id(p): memo[id(p)] for p in self._model.parameters()}
        optimizers = [copied_optimizer(optimizer, clones) for optimizer in self._optimizers]
        others = frozenset(id(memo[key]) for key in self._others)
        shapes = [[(part, part["lr"]) for part in split(optimizer, others)] for optimizer in optimizers]
        for optimizer, parts in zip(optimizers, shapes, strict=True):
            optimizer.param_groups = [part for part, _ in parts]
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        count = 0
        while True:
            now = rate(count) if callable(rate) else rate
            for part, shape in (pair for parts in shapes for pair in parts):
                part["lr"] = now * shape * (factor if is_other(part, others) else 1.0)
            batch = self._batches(count)
            self.taken += 1
            yield self._step(model, optimizers, parameters, batch, measured)
            count += 1

    def _step(
        self, model: nn.Module, optimizers: list[Optimizer], parameters: list[Tensor], batch: Any, measured: bool
    ) -> _Step:
        for p in parameters:
            p.grad = None
        state = ForwardState.take(model).randomness if measured else None
        with torch.enable_grad():
            loss = self._loss_fn(model, batch)
            loss.backward()
        before = [p.detach().clone() for p in parameters] if measured else []
        for optimizer in optimizers:
            optimizer.step()
        if state is None:
            return _Step(float(loss.detach()))
        updates = [p.detach() - old for p, old in zip(parameters, before, strict=True)]
        dense = [None if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad for p in parameters]
        pairs = [(g, dw) for g, dw in zip(dense, updates, strict=True) if g is not None]
        expected = float(update_stats([g for g, _ in pairs], [dw for _, dw in pairs]).aligned_decrease.sum())
        moved, size = (math.sqrt(sum(float(x.double().square().sum()) for x in xs)) for xs in (updates, before))
        after = ForwardState.take(model).randomness
        state.restore()
        with torch.no_grad():
            realized = float(loss.detach()) - float(self._loss_fn(model, batch))
        after.restore()
        return _Step(float(loss.detach()), expected, realized, moved / size if size else math.inf)


@dataclass(frozen=True)
class _Step:
    loss: float
    expected: float = math.nan  # first-order decrease
    realized: float = math.nan
    relative: float = math.nan  # |dw| / |w|


def _end(losses: Sequence[float], count: int) -> float:
    """Return the mean of the last fifth of the first ``count`` losses."""
    last = losses[count - max(1, round(_LAST * count)) : count]
    return sum(last) / len(last)
