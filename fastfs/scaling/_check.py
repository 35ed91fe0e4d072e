"""Does a model keep its desiderata over width and depth? Measured at the first step, for any model and optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fastfs._functional import update_stats
from fastfs._network.layers import AUTO, Selection
from fastfs._network.linearization import Linearization
from fastfs._stats import FeatureStats
from fastfs.formula._measure import over_visits, updates_of
from fastfs.formula._parameter_updates import optimizer_update
from fastfs.scaling._factory import Factory, FactoryError, Parts, make
from fastfs.scaling._fit import stats
from fastfs.scaling._groups import partition
from fastfs.scaling._optimizers import named
from fastfs.scaling._report import ScalingReport
from fastfs.scaling._verdicts import Point, verdicts

__all__ = ["check", "check_point"]


_LOST = 0.5  # of an update, in the rounding of the parameters; at a third the feature speed is off by some percent


@dataclass(frozen=True)
class _Run:
    axis: str
    width: int
    depth: int
    seed: int


def check(
    factory: Factory,
    *,
    widths: Sequence[int],
    depths: Sequence[int],
    seeds: int = 8,
    optimizer: str | None = None,
    lr: float | None = None,
    layers: Selection = AUTO,
    at_width: int | None = None,
    at_depth: int | None = None,
    tolerance: float = 0.15,
    confidence: float = 0.95,
    dtype: torch.dtype | None = torch.float64,
    progress: Callable[[int, int], None] | None = None,
) -> ScalingReport:
    """Run a model over widths and depths, fit exponents, and say which desiderata hold.

    At every size one step is measured (not taken further): signal propagation (rms of the features of the last hidden
    layer and over all layers), feature learning (rms of their update), loss decay, and balanced contributions
    (<g, -dw> of each group of parameters against its neighbours in the network). Each should go as size^0. An exponent
    passes if its confidence interval lies within the tolerance, fails if it lies outside, and is unclear otherwise.

    Args:
        factory: ``factory(width, depth) -> (model, loss_fn, batch, optimizer)``. ``loss_fn(model, batch)`` gives a
            scalar. ``optimizer`` is a ``torch.optim.Optimizer`` of the model, a list of parameter groups, or None:
            then one is made of the name and the rate given here. torch's generator is seeded before every call; the
            data should not depend on the sizes. Learning rates small enough for first order measure the scaling;
            larger ones measure curvature too.
        widths, depths: at least three different ones each. Widths are run at ``at_depth``, depths at ``at_width``.
        seeds: initialisations at every size, at least 2. Few rows in the batch and deep, narrow networks take many.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``, for factories that give parameter groups or None; ``"sgd"``
            if not given.
        lr: learning rate for groups that have none.
        layers: which layers, as for :class:`fastfs.Monitor`.
        at_width: the largest of the widths by default, where chance plays least.
        at_depth: the middle one of the depths by default.
        tolerance: how far an exponent may be from the wanted one.
        confidence: level of the intervals.
        dtype: forwards, gradients and the step are computed in this; None for the model's own, which small updates
            should not be lost in.
        progress: called with the number of points measured and their total.

    Raises:
        ImportError: scipy is not installed.
        FactoryError: (a ``ValueError``) the factory fails or gives something else, an optimizer or learning rate is
            given here and by the factory, or updates are lost in the rounding of parameters.
        ValueError: fewer than three sizes, a size below 1, fewer than two seeds, an unknown optimizer, a loss or
            feature that is not finite.

    Source: "The Feature Speed Formula" (arXiv 2311.18718), the desiderata SP, FL, LD and BC.
    """
    widths, depths = _sizes("widths", widths), _sizes("depths", depths)
    if seeds < 2:
        raise ValueError(f"seeds: expected at least 2, as the scatter between them makes the intervals, got {seeds}")
    for name, number, least, most in (("tolerance", tolerance, 0.0, 1.0), ("confidence", confidence, 0.0, 1.0)):
        if not least < number < most:
            raise ValueError(f"{name}: expected a number between {least:g} and {most:g}, got {number}")
    if optimizer is not None:
        named(optimizer)
    stats()  # if scipy is missing, now rather than after the runs
    at_width = max(widths) if at_width is None else at_width
    at_depth = depths[len(depths) // 2] if at_depth is None else at_depth
    runs = [_Run("width", width, at_depth, seed) for width in widths for seed in range(seeds)]
    runs += [_Run("depth", at_width, depth, seed) for depth in depths for seed in range(seeds)]
    points: list[Point] = []
    name = ""
    done: dict[tuple[int, int, int], Point] = {}
    with torch.random.fork_rng():
        for number_done, run in enumerate(runs, 1):
            key = (run.width, run.depth, run.seed)
            if key not in done:
                parts = make(factory, run.width, run.depth, _seed(*key), optimizer, lr)
                name = type(parts.optimizer).__name__
                done[key] = check_point(parts, run.width, run.depth, run.seed, layers=layers, dtype=dtype)
            points.append(done[key].on(run.axis))
            if progress is not None:
                progress(number_done, len(runs))
    return ScalingReport(
        widths=tuple(widths),
        depths=tuple(depths),
        at_width=at_width,
        at_depth=at_depth,
        seeds=seeds,
        optimizer=name,
        tolerance=tolerance,
        confidence=confidence,
        points=tuple(points),
        verdicts=tuple(verdicts(points, seeds, name, tolerance, confidence)),
    )


def check_point(
    parts: Parts,
    width: int,
    depth: int,
    seed: int,
    *,
    layers: Selection = AUTO,
    dtype: torch.dtype | None = torch.float64,
) -> Point:
    """Measure the first step of one model. Neither the model nor its optimizer is changed.

    Raises:
        FactoryError: the model cannot be measured, or a number is not finite.
    """
    where = f"width {width}, depth {depth}, seed {seed}"
    try:
        lin = Linearization(parts.model, parts.loss_fn, parts.batch, layers=layers, dtype=dtype)
        groups = partition(lin)
        moves = updates_of(lin, optimizer=parts.optimizer)
        exact = optimizer_update(parts.optimizer, lin.originals, lin.gradients, dtype=torch.float64)
        after = lin.forward([p + d for p, d in zip(lin.parameters, moves, strict=True)])
    except (Exception, SystemExit) as error:  # loss_fn, model and optimizer are the caller's: whatever they raise
        raise FactoryError(f"{where}: {type(error).__name__}: {error}") from error
    lost = _lost(moves, exact)
    if lost > _LOST:
        raise FactoryError(
            f"{where}: the updates are lost in the rounding of the parameters, {lost:.0%} of their size: measure in "
            "float64 (dtype), or with larger learning rates"
        )
    hidden = groups.hidden
    visits = zip(lin.features[hidden], after.features[hidden], lin.backward[hidden], strict=True)
    stats = FeatureStats(over_visits(*zip(*visits, strict=True), first_order=False))
    decreases = update_stats(lin.gradients, moves).aligned_decrease.tolist()
    contributions = {name: sum(decreases[p] for p in members) for name, members in groups.groups.items()}
    change = float(after.loss.double() - lin.loss.double())
    cos = float(stats.cos_angle)
    sizes = [_rms(lin.features[layer]) for layer in range(hidden + 1)]
    point = Point(
        axis="",
        width=width,
        depth=depth,
        seed=seed,
        loss=float(lin.loss),
        decrease=-change,
        first_order_decrease=sum(decreases),
        feature_rms=sizes[-1],
        mean_feature_rms=math.exp(sum(math.log(s) for s in sizes) / len(sizes)) if min(sizes) > 0 else 0.0,
        update_rms=float(stats.update_rms),
        cos_angle=cos,
        sensitivity=float(stats.update_rms) / abs(change) if change else math.inf,
        contributions=contributions,
    )
    _finite(point, where)
    return point


def _finite(point: Point, where: str) -> None:
    numbers: Mapping[str, float] = {
        "the loss": point.loss,
        "the loss after the step": point.decrease,
        "rms of the features": point.feature_rms,
        "rms of the feature update": point.update_rms,
        "the first-order decrease": point.first_order_decrease,
    }
    for what, value in numbers.items():
        if not math.isfinite(value):
            raise FactoryError(f"{where}: {what} is not finite; is the learning rate too large?")
    if point.feature_rms == 0 or point.update_rms == 0:
        what = "features are all zero" if point.feature_rms == 0 else "features do not move in the step"
        raise FactoryError(f"{where}: the last hidden {what}; an output initialised to zero, or a learning rate of 0?")
    if point.decrease == 0:
        raise FactoryError(f"{where}: the loss does not change in the step; is the learning rate too small?")


def _lost(moves: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """How far updates are from those of a step in float64, relative to these, in the norm over all parameters."""
    error = sum(float((move.double() - wanted).square().sum()) for move, wanted in zip(moves, exact, strict=True))
    total = sum(float(wanted.square().sum()) for wanted in exact)
    return math.sqrt(error / total) if total else 0.0


def _rms(visits: Iterable[torch.Tensor]) -> float:
    kept = list(visits)
    return math.sqrt(sum(float(x.double().square().sum()) for x in kept) / sum(x.numel() for x in kept))


def _sizes(what: str, sizes: Sequence[int]) -> list[int]:
    found = sorted(set(sizes))
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in found):
        raise ValueError(f"{what}: expected integers of at least 1, got {list(sizes)}")
    if len(found) < 3:
        raise ValueError(f"{what}: an exponent with an interval takes at least 3 different {what}, got {found}")
    return found


def _seed(width: int, depth: int, seed: int) -> int:
    """Different for every point, so that their chance is independent."""
    return (seed * 1_000_003 + depth) * 1_000_003 + width
