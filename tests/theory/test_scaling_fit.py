"""Exponents, their intervals and their assessment."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from fastfs.scaling._fit import Exponent, Status, fit_exponent, judge


def test_an_exact_power_is_found() -> None:
    sizes = [64, 128, 256, 512]
    fit = fit_exponent(sizes, [3 * s**-0.5 for s in sizes])
    assert fit.exponent == pytest.approx(-0.5)
    assert fit.constant == pytest.approx(3)
    assert fit.high - fit.low < 1e-6
    assert (fit.points, fit.sizes) == (4, 4)


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_intervals_hold_the_truth_as_often_as_they_say(confidence: float) -> None:
    """Coverage of 400 fits to noise around a power law, within four standard deviations of a binomial."""
    rng = np.random.default_rng(0)
    sizes = [s for s in (4, 8, 16) for _ in range(3)]
    times, held = 400, 0
    for _ in range(times):
        noise = np.exp(0.3 * rng.standard_normal(len(sizes)))
        fit = fit_exponent(sizes, [s**0.7 * n for s, n in zip(sizes, noise, strict=True)], confidence=confidence)
        held += fit.low <= 0.7 <= fit.high
    assert abs(held / times - confidence) < 4 * math.sqrt(confidence * (1 - confidence) / times)


def interval(low: Any, high: Any, points: int = 100) -> Any:
    return Exponent((low + high) / 2, low, high, 1.0, points, 3, 0.95)


def test_an_interval_at_another_level() -> None:
    rng = np.random.default_rng(1)
    sizes = [4, 8, 16, 32] * 3
    values = np.exp(rng.standard_normal(12)).tolist()
    wide, narrow = (fit_exponent(sizes, values, confidence=c) for c in (0.99, 0.9))
    assert narrow.at(0.99).low == pytest.approx(wide.low)
    assert wide.at(0.9).high == pytest.approx(narrow.high)


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [
        (-0.1, 0.1, Status.PASS),
        (-0.15, 0.15, Status.PASS),
        (0.4, 0.9, Status.FAIL),
        (-0.9, -0.4, Status.FAIL),
        (0.16, 0.9, Status.UNCLEAR),  # outside, but only just
        (-0.2, 0.1, Status.UNCLEAR),
        (0.1, 0.9, Status.UNCLEAR),
        (-2.0, 2.0, Status.UNCLEAR),
    ],
)
def test_verdicts(low: float, high: float, status: Any) -> None:
    found, factor = judge(interval(low, high), 0.0, 0.15)
    assert found is status
    assert (factor is None) == (status is not Status.UNCLEAR)


def test_wanted_shifts_the_verdict() -> None:
    assert judge(interval(0.45, 0.55), 0.5, 0.15)[0] is Status.PASS
    assert judge(interval(0.45, 0.55), 0.0, 0.15)[0] is Status.FAIL


@pytest.mark.parametrize("centre", [0.05, 0.4])
def test_that_many_more_measurements_make_it_clear(centre: float) -> None:
    _, factor = judge(interval(centre - 0.5, centre + 0.5))
    for times, clear in ((factor * 1.01, True), (factor * 0.99, False)):
        half = 0.5 / math.sqrt(times)
        assert (judge(interval(centre - half, centre + half))[0] is not Status.UNCLEAR) == clear


def test_few_points_take_much_to_fail() -> None:
    assert judge(interval(0.4, 0.9, points=100))[0] is Status.FAIL
    assert judge(interval(0.4, 0.9, points=4))[0] is Status.UNCLEAR


def test_on_the_edge_no_number_will_do() -> None:
    assert judge(interval(-0.25, 0.25), 0.0, 0.0)[1] == math.inf


@pytest.mark.parametrize(
    ("sizes", "values", "message"),
    [
        ([64, 128], [1, 1], "at least 3 different sizes"),
        ([64, 64, 128], [1, 1, 1], "at least 3 different sizes"),
        ([64, 128, 256], [1, 1], "a value for every size"),
        ([64, 128, 256], [1, 0, 1], "positive finite values, got 0"),
        ([64, 128, 256], [1, math.nan, 1], "positive finite values, got nan"),
        ([0, 128, 256], [1, 1, 1], "positive finite sizes"),
    ],
)
def test_errors(sizes: list[Any], values: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_exponent(sizes, values)


def test_confidence_is_in_range() -> None:
    with pytest.raises(ValueError, match="confidence"):
        fit_exponent([1, 2, 3], [1, 1, 1], confidence=95)


MISSING = """
import sys
for name in ("scipy", "scipy.stats", "pandas", "matplotlib"):
    sys.modules[name] = None
from fastfs import scaling
from fastfs.models import MLP
rule = scaling.mlp(4, 8, 3)
scaling.apply(MLP(3, 8, 4), rule)
for call in (lambda: scaling.fit_exponent([1, 2, 3], [1, 1, 1]), rule.to_frame):
    try:
        call()
    except ImportError as error:
        print(error)
"""


def test_what_is_missing_is_named_where_it_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        'a fit of exponents needs scipy: pip install "fastfs[scaling]"',
        'a table needs pandas: pip install "fastfs[pandas]"',
    ]
