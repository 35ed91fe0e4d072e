"""Data types of a figure: how to compute and draw it, and the values to compare with published ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Advance", "ComputedFigure", "Outcome", "Study", "StudySettings", "Value", "over_seeds", "slope"]

Advance = Callable[[float], None]
"""Called with the fraction of a figure's work done since the last call."""

T = TypeVar("T")


@dataclass(frozen=True)
class StudySettings:
    """Sizes and seeds of a run: ``quick`` selects small sizes, ``seeds`` overrides each figure's number of seeds."""

    quick: bool = False
    first_seed: int = 0
    seeds: int | None = None

    def pick(self, full: T, quick: T) -> T:
        """Return the value for the selected size."""
        return quick if self.quick else full

    def seed_list(self, full: int, quick: int) -> list[int]:
        """Return the seeds, given the default numbers of a figure at both sizes."""
        count = self.pick(full, quick) if self.seeds is None else self.seeds
        return list(range(self.first_seed, self.first_seed + count))


@dataclass(frozen=True)
class Value:
    """A computed number with its standard error (or half a confidence interval, if ``note`` says so)."""

    mean: float
    error: float = float("nan")
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """The rows of a figure, and its headline numbers by name."""

    table: pandas.DataFrame
    values: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A figure: its name on the command line, title, caption, and functions that compute and draw it."""

    name: str
    title: str
    caption: str
    compute: Callable[[StudySettings, Advance], Outcome]
    draw: Callable[[pandas.DataFrame], Figure]


@dataclass(frozen=True)
class ComputedFigure:
    """A computed figure: its outcome, the PNG image, and the seconds that both took."""

    outcome: Outcome
    image: bytes
    seconds: float


def over_seeds(samples: Sequence[float] | np.ndarray) -> Value:
    """Return mean and standard error of independent samples; the error of a single sample is NaN."""
    values = np.asarray(samples, dtype=np.float64)
    error = float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else float("nan")
    return Value(float(values.mean()), error)


def slope(x: np.ndarray, y: np.ndarray) -> Value:
    """Fit the exponent p of y ~ x^p, with half of its 95 % confidence interval.

    Every seed gives one least-squares line of log y over log x, and Student's t is applied over seeds: points of one
    network are correlated, seeds are not.

    Args:
        x: (points,), positive.
        y: (seeds, points), positive; at least two seeds for an interval.

    Returns:
        The exponent.

    Raises:
        ValueError: a number is not positive.
    """
    from scipy.stats import t

    if np.any(x <= 0) or np.any(~(y > 0)):
        raise ValueError("slope: expected positive numbers")
    slopes = np.polyfit(np.log(x), np.log(y).T, 1)[0]
    value = over_seeds(slopes)
    return Value(value.mean, value.error * float(t.ppf(0.975, len(slopes) - 1)), "95 % interval")
