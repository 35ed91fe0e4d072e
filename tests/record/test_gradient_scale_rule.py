"""When the rule for the scale of gradients raises an alert, and what it takes for curvature, sampling or clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from fastfs._record.writing.alerts import Alerts
from fastfs.monitor import GradientScale
from tests.helpers.record_cases import head, measured


def steps(
    scales: Sequence[float],
    factors: Sequence[float] | float = 1.0,
    *,
    norms: Sequence[float] | None = None,
    scaler: float = 1.0,
    micro: int = 1,
    **columns: Any,
) -> list[Any]:
    """Records with these values of D / -<b, df> at every cut, and factors after the backward."""
    found = []
    for step, scale in enumerate(scales):
        factor = factors if isinstance(factors, float) else factors[step]
        norm = 1.0 + 0.1 * math.sin(step) if norms is None else norms[step]
        values = {"residual": 1.0 - scale, "relative_update": 1e-3, "gradient_norm": norm, "cos_angle": 0.5, **columns}
        record = measured(step, **values)
        more = {"gradient_scale": scale * factor, "loss_scale": scaler, "micro_batches": micro}
        found.append(replace(record, scalars={**record.scalars, **more}))
    return found


def raised(records: Sequence[Any], rule: Any = None, **header: Any) -> list[Any]:
    """Returns step, value and message of every alert."""
    alerts, found = Alerts([rule or GradientScale()], head(**header)), []
    for record in records:
        more, failed = alerts.update(record)
        assert not failed
        found += [(each.step, each.scalars["value"], each.scalars["message"]) for each in more]
    return found


def test_a_constant_wrong_scale_is_raised_once_when_enough_steps_are_known() -> None:
    ((step, value, message),) = raised(steps([2.0, 2.001, 1.999, 2.0, 2.002, 2.0, 2.0]), ranks=2, loss_weight=0.5)
    assert (step, value) == (4, pytest.approx(2.0, rel=1e-3))
    assert "w is declared as 0.5 and found to be 1;" in message
    assert "summed over the 2 ranks instead of averaged" in message
    assert raised(steps([2.0] * 4)) == []
    assert [step for step, *_ in raised(steps([2.0] * 4), GradientScale(window=3))] == [2]


def test_it_is_raised_again_after_it_was_right() -> None:
    changing = [2.0] * 5 + [1.0] * 6 + [2.0] * 5
    assert [step for step, *_ in raised(steps(changing))] == [4, 15]


@pytest.mark.parametrize(
    "records",
    [
        steps([1.0, 1.05, 0.97, 1.02, 1.0, 1.01]),
        steps([2.0, 3.0, 1.2, 2.2, 1.5, 2.0, 2.5]),  # not constant
        steps([0.8] * 8, relative_update=0.1),  # stable, but the step is large for this
        steps([0.8] * 8, parameter_update_norm=0.3, parameter_norm=1.0),  # a small branch that grows
        steps([0.8] * 8, cos_angle=0.021, relative_update=5e-3),
        steps([0.8] * 8, residual_se=0.05),  # the same rows of the same batch
        steps([2.0] * 8, valid=False),
        steps([-1.0] * 8),
        steps([2.0] * 8, 0.5),  # divided after the backward, as is declared
    ],
)
def test_what_is_no_evidence(records: Any) -> None:
    assert raised(records) == []


def test_cuts_that_differ_are_curvature_unless_one_part_is_scaled_by_a_number_of_ranks() -> None:
    # The first layer counts twice: D is 2, 2 + 1 and 2 + 2 where 1, 2 and 3 are right; the last value is of a group.
    part = {
        "residual": [-1.0, -0.5, 1.0 - 4.0 / 3.0, None],
        "aligned_decrease": [2.0, 3.0, 4.0, None],
        "relative_update": 1e-3,
    }
    records = [replace(r, scalars={**r.scalars, "gradient_scale": 1.5}) for r in steps([1.0] * 6, **part)]
    assert raised(records) == []
    ((_, value, message),) = raised(records, ranks=4)
    assert value == pytest.approx(2.0)
    assert "gradients of the parameters up to 'blocks.0' are 2 times" in message
    assert "replicas on 2 ranks are counted 2 times" in message


def test_clipping_raises_nothing_and_hides_no_gradient_that_is_too_large() -> None:
    norms = [1.0, 1.3, 0.9, 1.1, 1.6, 1.2, 1.4]
    clipped = [0.5 / norm for norm in norms]
    assert raised(steps([1.0] * 7, clipped, norms=norms)) == []
    still = [1.0 + 1e-7 * i for i in range(7)]  # a full batch and tiny steps: the norm hardly changes
    assert raised(steps([1.0] * 7, [0.5 / norm for norm in still], norms=still)) == []
    ((_, value, message),) = raised(steps([8.0] * 7, clipped, norms=norms), ranks=8)
    assert value == pytest.approx(8.0 * 0.5 / 0.9)
    assert "at least" in message
    sometimes = [min(1.0, 1.25 / norm) for norm in norms]
    ((_, value, _),) = raised(steps([0.5] * 7, sometimes, norms=norms), ranks=2)
    assert value == pytest.approx(0.5)


def test_a_constant_factor_after_the_backward() -> None:
    ((_, value, message),) = raised(steps([1.0] * 6, 0.25, micro=4))
    assert value == pytest.approx(0.25)
    assert "between the backward and the step" in message
    assert "4 accumulated micro-batches divided twice" in message
    ((_, _, message),) = raised(steps([1.0] * 6, 1.0 / 1024, scaler=1024.0))
    assert "unscaled twice" in message
    ((_, _, message),) = raised(steps([1.0] * 6, 1.0 / 1024))
    assert "Monitor(scaler=)" in message
    assert raised(steps([1.0] * 6, math.nan)) == []


def test_runs_do_not_mix_and_arguments_are_checked() -> None:
    rule = GradientScale()
    assert raised(steps([2.0] * 3), rule, run="a") == []
    assert raised(steps([2.0] * 3), rule, run="b") == []
    assert [step for step, *_ in raised(steps([2.0] * 3), rule, run="a")] == [1]
    with pytest.raises(ValueError, match="window: expected an integer >= 2, got 1"):
        GradientScale(window=1)
    with pytest.raises(ValueError, match="tolerance: expected a number between 0 and 1, got 2"):
        GradientScale(tolerance=2)
