"""The factor within which speeds are of their predictions: what is compared, what follows, what is unknown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastfs._record.reading.confidence import LARGEST_FACTOR, WINDOW, Backtest, factor, factors, overall_factor
from fastfs._record.reading.latest import LatestRun
from fastfs._record.reading.load import load
from fastfs._record.schema import Checker
from fastfs._report.page import page_data
from tests.helpers import report_cases as cases
from tests.report.test_report_page import column


def steps(backtest: Backtest, *rows: tuple[float, float, bool, bool]) -> list[float]:
    """Adds steps of one layer. Returns the comparisons."""
    added = [[np.array([value]) for value in row] for row in rows]
    return [float(backtest.add(*row)[0]) for row in added]


def test_a_comparison_is_the_formula_with_the_angle_before() -> None:
    """D, |b| and the angle give the measured speed; D, |b| and the angle before give the prediction."""
    backward, speed, residual, cosine, before = 3.0, 0.2, 0.25, 0.1, 0.3
    decrease = (1 - residual) * cosine * backward * speed
    predicted = decrease / (before * backward)
    found = steps(Backtest(), (before, 0.0, True, True), (cosine, residual, True, True))
    assert math.isnan(found[0])
    assert found[1] == pytest.approx(speed / predicted)


def test_what_cannot_be_compared() -> None:
    usual = (0.5, 0.0, True, True)
    assert steps(Backtest(), usual, usual)[1] == 1
    assert math.isnan(steps(Backtest(), usual, (0.5, 0.0, False, True))[1])  # not valid
    assert math.isnan(steps(Backtest(), usual, (0.5, 1.5, True, False))[1])  # D is negative: no prediction
    assert math.isnan(steps(Backtest(), usual, (0.5, 1.0, True, False))[1])  # D is 0
    assert math.isnan(steps(Backtest(), usual, (0.5, math.nan, True, True))[1])  # not a cut
    assert math.isnan(steps(Backtest(), usual, (math.nan, 0.0, True, True))[1])
    assert math.isnan(steps(Backtest(), (-0.5, 0.0, True, True), usual)[1])  # the angle before is above 90 degrees


def test_the_angle_is_the_last_one_that_predictions_use() -> None:
    found = steps(
        Backtest(),
        (0.5, 0.0, True, True),
        (0.1, 0.0, False, True),  # not valid: not compared, not used
        (0.2, 0.0, True, False),  # not linear: compared, not used
        (0.4, 0.0, True, True),
        (0.8, 0.0, True, True),
    )
    assert found[2:] == pytest.approx([0.5 / 0.2, 0.5 / 0.4, 0.4 / 0.8])


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([], math.nan),
        ([1.0, 2.0, 1.1], math.nan),  # at least 4
        ([1.0, 0.5, 1.1, math.nan], math.nan),
        ([1.0, 0.25, 1.1, 3.0], 4.0),  # 80 % of 5 is the 4th of them
        ([1.0, 0.25, 1.1, 3.0, math.nan], 4.0),
        ([1.2**k for k in range(9)], 1.2**7),  # 80 % of 10 is the 8th
        ([1.0] * 4, 1.0),
    ],
)
def test_the_factor_holds_the_next_comparison_with_80_percent(ratios: list[float], expected: float) -> None:
    assert factor(np.array([ratios])).tolist() == pytest.approx([expected], nan_ok=True)


@pytest.mark.parametrize("count", [4, 7, 19, 20])
def test_the_probability_is_at_least_80_percent(count: int) -> None:
    random = np.random.default_rng(count)
    drawn = np.exp(random.standard_t(2, (20_000, count + 1)))
    inside = np.abs(np.log(drawn[:, -1])) <= np.log(factor(drawn[:, :-1]))
    assert 0.79 <= inside.mean() <= 0.8 + 1 / (count + 1) + 0.01


def test_factors_of_all_predictions_are_those_of_their_windows() -> None:
    random = np.random.default_rng(0)
    ratios = np.exp(random.normal(size=(3, 1300)))
    ratios[random.random(ratios.shape) < 0.4] = np.nan
    measured = np.arange(0, 6500, 5)
    at = np.sort(random.choice(np.setdiff1d(np.arange(-3, 6600), measured), 700, replace=False))
    found = factors(ratios, measured, at)
    for i, step in enumerate(at):
        known = ratios[:, measured < step][:, -WINDOW:]
        assert found[:, i] == pytest.approx(factor(known), nan_ok=True)
    assert factors(ratios[:, :0], measured[:0], at).shape == (3, 700)
    assert factors(ratios, measured, at[:0]).shape == (3, 0)


def test_the_overall_factor() -> None:
    ratios = np.array([[1.0, 2.0, 0.25, np.nan], [1.0, 1.1, 1.0, 8.0]])
    assert overall_factor(ratios) == (pytest.approx(4.0), 7)
    within, count = overall_factor(np.full((2, 3), np.nan))
    assert math.isnan(within)
    assert count == 0


def test_the_page_and_the_table_of_watch_know_the_same(tmp_path: Path) -> None:
    lines = cases.run_lines(6, 91, every=3, invalid=0.2, groups=True)
    path = cases.write(tmp_path / "record.jsonl", lines)
    shown = column(page_data(load(path))["predicted"], "factor")[:, -1]
    checker, state = Checker(), LatestRun()
    whole: list[Any] = [checker.check(line) for line in lines if line["step" if "step" in line else "run"] != 90]
    state.update(whole)
    known = [state.factor(row) for row in range(8)]
    for row in (0, 1, 2, 4, 5):
        assert known[row] == pytest.approx(shown[row], rel=1e-3)
        assert known[row] < LARGEST_FACTOR
    assert math.isnan(shown[3])  # nothing is predicted there
    assert math.isnan(state.factor(100))
