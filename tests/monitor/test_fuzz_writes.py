"""Forwards that write to what training owns, in every way torch allows: training stays bitwise the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.fuzz.world import differences
from tests.fuzz.writes import CONDITIONS, IN_PLACE, MODULE_WRITES, TARGETS, Write
from tests.fuzz.writing import MODES, Plan, altered, random_plan, shrink, train, wrong
from tests.fuzz.writing_hand import WritingHand, copies

CHUNKS = 8

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    """The models are tiny, and other threads would only spin."""
    threads(1)


def place(how: str | None, target: str | None = None) -> str:
    """After its use, where that does not break the backward."""
    return "start" if how == "inner step" or (target is not None and not TARGETS[target][1]) else "middle"


def assert_unaltered(plans: list[Plan]) -> None:
    """Every plan that fails is told, the first one as small as it can be made."""
    failed = [(plan, lines[0]) for plan in plans if (lines := altered(plan))]
    if failed:
        smallest = shrink(failed[0][0], altered)
        told = [(smallest, altered(smallest)[0]), *failed[1:]]
        listed = "\n".join(f"{plan}\n    {line}" for plan, line in told)
        pytest.fail(f"training was altered in {len(failed)} of {len(plans)} runs:\n{listed}", pytrace=False)


def assert_right(plans: list[Plan]) -> None:
    """The same for rows that are valid and wrong."""
    failed = [(plan, lines[0]) for plan in plans if (lines := wrong(plan))]
    if failed:
        smallest = shrink(failed[0][0], wrong)
        told = [(smallest, wrong(smallest)[0]), *failed[1:]]
        listed = "\n".join(f"{plan}\n    {line}" for plan, line in told)
        pytest.fail(f"valid and wrong in {len(failed)} of {len(plans)} runs:\n{listed}", pytrace=False)


def seeds(chunk: int) -> range:
    return range(25 * chunk, 25 * chunk + 25)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_written(mode: Any) -> None:
    assert_unaltered([Plan((), mode), Plan((), mode, aligned=True, evaluates=True, checkpoint=True)])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_writing_to_a_tensor(mode: Any) -> None:
    targets = itertools.cycle(TARGETS)
    writes = [Write(how, target, "always", place(how, target)) for how, target in zip(IN_PLACE, targets, strict=False)]
    assert_unaltered([Plan((write,), mode) for write in writes])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["lerp_", "data ="])
def test_everything_that_can_be_written_to(how: str, mode: Any) -> None:
    assert_unaltered([Plan((Write(how, target, "always", place(how, target)),), mode) for target in TARGETS])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_changing_the_module(mode: Any) -> None:
    assert_unaltered([Plan((Write(how, None, "always", place(how)),), mode) for how in MODULE_WRITES])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", ["weight", "frozen", "attribute", None])
def test_every_condition(target: str | None, mode: Any) -> None:
    """Written only now and then: before the monitor has seen it once, or after."""
    how = "counter" if target is None else "mul_"
    assert_unaltered([Plan((Write(how, target, when, "start"),), mode) for when in CONDITIONS])


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_modules(chunk: Any) -> None:
    assert_unaltered([random_plan(seed) for seed in seeds(chunk)])


# And what is recorded of them


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_row_of_a_random_module_is_valid_and_wrong(chunk: Any) -> None:
    assert_right([random_plan(seed) for seed in seeds(chunk)])


@pytest.mark.slow
def test_no_row_of_a_single_write_is_valid_and_wrong() -> None:
    plans = [Plan((Write(how, None, "always", place(how)),)) for how in MODULE_WRITES]
    assert_right(plans + [Plan((Write("lerp_", target, "always", place("lerp_", target)),)) for target in TARGETS])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "write",
    [
        Write("mul_", "frozen", "always", "start"),
        Write("data =", "shift", "first by buffer", "start"),
        Write("new Parameter", None, "always", "middle"),
        Write("list append", None, "always", "middle"),
        Write("queue and pointer", None, "always", "end"),
        Write("numpy", "weight", "always", "start"),
        Write("dlpack", "weight", "always", "start"),
        Write("data =", "slots", "always", "middle"),
        Write("optimizer state", None, "always", "middle"),  # there is none to write to at the first step
    ],
    ids=lambda write: write.how,
)
def test_compiled(write: Any, backend: str) -> None:
    assert_unaltered([Plan((write,), compiled=backend)])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["mul_", "lerp_", "data.mul_", "copy_"])
def test_compiled_in_every_mode(how: str, mode: Any) -> None:
    """A momentum encoder, or weights that are set from the data: within the graph."""
    when = "always" if how != "copy_" else "first"
    assert_unaltered([Plan((Write(how, "weight", when, "start"),), mode, compiled="aot_eager")])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["data.mul_", "index_copy_"])
def test_compiled_and_written_now_and_then(how: str) -> None:
    """After the forward has been seen without a write."""
    found = [when for when in CONDITIONS if when not in ("always", "first")]
    assert found
    assert_unaltered([Plan((Write(how, "frozen", when, "start"),), compiled="eager") for when in found])


# The judge itself


def test_the_judge_is_repeatable_without_a_monitor() -> None:
    for seed in range(40):
        plan = random_plan(seed)
        hand = WritingHand() if copies(plan.writes) else None
        first, second = train(plan, monitored=False)[0], train(plan, monitored=False, hand=hand)[0]
        assert not [line for a, b in zip(first, second, strict=True) for line in differences(a, b)], plan


def test_the_judge_sees_every_write() -> None:
    """A run with a write is another one than a run without: the picture holds what is written."""
    empty = train(Plan(()), monitored=False)[0]
    for how in MODULE_WRITES:
        if how != "forward hook":
            written = train(Plan((Write(how, None, "always", place(how)),)), monitored=False)[0]
            assert [line for a, b in zip(empty, written, strict=True) for line in differences(a, b)], how
    for target in TARGETS:
        write = Write("add_", target, "always", place(None, target))
        written = train(Plan((write,)), monitored=False)[0]
        assert [line for a, b in zip(empty, written, strict=True) for line in differences(a, b)], target


def test_shrinking_drops_what_is_not_needed() -> None:
    needed = Write("mul_", "frozen", "always", "start")
    plan = Plan((Write("zero_", "buffer", "first", "end"), needed), "batch", autocast=True, clip=True, every=2)
    assert shrink(plan, lambda p: needed in p.writes) == Plan((needed,), "batch")
