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
_MARGIN = 1.4  # a rate so much larger must not diverge in a trial
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
    r"""Find learning rates by short trainings of copies, without changing model, optimizer or random numbers.

    Parameters have one of two rates: matrices between features have the rate eta; embeddings, norms, biases and the
    output's last matrix ("others") have kappa eta. Rates that the groups of a given optimizer have are kept as ratios.

    The largest rate is measured first, with kappa = 4 and a rate that grows by 1.3 from step to step. With gradients g
    and the real update dw of a step on its batch, it is where the decrease falls to half of its first-order value,

        L(w) - L(w + dw) = D / 2,    D = -<g, dw>,

    summed over three steps. On a parabola, this is where a step ends in the minimum, or at most three of these steps
    later, that is at 2.2 times the rate.

    With several batches, trials then train copies from the same start on the same batches with the same random numbers.
    The first has half of the largest rate. Doubling or halving both rates, the others' four times, or the matrices'
    only, continues while it lowers the loss at the end of the trial, its mean over the last fifth of the steps, by half
    a percent. Trials that diverge, or have a loss 1.25 times that of the best one after a quarter or half of the steps,
    end early. At the end, both rates are divided by 1.4 if a trial with 1.4 times these diverges: a training is longer
    than a trial. All this takes at most about eight trials' steps.

    With one batch, trials would reward memorizing it, and the rate is a quarter of the largest one.

    Args:
        model: the model, at initialization or later, in the mode in which it is trained. It is copied by
            ``copy.deepcopy``, one copy at a time, on one process.
        loss_fn: function of the model and a batch that returns the loss, a scalar. It must use the model that it
            receives.
        batch: a function of the step that returns its batch, the same each time; a ``DataLoader``; or one batch.
        optimizer: ``"sgd"`` (plain), ``"adam"``, ``"adamw"``, an optimizer of this model, a sequence of optimizers that
            share its parameters, or a function of parameter groups and ``lr`` that creates one.
        layers: the layers, as for :class:`fastfs.Monitor`; what follows the last one is the output.
        steps: steps of a trial, at least 10. The rates suit trainings of up to a few times this length.

    Returns:
        The rates and the trials. ``str()`` explains every number.

    Raises:
        TypeError: the optimizer or the batch is none of these, a step needs a closure, or the loss is no scalar tensor.
        ValueError: ``steps`` is too small, the optimizers lack a parameter that trains, no step changes the parameters
            or limits the rate, or every trial diverged.
        RuntimeError: in inference mode, or the loss is not repeatable.

    Source: our own rule, compared with grids in ``benchmarks/results/calibrate-cpu.json``; D is the aligned decrease of
    "The Feature Speed Formula" (arXiv 2311.18718), section 2.
    """
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
        rate, margin = largest / _ALONE, 1.0
        if several:
            best = _search(trials, largest / _BELOW, factor)
            rate, factor, margin = best.rate, best.factor, _margin(trials, best)
    finally:
        trials.restore()
    return Calibration(
        optimizer=name,
        rate=rate / margin,
        factor=factor,
        margin=margin,
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
    here = (0, 0)
    best = trials.run(first, factor)
    tried = {here}
    improved = True
    while improved:
        improved = False
        for a, b in _MOVES if factor != 1.0 else _MOVES[:2]:
            while trials.taken <= (_MOST - 1) * trials.steps:
                i, j = there = (here[0] + a, here[1] + b)
                if there in tried:
                    break
                tried.add(there)
                found = trials.run(first * 2.0**i, factor * 2.0 ** (j - i))
                halved = bool(best.reason) and (a, b) == (-1, -1)  # from a rate that diverges, down in any case
                if not (halved or best.loss - found.loss > _BETTER * abs(found.loss)):
                    break
                here, best, improved = there, found, True
    if best.reason:
        raise ValueError(f"loss_fn: every trial diverged; the last one had a rate of {trials.done[-1].rate:.3g}")
    return best


def _margin(trials: Trials, best: Trial) -> float:
    """Return what the rates of a trial are to be divided by: more than 1 if a little larger ones diverge.

    A training is longer than a trial and has other batches, and its curvature rises up to what the rate admits.
    """
    return _MARGIN if trials.run(_MARGIN * best.rate, best.factor).reason == "diverged" else 1.0
