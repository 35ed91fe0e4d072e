"""Learning rates for a whole training, from short trainings of copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from fastfs._network.layers import AUTO, Selection, parameter_names, unwrapped
from fastfs._network.linearization import Linearization, LossFunction
from fastfs.scaling._calibration import Calibration
from fastfs.scaling._optimizers import OptimizerLike, label, made
from fastfs.scaling._roles import others
from fastfs.scaling._trials import Trial, Trials, as_batches

__all__ = ["calibrate"]

_FACTOR = 4.0  # rate of the other parameters over that of the matrices, to begin with
_BELOW = 4.0  # the largest rate over the rate of the first trial
_BETTER = 0.005  # share of its loss by which the best trial has to be beaten
_MOST = 10  # trials that may be paid for
_MOVES = ((1, 1), (-1, -1), (0, 2), (0, -2), (1, 0), (-1, 0))  # powers of two: of the matrices, of the others


def calibrate(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    optimizer: OptimizerLike | Sequence[Optimizer] = "sgd",
    layers: Selection = AUTO,
    steps: int = 100,
) -> Calibration:
    count = steps
    batches, several = as_batches(batch)
    lin = Linearization(model, loss_fn, batches(0), layers=layers)
    apart = others(lin, unwrapped(model))
    optimizers = made(optimizer, lin)
    trials = Trials(model, loss_fn, batches, optimizers, apart, count)
    try:
        largest, relative = trials.largest_rate(_FACTOR if apart else 1.0)
        first = largest / _BELOW
        best = _search(trials, first, bool(apart)) if several else Trial(first, _FACTOR if apart else 1.0, 0, float("nan"))
    finally:
        trials.restore()
    return Calibration(best, largest, relative, trials, optimizers, apart)


def _search(trials: Trials, first: float, apart: bool) -> Trial:
    tried: dict[tuple[int, int], Trial] = {}

    def at(place: tuple[int, int]) -> Trial:
        if place not in tried:
            a, b = place
            tried[place] = trials.run(first * 2.0**a, _FACTOR * 2.0 ** (b - a) if apart else 1.0)
        return tried[place]

    here = (0, 0)
    best = at(here)
    improved = True
    while improved:
        improved = False
        for a, b in _MOVES if apart else _MOVES[:2]:
            while sum(t.steps for t in trials.done) <= (_MOST - 1) * trials.steps:
                there = (here[0] + a, here[1] + b)
                if there in tried:
                    break
                found = at(there)
                if found.reason or found.loss > (1 - _BETTER) * best.loss:
                    break
                here, best, improved = there, found, True
    return best
