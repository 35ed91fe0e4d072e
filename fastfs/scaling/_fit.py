"""Exponents of power laws with confidence intervals, and their comparison with a target exponent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fastfs._utils.extras import load

__all__ = ["Exponent", "Status", "fit_exponent", "judge"]


def stats() -> Any:
    """Import ``scipy.stats``.

    Returns:
        The module.

    Raises:
        ImportError: scipy is not installed.
    """
    return load("scipy.stats", "scaling", "a fit of exponents")


class Status(str, Enum):
    """The result of comparing a confidence interval with a target exponent."""

    PASS = "PASS"
    UNCLEAR = "UNCLEAR"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Exponent:
    """The fit ``value = constant * size^exponent``.

    Attributes:
        exponent: slope in logarithmic coordinates.
        low: lower end of the confidence interval.
        high: upper end of the confidence interval.
        constant: value at size 1.
        points: number of measurements.
        sizes: number of different sizes.
        confidence: level of the interval, such as 0.95.
        blocks: number of blocks of measurements with a constant each.
    """

    exponent: float
    low: float
    high: float
    constant: float
    points: int
    sizes: int
    confidence: float
    blocks: int = 1

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2

    def at(self, confidence: float) -> Exponent:
        """Return the same fit with an interval of another level.

        Args:
            confidence: level, in (0, 1).

        Returns:
            The fit.

        Raises:
            ImportError: scipy is not installed.
        """
        quantiles = stats().t.ppf([(1 + confidence) / 2, (1 + self.confidence) / 2], self.points - self.blocks - 1)
        half = self.half_width * float(quantiles[0] / quantiles[1])
        low, high = self.exponent - half, self.exponent + half
        return dataclasses.replace(self, low=low, high=high, confidence=confidence)

    def __str__(self) -> str:
        return f"{self.exponent:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def fit_exponent(
    sizes: Sequence[float],
    values: Sequence[float],
    *,
    confidence: float = 0.95,
    blocks: Sequence[object] | None = None,
) -> Exponent:
    """Fit an exponent by least squares of log(value) on log(size), with Student's t for the interval.

    Variation over seeds at one size and deviations from a power law both widen the interval.

    Args:
        sizes: widths or depths, positive, one per measurement.
        values: measured values, positive.
        confidence: level of the interval, in (0, 1).
        blocks: one label per measurement; measurements with the same label have a constant of their own, as those of
            one depth do in a fit over width. By default, all measurements share one constant.

    Returns:
        The exponent with its interval.

    Raises:
        ImportError: scipy is not installed.
        ValueError: there are fewer than three different sizes, the lists differ in length, there are too few
            measurements for the number of blocks, or a number is not positive and finite, so that it has no logarithm.

    Source: ordinary least squares with Student's t interval.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
    if len(sizes) != len(values):
        raise ValueError(f"expected a value for every size, got {len(values)} values and {len(sizes)} sizes")
    different = len(set(sizes))
    if different < 3:
        raise ValueError(f"an exponent with an interval requires at least 3 different sizes, got {sorted(set(sizes))}")
    for what, numbers in (("size", sizes), ("value", values)):
        wrong = [x for x in numbers if not (math.isfinite(x) and x > 0)]
        if wrong:
            raise ValueError(f"expected positive finite {what}s, got {wrong[0]}")
    labels = [None] * len(sizes) if blocks is None else list(blocks)
    if len(labels) != len(sizes):
        raise ValueError(f"expected a block for every size, got {len(labels)} blocks and {len(sizes)} sizes")
    number, x, y = len(set(labels)), [math.log(s) for s in sizes], [math.log(v) for v in values]
    freedom = len(sizes) - number - 1
    if freedom < 1:
        raise ValueError(f"expected at least {number + 2} measurements in {number} blocks, got {len(sizes)}")
    inner = _centered(x, labels)
    if not any(inner):
        raise ValueError("expected different sizes within a block, got one size in each")
    outer = _centered(y, labels)
    square = math.fsum(a * a for a in inner)
    slope = math.fsum(a * b for a, b in zip(inner, outer, strict=True)) / square
    rest = math.fsum((b - slope * a) ** 2 for a, b in zip(inner, outer, strict=True))
    half = float(stats().t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(rest / freedom / square)
    constant = math.exp(math.fsum(y) / len(y) - slope * math.fsum(x) / len(x))
    return Exponent(slope, slope - half, slope + half, constant, len(sizes), different, confidence, number)


def _centered(values: Sequence[float], labels: Sequence[object]) -> list[float]:
    """Subtract the mean of the own block."""
    members: dict[object, list[float]] = {}
    for value, label in zip(values, labels, strict=True):
        members.setdefault(label, []).append(value)
    means = {label: math.fsum(own) / len(own) for label, own in members.items()}
    return [value - means[label] for value, label in zip(values, labels, strict=True)]


def judge(fit: Exponent, wanted: float = 0.0, tolerance: float = 0.15) -> tuple[Status, float | None]:
    """Decide whether the interval lies within the tolerance of the target exponent, outside of it, or neither.

    A check evaluates about a dozen intervals, some of which miss the true exponent by chance. For FAIL, the interval
    therefore has to lie outside at a twentieth of the error probability too: at 99.75% for a level of 95%.

    Args:
        fit: the fitted exponent.
        wanted: target exponent.
        tolerance: permitted deviation.

    Returns:
        The status, and the factor by which the number of measurements has to grow for an unclear result to become
        clear, or None if it is clear. The interval shrinks with the square root of their number until it lies on one
        side of the nearest end of the tolerance.
    """
    low, high = wanted - tolerance, wanted + tolerance
    if low <= fit.low and fit.high <= high:
        return Status.PASS, None
    sure = fit.at(1 - (1 - fit.confidence) / 20)
    if sure.high < low or sure.low > high:
        return Status.FAIL, None
    inside = low < fit.exponent < high
    half = fit.half_width if inside else sure.half_width
    room = min(abs(fit.exponent - low), abs(fit.exponent - high))
    return Status.UNCLEAR, (half / room) ** 2 if room > 0 else math.inf
