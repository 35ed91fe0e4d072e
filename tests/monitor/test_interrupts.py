"""Ctrl-C at any bytecode of the monitor's, swallowed as notebooks do: the next steps train and are measured as ever."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from tests.fuzz.setting import MODES, OURS, Place, Run, faults_of_interrupt, interrupted_at, train
from tests.fuzz.world import differences

POINTS = 40  # of each mode; all of them in benchmarks/monitor/fuzz.py


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    """The models are tiny, and other threads would only spin."""
    threads(1)


def bytecodes(mode: str) -> dict[Place, int]:
    """Every bytecode that runs in a measured step, in that order, and how often."""
    seen: dict[Place, int] = {}
    train(mode, around=lambda _: interrupted_at(seen, None))
    return seen


def assert_recovered(mode: str, places: list[tuple[Place, int]]) -> None:
    plain: dict[tuple[str, int], Run] = {}
    found = [faults for at, nth in places if (faults := faults_of_interrupt(mode, at, nth, plain))]
    if found:
        listed = "\n".join(faults[0] for faults in found)
        pytest.fail(f"{len(found)} of {len(places)} interrupts:\n{listed}", pytrace=False)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_an_interrupt_in_code_of_ours(mode: Any) -> None:
    """And in the context managers that it enters, where most could be left undone."""
    seen = bytecodes(mode)
    ours = [p for p in seen if p[0].co_filename.startswith(OURS) or p[0].co_filename.endswith("contextlib.py")]
    stride = -(-len(ours) // POINTS)
    # The last time that a bytecode runs is as likely in a clean-up as the first one in a preparation.
    chosen = [(at, 0 if turn % 2 else seen[at] - 1) for turn, at in enumerate(ours[MODES.index(mode) :: stride])]
    assert_recovered(mode, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_an_interrupt_anywhere_below(mode: Any) -> None:
    """Also in torch and in the model, where they run for the monitor."""
    seen = bytecodes(mode)
    stride = -(-len(seen) // POINTS)
    chosen = [(at, seen[at] // 2) for at in list(seen)[MODES.index(mode) :: stride]]
    assert_recovered(mode, chosen)


def of_file(seen: dict[Place, int], file: str) -> list[Place]:
    found = [p for p in seen if p[0].co_filename.endswith(file)]
    assert found, f"{file} has moved"
    return found


@pytest.mark.slow
def test_an_interrupt_while_settings_are_put_back() -> None:
    """What is left for the next call is put back in the middle of the loop's own settings."""
    seen = bytecodes("jvp")
    places = of_file(seen, "_network/global_state.py") + of_file(seen, "_network/journal.py")
    assert_recovered("jvp", [(at, seen[at] - 1) for at in places[:: -(-len(places) // POINTS)]])


@pytest.mark.slow
def test_an_interrupt_that_leaves_a_generator_of_torch_suspended() -> None:
    """It goes on when it is freed, after everything was put back: it puts modes back that are over."""
    seen = bytecodes("autocast")
    leaving = contextlib._GeneratorContextManager.__exit__.__code__
    first = next(place for place in seen if place[0] is leaving)
    assert_recovered("autocast", [(first, nth) for nth in range(0, seen[first], 5)])


@pytest.mark.parametrize("mode", MODES)
def test_tracing_alone_changes_nothing(mode: Any) -> None:
    seen: dict[Place, int] = {}
    off, on = train(mode), train(mode, around=lambda _: interrupted_at(seen, None))
    assert not [line for a, b in zip(off.pictures, on.pictures, strict=True) for line in differences(a, b)]
    assert on.said == []
    assert len(seen) > 1000
