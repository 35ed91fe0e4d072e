"""Fit exponents to measurements, decide which desiderata hold, and suggest what to change."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastfs.scaling._fit import Exponent, Status, fit_exponent, judge
from fastfs.scaling._rendering import some

__all__ = ["AXES", "DESIDERATA", "Point", "Verdict", "curvature", "verdicts"]

AXES = ("width", "depth")

DESIDERATA = ("SP", "FL", "LD", "BC")
"""Feature size, feature speed, loss decrease and balanced contributions."""


@dataclass(frozen=True)
class Point:
    """The measurement of one model at its first step.

    Attributes:
        axis: ``"width"`` or ``"depth"``: the axis whose sweep the point belongs to.
        width: width of the model.
        depth: depth of the model.
        seed: index of the initialization.
        loss: loss before the step.
        decrease: loss before minus loss after the step.
        first_order_decrease: sum of <g, -dw>.
        feature_rms: rms of the last hidden features.
        mean_feature_rms: geometric mean of the rms over all watched hidden layers.
        update_rms: rms(df) of the last hidden features.
        cos_angle: cosine of the angle between df and -b there.
        sensitivity: update_rms / |decrease|.
        contributions: group of parameters -> <g, -dw>, in the order of the forward.
    """

    axis: str
    width: int
    depth: int
    seed: int
    loss: float
    decrease: float
    first_order_decrease: float
    feature_rms: float
    mean_feature_rms: float
    update_rms: float
    cos_angle: float
    sensitivity: float
    contributions: Mapping[str, float]

    def on(self, axis: str) -> Point:
        """Return the same point as part of the sweep over another axis.

        Args:
            axis: ``"width"`` or ``"depth"``.

        Returns:
            A new point.
        """
        return dataclasses.replace(self, axis=axis)

    @property
    def size(self) -> int:
        """The width or depth, whichever the sweep varies."""
        return self.width if self.axis == "width" else self.depth


@dataclass(frozen=True)
class Verdict:
    """A fitted exponent and its status.

    Attributes:
        desideratum: ``"SP"``, ``"FL"``, ``"LD"``, ``"BC"``, or empty for information.
        quantity: measured quantity.
        axis: ``"width"`` or ``"depth"``.
        fit: the exponent; None if some values have no logarithm.
        status: the status; None for information.
        seeds: approximate number of seeds that would make an unclear status clear; inf if seeds alone will not.
        advice: what is wrong and what to change; empty if nothing is.
    """

    desideratum: str
    quantity: str
    axis: str
    fit: Exponent | None
    status: Status | None
    seeds: float | None = None
    advice: str = ""


def verdicts(
    points: Sequence[Point], seeds: int, optimizer: str, tolerance: float, confidence: float
) -> Iterable[Verdict]:
    """Return all exponents: the desiderata, then the angle for information.

    Feature learning is checked for the feature speed and for the sensitivity, the speed per loss decrease. The latter
    is much less noisy, and cannot be corrected by learning rates.

    Args:
        points: all measurements.
        seeds: number of initializations per size.
        optimizer: name of the optimizer class.
        tolerance: permitted deviation of an exponent from 0.
        confidence: level of the intervals.

    Yields:
        Verdicts, in the order of the report.
    """
    for axis in AXES:
        own = [p for p in points if p.axis == axis]
        sizes = [float(p.size) for p in own]

        def fit(values: Sequence[float], sizes: Sequence[float] = sizes, level: float = confidence) -> Exponent | None:
            return fit_exponent(sizes, values, confidence=level) if min(values) > 0 else None

        sensitivity = fit([p.sensitivity for p in own])
        assert sensitivity is not None  # positive, because the features move
        cosine = fit([p.cos_angle for p in own])

        def wanted(desideratum: str, quantity: str, values: Sequence[float], advice: str, axis: str = axis) -> Verdict:
            found = fit(values)
            if found is None:
                bad = sum(v <= 0 for v in values)
                message = f"{quantity} is not positive in {bad} of {len(values)} runs over {axis}: {advice}"
                return Verdict(desideratum, quantity, axis, None, Status.FAIL, None, message)
            status, factor = judge(found, 0.0, tolerance)
            text = _grows(quantity, axis, found, advice) if status is Status.FAIL else ""
            return Verdict(desideratum, quantity, axis, found, status, None if factor is None else seeds * factor, text)

        size_advice = (
            "scale residual branches by 1/sqrt(depth), and matrices by sqrt(2/fan_in) before a ReLU"
            if axis == "depth"
            else "initial std should fall like 1/sqrt(fan_in)"
        )
        per_layer = [p.mean_feature_rms for p in own]
        size = wanted("SP", "feature size", [p.feature_rms for p in own], size_advice)
        if size.status is Status.FAIL and size.fit is not None:
            size = dataclasses.replace(size, advice=size.advice + _exponential(own))
        yield size
        yield wanted("SP", "feature size, mean of layers", per_layer, size_advice)
        decrease = wanted("LD", "loss decrease", [p.decrease for p in own], "smaller learning rates")
        if decrease.status is Status.FAIL and decrease.fit is not None:
            power = _power(axis, -decrease.fit.exponent)
            text = _grows("loss decrease", axis, decrease.fit, f"multiply all learning rates by {power}")
            decrease = dataclasses.replace(decrease, advice=text)
        speed = wanted("FL", "feature speed", [p.update_rms for p in own], "")
        if speed.status is Status.FAIL and speed.fit is not None:
            repair = "the step is far beyond first order; repeat the check with smaller learning rates"
            if curvature(own) <= 1:
                right = judge(sensitivity, 0.0, tolerance)[0] is Status.PASS
                repair = "as the loss decrease (LD) does" if right else "see the sensitivity"
            text = _grows("feature speed", axis, speed.fit, repair)
            speed = dataclasses.replace(speed, advice=text)
        yield speed
        repair = sensitivity_advice(axis, sensitivity, optimizer)
        yield wanted("FL", "sensitivity", [p.sensitivity for p in own], repair)
        yield decrease
        yield from _balance(own, axis, seeds, tolerance, confidence)
        yield Verdict("", "cos(angle)", axis, cosine, None)


def _balance(points: Sequence[Point], axis: str, seeds: int, tolerance: float, confidence: float) -> Iterable[Verdict]:
    """Yield the verdict on the worst group against its neighbors, and on the later against the earlier half of groups.

    Random matrices of finite width let contributions drift along the network by chance; neighbors share this drift.
    """
    sizes = [float(p.size) for p in points]
    rising = sorted({name for p in points for name, c in p.contributions.items() if c <= 0})
    if rising:
        text = f"the updates of {some(rising)} do not decrease the loss to first order: not trained, or not a descent"
        yield Verdict("BC", "contribution, worst group", axis, None, Status.FAIL, None, text)
        return
    names = _common(points)
    if names:
        level = 1 - (1 - confidence) / len(names)  # Bonferroni: all intervals together have the requested level
        fits = {name: fit_exponent(sizes, [_relative(p, name) for p in points], confidence=level) for name in names}
        judged = {name: judge(fit, 0.0, tolerance) for name, fit in fits.items()}
        order = [Status.PASS, Status.UNCLEAR, Status.FAIL]
        worst = max(names, key=lambda name: (order.index(judged[name][0]), abs(fits[name].exponent)))
        status, factor = judged[worst]
        text = ""
        if status is Status.FAIL:
            failed = [name for name in names if judged[name][0] is Status.FAIL]
            failed.sort(key=lambda name: -abs(fits[name].exponent))
            text = "; ".join(
                _grows(
                    f"contribution of {name!r} against its neighbors",
                    axis,
                    fits[name],
                    f"multiply its learning rate by {_power(axis, -fits[name].exponent)}",
                )
                for name in failed[:3]
            ) + (f"; {len(failed)} groups in all" if len(failed) > 3 else "")
        quantity = f"contribution, worst group ({worst})"
        yield Verdict("BC", quantity, axis, fits[worst], status, None if factor is None else seeds * factor, text)
    inner = [list(p.contributions.values())[1:-1] for p in points]
    if min(map(len, inner)) >= 2:
        halves = [(c[-(len(c) // 2) :], c[: len(c) // 2]) for c in inner]  # medians are robust to one odd group
        ratios = [statistics.median(later) / statistics.median(earlier) for later, earlier in halves]
        fit = fit_exponent(sizes, ratios, confidence=confidence)
        status, factor = judge(fit, 0.0, tolerance)
        text = ""
        if status is Status.FAIL:
            advice = "gradients grow or shrink along the network; learning rates of 1/|g|^2 per layer, or repair SP"
            text = _grows("contribution of later against earlier groups", axis, fit, advice)
        quantity = "contribution, later / earlier"
        yield Verdict("BC", quantity, axis, fit, status, None if factor is None else seeds * factor, text)


def _common(points: Sequence[Point]) -> list[str]:
    """Return the names of groups that have the same position, from the input or from the output, in all points."""
    orders = [list(p.contributions) for p in points]
    shared = [name for name in orders[0] if all(name in order for order in orders)]

    def same(places: set[int]) -> bool:
        return len(places) == 1

    return [
        name
        for name in shared
        if same({order.index(name) - len(order) for order in orders})
        or (same({order.index(name) for order in orders}) and all(order[-1] != name for order in orders))
    ]


def _relative(point: Point, name: str) -> float:
    """Return the contribution of a group relative to the median of the four nearest groups."""
    names = list(point.contributions)
    at = names.index(name)
    others = sorted((i for i in range(len(names)) if i != at), key=lambda i: abs(i - at))[:4]
    return point.contributions[name] / math.exp(
        statistics.median(math.log(point.contributions[names[i]]) for i in others)
    )


def sensitivity_advice(axis: str, sensitivity: Exponent, optimizer: str) -> str:
    """Return the factors of output scale and learning rates that make S independent of the size.

    Args:
        axis: ``"width"`` or ``"depth"``.
        sensitivity: fitted exponent of S.
        optimizer: name of the optimizer class.

    Returns:
        A clause for the advice.
    """
    e = sensitivity.exponent
    rates = -2 * e if optimizer == "SGD" else -e  # contributions go like |b|^2 for SGD and |b| for Adam
    name = ""
    if abs(abs(e) - 0.5) < 0.4 and (e > 0) == (axis == "depth"):
        name = " (fsc)" if axis == "depth" else " (muP)"
    output, inner = _power(axis, e), _power(axis, rates)
    return f"multiply the output's std by {output} and the learning rates before it by {inner}{name}"


def curvature(points: Sequence[Point]) -> float:
    """Return the largest deviation of the actual from the first-order loss decrease, relative to the latter."""
    return max(abs(p.decrease / p.first_order_decrease - 1) if p.first_order_decrease else math.inf for p in points)


def _exponential(points: Sequence[Point]) -> str:
    """Return a clause on features that grow or shrink by a constant factor per layer, or an empty string."""
    if points[0].axis != "depth":
        return ""
    x, y = [float(p.depth) for p in points], [math.log(p.feature_rms) for p in points]
    if len(set(y)) == 1:  # normalized features
        return ""
    straight, power = statistics.correlation(x, y), statistics.correlation([math.log(v) for v in x], y)
    rate = statistics.linear_regression(x, y).slope
    if abs(straight) <= abs(power) or abs(rate) * (max(x) - min(x)) < 2:
        return ""
    return f"; it changes by a factor of {math.exp(rate):.2f} per layer rather than as a power"


def _grows(quantity: str, axis: str, fit: Exponent, advice: str) -> str:
    verb = "grows" if fit.exponent > 0 else "falls"
    return f"{quantity} {verb} like {_power(axis, fit.exponent)}: {advice}"


def _power(axis: str, exponent: float) -> str:
    return f"{axis}^{exponent:+.2f}"
