"""The sink that logs."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest

from fastfs.monitor import LoggingSink, Record, Sink
from tests.helpers.record_cases import alert, head, measured, predicted


def test_steps_and_alerts_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    sink = LoggingSink("fastfs.test", level=logging.DEBUG)
    assert isinstance(sink, Sink)
    sink.open(head())
    with caplog.at_level(logging.DEBUG, "fastfs.test"):
        sink.write([measured(0), predicted(1), alert(1), Record("skipped", 2, 0.0, {"reason": "overflow"})])
        sink.write([measured(3, angle=[1.0, 2.0, math.nan, 9.0], valid=[True, None, True, True], loss=None)])
        sink.write([Record("alert", 4, 0.0, {"rule": "nonfinite", "layer": None, "value": None, "message": "bad"})])
    sink.close()
    assert caplog.record_tuples == [
        ("fastfs.test", logging.DEBUG, "step 0: loss 0.5, 3 of 3 layers valid, median angle 1.100 rad"),
        ("fastfs.test", logging.WARNING, "step 1: blocks.1: 2 entries are NaN or infinite [nonfinite]"),
        ("fastfs.test", logging.DEBUG, "step 2: skipped: overflow"),
        ("fastfs.test", logging.DEBUG, "step 3: 2 of 3 layers valid, median angle 1.000 rad"),
        ("fastfs.test", logging.WARNING, "step 4: bad [nonfinite]"),
    ]


@pytest.mark.parametrize("columns", [{}, {"valid": [False, False, None]}])
def test_steps_without_a_valid_angle_are_logged(caplog: pytest.LogCaptureFixture, columns: dict[str, Any]) -> None:
    sink = LoggingSink()
    sink.open(head())
    with caplog.at_level(logging.INFO, "fastfs"):
        sink.write([Record("measured", 7, 0.0, {"loss": math.inf}, columns)])
    assert caplog.messages == ["step 7: loss inf, 0 of 3 layers valid"]
