"""Real loops that scale gradients wrongly are named, with the ratio; loops that are right raise nothing.

A selection of ``benchmarks/parallel/audit.py``, which runs all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.parallel.clean_loops import clean_loop, run_clean
from benchmarks.parallel.scaling_bugs import BUGS, UNSEEN, run_loop
from fastfs.monitor import GradientScale
from tests.helpers.processes import run_ranks

ALONE = [name for name, bug in (BUGS | UNSEEN).items() if bug.ranks == 1]
ON_TWO = [
    "gradients times world size after the average",
    "communication hook sums",
    "accumulation not divided",
    "replica counted twice (tensor parallel)",
    "parts of sequences summed (context parallel)",
    "loss times world size",
]


def judge(name: str, result: Any) -> None:
    """A bug is named once, within 1 %; a loop that has none, or whose loss is multiplied, raises nothing."""
    if name in UNSEEN:
        assert result["raised"] == []
        assert result["scales"] == pytest.approx([1.0] * len(result["scales"]), rel=0.02)
        return
    ((ratio, message),) = result["raised"]
    assert ratio == pytest.approx(BUGS[name].ratio, rel=0.01)
    assert BUGS[name].said in message


@pytest.mark.parametrize("name", ALONE)
def test_a_wrong_scale_in_one_process_is_named(name: str) -> None:
    judge(name, run_loop(name, [GradientScale()]))


def test_a_wrong_scale_on_two_ranks_is_named() -> None:
    options = {"names": ON_TWO, "alerts": [GradientScale()]}
    results = run_ranks("benchmarks.parallel.scaling_bugs:run_loops", 2, timeout=120, **options)
    for name, result in zip(ON_TWO, results[0], strict=True):
        judge(name, result)


@pytest.mark.parametrize("seed", range(7001, 7007))
def test_clean_loops_raise_nothing(seed: int) -> None:
    loop = clean_loop(seed)
    short = replace(loop, before=0, depth=2, mode="batch" if loop.dtype == "bfloat16" else loop.mode)
    records = run_clean(short, [GradientScale()]).records
    assert sum(record.kind == "measured" for record in records) > 0
    assert [record.scalars["message"] for record in records if record.kind == "alert"] == []
