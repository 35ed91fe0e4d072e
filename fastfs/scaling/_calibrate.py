"""Learning rates for a whole training, from short trainings of copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastfs._network.layers import AUTO, Selection, unwrapped
from fastfs._network.linearization import Linearization, LossFunction
from fastfs.scaling._calibration import Calibration
from fastfs.scaling._optimizers import OptimizerLike, label, made
from fastfs.scaling._roles import others
from fastfs.scaling._trials import Trial, Trials, as_batches

__all__ = ["calibrate"]

_FACTOR = 4.0  # rate of the other parameters over that of the matrices, to begin with
_BELOW = 2.0  # the largest rate over the rate of the first trial
_ALONE = 4.0  # the largest rate over the rate without trials
_BETTER = 0.005  # share of its loss by which the best trial has to be beaten
_MOST = 7  # trials that may be paid for, in steps
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
    if steps < 10:
        raise ValueError(f"steps: expected at least 10, got {steps}")
    name = label(optimizer)
    batches, several = as_batches(batch)
    trials = Trials(model, loss_fn, batches, steps)
    try:
        lin = Linearization(model, loss_fn, batches(0), layers=layers)
        optimizers = made(optimizer, lin)
        apart = others(lin, unwrapped(model))
        trials.of(optimizers, apart)
        factor = _FACTOR if apart else 1.0
        largest, update = trials.largest_rate(factor)
        best = _search(trials, largest / _BELOW, factor) if several else None
    finally:
        trials.restore()
    return Calibration(
        optimizer=name,
        rate=largest / _ALONE if best is None else best.rate,
        factor=factor if best is None else best.factor,
        largest_rate=largest,
        largest_update=update,
        trials=tuple(trials.done),
        steps=trials.taken,
        trial_steps=steps,
        _optimizers=tuple(optimizers),
        _others=apart,
        _names={id(p): name for name, p in zip(lin.names, lin.originals, strict=True)},
    )


def _search(trials: Trials, first: float, factor: float) -> Trial:
    """Return the best trial, moving from the first one to better neighbours until there is none."""
    tried: dict[tuple[int, int], Trial] = {}

    def at(a: int, b: int) -> Trial:
        if (a, b) not in tried:
            tried[a, b] = trials.run(first * 2.0**a, factor * 2.0 ** (b - a))
        return tried[a, b]

    here = (0, 0)
    best = at(*here)
    improved = True
    while improved:
        improved = False
        for a, b in _MOVES if factor != 1.0 else _MOVES[:2]:
            while trials.taken <= (_MOST - 1) * trials.steps:
                there = (here[0] + a, here[1] + b)
                if there in tried:
                    break
                found = at(*there)
                if not found.loss < (1 - _BETTER) * best.loss:
                    break
                here, best, improved = there, found, True
    if best.reason:
        raise ValueError(
            f"loss_fn: no trial up to {trials.steps} steps ended; the last one, at a rate of {trials.done[-1].rate:.3g}, "
            f"{trials.done[-1].reason}"
        )
    return best
