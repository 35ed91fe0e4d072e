"""Every call that the monitor makes may fail: training goes on bitwise as without it, and no hook stays."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fuzz.setting import MODES, Site, failing_at, faults_of_failure, train
from tests.fuzz.world import differences

POINTS = 30  # of each mode; all of them in benchmarks/monitor/fuzz.py


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    """The models are tiny, and other threads would only spin."""
    threads(1)


def first_calls(mode: str) -> list[int]:
    """Every call in the code once: the first time that it is made."""
    seen: list[Site] = []
    train(mode, around=lambda _: failing_at(seen, None))
    return list({site: number for number, site in reversed(list(enumerate(seen)))}.values())[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_failure_anywhere_does_not_reach_the_loop(mode: Any) -> None:
    off = train(mode)
    calls = first_calls(mode)
    stride = -(-len(calls) // POINTS)
    chosen = calls[MODES.index(mode) % stride :: stride]
    found = [faults for number in chosen if (faults := faults_of_failure(mode, off, number))]
    if found:
        listed = "\n".join(faults[0] for faults in found)
        pytest.fail(f"{len(found)} of {len(chosen)} failures:\n{listed}", pytrace=False)


@pytest.mark.parametrize("mode", MODES)
def test_tracing_alone_changes_nothing(mode: Any) -> None:
    seen: list[Site] = []
    off, on = train(mode), train(mode, around=lambda _: failing_at(seen, None))
    assert not [line for a, b in zip(off.pictures, on.pictures, strict=True) for line in differences(a, b)]
    assert on.said == []
    assert on.numbers == list(range(len(on.numbers)))
    assert len(set(seen)) > 100
