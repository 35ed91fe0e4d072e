"""From measured points to exponents, and from exponents to desiderata that hold or not, with what to change."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastfs.scaling._fit import Exponent, Status, fit_exponent, judge
from fastfs.scaling._rendering import some

__all__ = ["AXES", "Point", "Verdict", "curvature", "verdicts"]

AXES = ("width", "depth")


@dataclass(frozen=True)
class Point:
    """One model at its first step.

    Attributes:
        axis: ``"width"`` or ``"depth"``: the sweep it belongs to.
        width, depth, seed: of the model.
        loss: before the step.
        decrease: loss before minus loss after the step.
        first_order_decrease: sum of <g, -dw>.
        feature_rms, mean_feature_rms: of the last hidden features; geometric mean over all watched hidden layers.
        update_rms: rms(df) of the last hidden features.
        cos_angle: of the angle between df and -b there.
        sensitivity: update_rms / |decrease|.
        contributions: group of parameters -> <g, -dw>, in the order of the signal.
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
        """The same point in the sweep of this axis."""
        return dataclasses.replace(self, axis=axis)

    @property
    def size(self) -> int:
        """Width or depth, whichever the sweep changes."""
        return self.width if self.axis == "width" else self.depth


@dataclass(frozen=True)
class Verdict:
    """One exponent and what it says.

    Attributes:
        desideratum: ``"SP"``, ``"FL"``, ``"LD"``, ``"BC"``, or empty for information.
        quantity: what was measured.
        axis: over which size.
        fit: the exponent; None where some values have no logarithm.
        status: None for information.
        seeds: about how many seeds would make an unclear one clear; inf if seeds alone will not.
        advice: what is wrong and what to change; empty where nothing is.
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
    """All exponents: the desiderata, then the angle for information.

    Feature learning is asked of the speed itself, and of the sensitivity, the speed per loss decrease. The second is
    much the less noisy, and a learning rate cannot mend it.
    """
    for axis in AXES:
        own = [p for p in points if p.axis == axis]
        sizes = [float(p.size) for p in own]

        def fit(values: Sequence[float], sizes: Sequence[float] = sizes, level: float = confidence) -> Exponent | None:
            return fit_exponent(sizes, values, confidence=level) if min(values) > 0 else None

        sensitivity = fit([p.sensitivity for p in own])
        assert sensitivity is not None  # positive, as the features move
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
            repair = "the step is far beyond first order; repeat with smaller learning rates"
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
    """Each group against its neighbours, the worst of them; and the later half of the groups against the earlier.

    Random matrices of finite width make contributions drift along the network, by chance; neighbours share the drift.
    """
    sizes = [float(p.size) for p in points]
    rising = sorted({name for p in points for name, c in p.contributions.items() if c <= 0})
    if rising:
        text = f"the updates of {some(rising)} do not lower the loss to first order: not trained, or not downhill"
        yield Verdict("BC", "contribution, worst group", axis, None, Status.FAIL, None, text)
        return
    names = _common(points)
    if names:
        level = 1 - (1 - confidence) / len(names)  # all intervals together at the level that is asked for
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
                    f"contribution of {name!r} against its neighbours",
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
        halves = [(c[-(len(c) // 2) :], c[: len(c) // 2]) for c in inner]  # medians: one odd group is no trend
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
    """Names of groups that stand at the same place, counted from the input or from the output, in all points."""
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
    """The contribution of a group over the median of the four nearest in the network."""
    names = list(point.contributions)
    at = names.index(name)
    others = sorted((i for i in range(len(names)) if i != at), key=lambda i: abs(i - at))[:4]
    return point.contributions[name] / math.exp(
        statistics.median(math.log(point.contributions[names[i]]) for i in others)
    )


def sensitivity_advice(axis: str, sensitivity: Exponent, optimizer: str) -> str:
    """What to multiply the output's scale and the learning rates by, so that S no longer goes with the size."""
    e = sensitivity.exponent
    rates = -2 * e if optimizer == "SGD" else -e  # contributions go like |b|^2 for SGD and |b| for Adam
    name = ""
    if abs(abs(e) - 0.5) < 0.4 and (e > 0) == (axis == "depth"):
        name = " (fsc)" if axis == "depth" else " (muP)"
    output, inner = _power(axis, e), _power(axis, rates)
    return f"multiply the output's std by {output} and the learning rates before it by {inner}{name}"


def curvature(points: Sequence[Point]) -> float:
    """Largest distance of the real from the first-order loss decrease, relative to the latter."""
    return max(abs(p.decrease / p.first_order_decrease - 1) if p.first_order_decrease else math.inf for p in points)


def _exponential(points: Sequence[Point]) -> str:
    """A word on features that grow or shrink by a factor a layer."""
    if points[0].axis != "depth":
        return ""
    x, y = [float(p.depth) for p in points], [math.log(p.feature_rms) for p in points]
    if len(set(y)) == 1:  # normalised features
        return ""
    straight, power = statistics.correlation(x, y), statistics.correlation([math.log(v) for v in x], y)
    rate = statistics.linear_regression(x, y).slope
    if abs(straight) <= abs(power) or abs(rate) * (max(x) - min(x)) < 2:
        return ""
    return f"; it is a factor of {math.exp(rate):.2f} a layer rather than a power"


def _grows(quantity: str, axis: str, fit: Exponent, advice: str) -> str:
    verb = "grows" if fit.exponent > 0 else "falls"
    return f"{quantity} {verb} like {_power(axis, fit.exponent)}: {advice}"


def _power(axis: str, exponent: float) -> str:
    return f"{axis}^{exponent:+.2f}"
