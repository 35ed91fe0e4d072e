"""The first step of a scaling rule in theory, for wide networks, one row and a residual of 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fastfs.scaling._angle import predicted_cos_angle
from fastfs.scaling._fit import Exponent, fit_exponent
from fastfs.scaling._rules import Rule
from fastfs.scaling._tables import MLP_SCHEMES, mlp
from fastfs.scaling._verdicts import AXES, Verdict

__all__ = ["Prediction", "Sizes", "expected_exponents", "matching", "predict"]


@dataclass(frozen=True)
class Prediction:
    """The first step of plain gradient descent, to first order.

    Attributes:
        contributions: lr_l |g_l|^2 of every matrix, in units of the loss.
        decrease: their sum, the decrease of the loss.
        cos_angle: cosine of the angle at the last hidden features, before their ReLU in an MLP (a ResNet has no ReLU
            there).
        update_rms: rms of the update of these features, D_{L-1} / (sqrt(m) |b| cos(theta)).
        sensitivity: update_rms / decrease. After the ReLU of an MLP, as published, it is 1/sqrt(2) of that, because
            half of the units are active.
    """

    contributions: tuple[float, ...]
    decrease: float
    cos_angle: float
    update_rms: float
    sensitivity: float


class Sizes(NamedTuple):
    """The sizes of a scaling check."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    at_width: int
    at_depth: int


def predict(rule: Rule) -> Prediction:
    """Predict the first step for a rule of :func:`fastfs.scaling.mlp` or :func:`fastfs.scaling.resnet`.

    The sensitivity S of an MLP is that of the features before their ReLU, as in :mod:`fastfs.models`.

    Args:
        rule: the rule.

    Returns:
        Contributions, decrease, angle and feature speed.

    Source: the norms in the documentation of these two functions, and :func:`fastfs.scaling.predicted_cos_angle`.
    """
    first, last, width = rule.layers[0], rule.layers[-1], rule.layers[-1].columns
    beta = 1.0 if rule.branch_scale is None else rule.branch_scale
    norm_sq = 1.0 / first.std**2  # |x|^2
    active = 0.5 if rule.architecture == "mlp" else 1.0  # share of the last hidden features that reach the output
    backward_sq = last.std**2 * width * active
    inner = [first.lr * backward_sq * norm_sq]
    inner += [layer.lr * beta**2 * backward_sq * width / 2 for layer in rule.layers[1:-1]]
    output = last.lr * width * active
    decrease = sum(inner) + output
    cos = predicted_cos_angle(len(inner) - 1, branch_scale=beta, contributions=inner)
    speed = sum(inner) / (math.sqrt(width * backward_sq) * cos)
    return Prediction((*inner, output), decrease, cos, speed, speed / decrease)


def expected_exponents(scheme: str, sizes: Sizes) -> dict[tuple[str, str], float]:
    """Return the exponents of a scheme of :func:`fastfs.scaling.mlp` over given sizes.

    They are fitted to the predictions, because the powers of the table are not yet exact at small depths.

    Args:
        scheme: name of the scheme.
        sizes: sizes of the check.

    Returns:
        (quantity, axis) -> exponent.
    """
    runs = {"width": [(w, sizes.at_depth) for w in sizes.widths], "depth": [(sizes.at_width, d) for d in sizes.depths]}
    found = {}
    for axis in AXES:
        made = [predict(mlp(max(depth, 2), width, 1, scheme=scheme)) for width, depth in runs[axis]]
        numbers = [float(pair[AXES.index(axis)]) for pair in runs[axis]]
        for quantity, values in (
            ("feature speed", [p.update_rms for p in made]),
            ("loss decrease", [p.decrease for p in made]),
            ("sensitivity", [p.sensitivity for p in made]),
            ("cos(angle)", [p.cos_angle for p in made]),
        ):
            found[quantity, axis] = fit_exponent(numbers, values).exponent
    return found


def matching(found: Iterable[Verdict], sizes: Sizes, tolerance: float = 0.2) -> list[str]:
    """Return the schemes of :func:`fastfs.scaling.mlp` that match all exponents within interval or tolerance.

    The schemes differ by 0.5, so the tolerance is below half of that. Several may match a wide interval.

    Args:
        found: verdicts with fitted exponents.
        sizes: sizes of the check.
        tolerance: permitted deviation.

    Returns:
        Names of the schemes.
    """
    fits: Mapping[tuple[str, str], Exponent | None] = {(v.quantity, v.axis): v.fit for v in found}

    def near(fit: Exponent | None, expected: float) -> bool:
        return fit is not None and abs(fit.exponent - expected) <= max(fit.half_width, tolerance)

    expected = {name: expected_exponents(name, sizes) for name in MLP_SCHEMES}
    return [name for name, exponents in expected.items() if all(near(fits.get(k), e) for k, e in exponents.items())]
