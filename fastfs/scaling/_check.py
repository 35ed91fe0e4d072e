"""Check whether a model keeps its desiderata over width and depth, from the first step of any model and optimizer."""

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


_LOST = 0.5  # permitted share of an update lost in rounding; at a third, the feature speed is off by some percent


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
    """Run a model over widths and depths, fit exponents, and report which desiderata hold.

    At every size, one step is measured: signal propagation (rms of the features of the last hidden layer and over all
    layers), feature learning (rms of their update), loss decay, and balanced contributions (<g, -dw> of each group of
    parameters against its neighbors in the network). Each should scale as size^0. An exponent passes if its confidence
    interval lies within the tolerance, fails if it lies outside, and is unclear otherwise.

    Args:
        factory: ``factory(width, depth) -> (model, loss_fn, batch, optimizer)``. ``loss_fn(model, batch)`` returns a
            scalar. ``optimizer`` is a ``torch.optim.Optimizer`` of the model, a list of parameter groups, or None; in
            the last two cases, an optimizer is created from the ``optimizer`` and ``lr`` arguments of this function.
            torch's generator is seeded before every call; the data should not depend on the sizes. Learning rates small
            enough for first order measure the scaling alone; larger ones include curvature.
        widths: at least three different widths, run at ``at_depth``.
        depths: at least three different depths, run at ``at_width``.
        seeds: number of initializations per size, at least 2. Small batches and deep, narrow networks need many.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``, for factories that return parameter groups or None; None means
            ``"sgd"``.
        lr: learning rate of groups that have none.
        layers: the layers, as for :class:`fastfs.Monitor`.
        at_width: None means the largest width, where fluctuations are smallest.
        at_depth: None means the middle one of the depths.
        tolerance: permitted deviation of an exponent from 0.
        confidence: level of the intervals.
        dtype: dtype of forwards, gradients and the step; None uses the model's own, in which small updates can be lost.
        progress: called with the number of measured points and the total.

    Returns:
        Measurements, exponents and verdicts.

    Raises:
        ImportError: scipy is not installed.
        FactoryError: (a ``ValueError``) the factory fails or returns something else, both it and the caller give an
            optimizer or learning rate, updates are lost in the rounding of parameters, or a loss or feature is not
            finite.
        ValueError: there are fewer than three sizes or two seeds, a size is below 1, or the optimizer is unknown.

    Source: "The Feature Speed Formula" (arXiv 2311.18718), the desiderata SP, FL, LD and BC.
    """
    widths, depths = _sizes("widths", widths), _sizes("depths", depths)
    if seeds < 2:
        raise ValueError(f"seeds: expected at least 2, because intervals come from their variance, got {seeds}")
    for name, number, least, most in (("tolerance", tolerance, 0.0, 1.0), ("confidence", confidence, 0.0, 1.0)):
        if not least < number < most:
            raise ValueError(f"{name}: expected a number between {least:g} and {most:g}, got {number}")
    if optimizer is not None:
        named(optimizer)
    stats()  # report a missing scipy before the runs rather than after
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

    Args:
        parts: model, loss function, batch and optimizer.
        width: width of the model, for the result.
        depth: depth of the model, for the result.
        seed: index of the initialization, for the result.
        layers: the layers, as for :class:`fastfs.Monitor`.
        dtype: dtype to compute in; None uses the model's own.

    Returns:
        The measurement, in units of the features and of the loss.

    Raises:
        FactoryError: the model cannot be measured, or a number is not finite.

    Source: "The Feature Speed Formula" (arXiv 2311.18718), the desiderata SP, FL, LD and BC.
    """
    where = f"width {width}, depth {depth}, seed {seed}"
    try:
        lin = Linearization(parts.model, parts.loss_fn, parts.batch, layers=layers, dtype=dtype)
        groups = partition(lin)
        moves = updates_of(lin, optimizer=parts.optimizer)
        exact = optimizer_update(parts.optimizer, lin.originals, lin.gradients, dtype=torch.float64)
        after = lin.forward([p + d for p, d in zip(lin.parameters, moves, strict=True)])
    except (Exception, SystemExit) as error:  # user code in loss_fn, model or optimizer may raise anything
        raise FactoryError(f"{where}: {type(error).__name__}: {error}") from error
    lost = _lost(moves, exact)
    if lost > _LOST:
        raise FactoryError(
            f"{where}: the updates are lost in the rounding of the parameters, {lost:.0%} of their size: measure in "
            "float64 (dtype), or use larger learning rates"
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
        raise FactoryError(f"{where}: the last hidden {what}; an output initialized to zero, or a learning rate of 0?")
    if point.decrease == 0:
        raise FactoryError(f"{where}: the loss does not change in the step; is the learning rate too small?")


def _lost(moves: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Return the relative distance of the updates from those of a step in float64, in the norm over all parameters."""
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
        raise ValueError(f"{what}: an exponent with an interval requires at least 3 different {what}, got {found}")
    return found


def _seed(width: int, depth: int, seed: int) -> int:
    """Return a seed that differs between points, so that their initializations are independent."""
    return (seed * 1_000_003 + depth) * 1_000_003 + width
