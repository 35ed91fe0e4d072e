"""The CUDA kernels of optimizer_stats on the host: sums, coefficients near and far, strides, sanitizers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfs._core.optimizer_rules import OptimizerRule
from tests.cuda.on_cpu import harness
from tests.cuda.on_cpu.harness import Case, rows, run
from tests.helpers.cases import LAYOUTS, RULES, step_arguments, step_inputs
from tests.helpers.compare import assert_close, assert_same, optimizer_truth

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(harness.missing() is not None, reason=str(harness.missing())),
]

CHUNK = 8192  # elements of a chunk of float32
SIZES = (0, 1, 7, 9, 2047, 2049, CHUNK // 2 + 1, CHUNK - 1, CHUNK + 1, 2 * CHUNK + 1, 4 * CHUNK + 1, 65537)
SMALL_GROUP = 8192  # elements of a group of chunks of float32 with the small policy
STRIDED = [name for name in LAYOUTS if name not in ("contiguous", "negative", "negative_imaginary")]
REORDERED = ("transposed", "reversed_dims", "channels_last")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Drivers by build, compiled beside one another."""
    folder = tmp_path_factory.mktemp("steps_on_cpu")
    with ThreadPoolExecutor(2) as pool:
        built: dict[str, Future[Path]] = {
            build: pool.submit(harness.compile_driver, build, folder / build)
            for build in ("plain", "small", "asan", "tsan")
        }
        yield built


@pytest.fixture(scope="module")
def plain(programs: dict[str, Future[Path]]) -> Path:
    return programs["plain"].result()


@pytest.fixture(scope="module")
def small(programs: dict[str, Future[Path]]) -> Path:
    return programs["small"].result()


def case(
    rule: OptimizerRule, parameters: list[tuple[Tensor, ...]], coefficients: Tensor | None = None, **options: Any
) -> Case:
    table = step_arguments(rule, parameters, coefficients)[-1]
    return Case(parameters, op=harness.RULES + rule, coefficients=table, **options)


def check(result: Tensor, given: Case, what: str = "") -> None:
    assert given.coefficients is not None
    for i, tensors in enumerate(given.layers):
        truth = optimizer_truth(given.op - harness.RULES, tensors, given.coefficients[i])
        assert_close(result[i], truth, what=f"{what} layer {i} {tensors[0].shape}")


@pytest.mark.parametrize(("rule", "dtype"), RULES)
def test_sums(plain: Path, rule: OptimizerRule, dtype: torch.dtype) -> None:
    parameters = [step_inputs(rule, (size,), dtype) for size in SIZES]
    one = case(rule, parameters)
    far = case(rule, parameters, far=True)
    near_result, far_result = rows(plain, one, far)
    check(near_result, one)
    assert_same(far_result, near_result, "coefficients in device memory")


@pytest.mark.parametrize(("rule", "dtype"), RULES)
def test_strides_and_alignment(small: Path, rule: OptimizerRule, dtype: torch.dtype) -> None:
    for shape in ((3, CHUNK + 7), (2, 5, 3, 7)):
        tensors = step_inputs(rule, shape, dtype)
        cases = [case(rule, [tensors])]
        cases += [case(rule, [tensors], misaligned=m) for m in ((1, 0, 0, 0), (0, 2, 4, 1), (3, 3, 1, 2))]
        same = [True] * len(cases)
        for name in STRIDED:
            moved = tuple(LAYOUTS[name](x) for x in tensors)
            for layers in (moved, (tensors[0], *moved[1:])):
                cases.append(case(rule, [layers], far=len(cases) % 2 == 0))
                same.append(not name.startswith(("expanded", "one_value", "overlapping")) and name not in REORDERED)
        results = rows(small, *cases)
        for given, result, equal in zip(cases, results, same, strict=True):
            if equal:
                assert_same(result, results[0])
            else:
                check(result, given)


def mixed(rule: OptimizerRule, count: int) -> list[tuple[Tensor, ...]]:
    """Parameters of all dtypes, sizes and layouts."""
    dtypes = [dtype for r, dtype in RULES if r is rule]
    result = []
    for i in range(count):
        shape = (CHUNK + 5 * i,) if i % 5 == 0 else (3, i % 7 + 1, 11)
        layout = STRIDED[i % len(STRIDED)] if i % 3 == 0 else "contiguous"
        result.append(step_inputs(rule, shape, dtypes[i % len(dtypes)], (layout, "contiguous", layout, "contiguous")))
    return result


@pytest.mark.parametrize("rule", OptimizerRule)
def test_many_parameters_in_one_call(small: Path, rule: OptimizerRule) -> None:
    one = case(rule, mixed(rule, 60))
    for far, seed in itertools.product((False, True), (0, 3)):
        again = case(rule, one.layers, one.coefficients, far=far)
        (result,) = rows(small, again, seed=seed)
        check(result, again)


def test_a_model_is_one_launch(plain: Path) -> None:
    parameters = [step_inputs(OptimizerRule.ADAM, (1 + i % 13,)) for i in range(350)]
    small, large = case(OptimizerRule.ADAM, parameters), case(OptimizerRule.ADAM, parameters, large_parameters=True)
    first, second = run(plain, [small, large]).results
    assert second.launches == 1
    assert first.launches > 1
    assert_same(first.rows, second.rows)
    check(first.rows, small)


def test_several_groups_of_chunks(small: Path) -> None:
    tensors = step_inputs(OptimizerRule.ADAM, (5 * SMALL_GROUP + 3,))
    one = case(OptimizerRule.ADAM, [tensors])
    results = [rows(small, one, seed=seed)[0] for seed in range(3)]
    check(results[0], one)
    for result in results[1:]:
        assert_same(result, results[0])
    once, twice = run(small, [one, case(OptimizerRule.ADAM, [tensors], repeats=2)]).results
    assert (once.dirty_tickets, twice.dirty_tickets) == (0, 0)
    assert_same(once.rows, twice.rows)


@pytest.mark.parametrize(("rule", "dtype"), RULES)
def test_extremes_and_non_finite_entries(small: Path, rule: OptimizerRule, dtype: torch.dtype) -> None:
    g, w, *s = step_inputs(rule, (CHUNK + 100,), dtype)
    scale = 1e3 if dtype == torch.float16 else 1e18
    tiny = 1e-4 if dtype == torch.float16 else 1e-18
    cases = [case(rule, [(g * k, w, *s)]) for k in (scale, tiny)]
    for given, result in zip(cases, rows(small, *cases), strict=True):
        check(result, given)
    g[5], g[-1], w[7], s[0][9] = torch.nan, torch.inf, -torch.inf, torch.nan
    (result,) = rows(small, case(rule, [(g, w, *s)]))
    assert result[0, -2:].tolist() == [3.0, CHUNK + 100]
    assert not result[0, :-2].isfinite().any()
    zeros = tuple(torch.zeros(1003, dtype=dtype) for _ in range(rule.states + 2))
    table = torch.zeros(1, len(rule.coefficients), dtype=torch.float64)
    table[:, 0] = -1.0
    (result,) = rows(small, case(rule, [zeros], table))
    assert result[0, :-1].tolist() == [0.0] * (result.shape[1] - 1)
    assert result[0, -1] == 1003.0


def memory_cases() -> list[Case]:
    cases = []
    for i, (rule, dtype) in enumerate(RULES):
        parameters = [step_inputs(rule, (size,), dtype) for size in (1, 9, 2049)]
        parameters.append(step_inputs(rule, (5, 37), dtype, ("padded_rows", "transposed", "contiguous", "padded_rows")))
        cases += [case(rule, parameters, far=i % 2 == k, misaligned=m) for k, m in enumerate(((0,) * 4, (1, 2, 3, 0)))]
    return cases


def test_address_and_undefined_sanitizers_are_silent(programs: dict[str, Future[Path]]) -> None:
    run(programs["asan"].result(), memory_cases())


def test_thread_sanitizer_is_silent(programs: dict[str, Future[Path]]) -> None:
    broken = step_inputs(OptimizerRule.ADAM, (1539,))
    broken[0][0] = torch.nan
    several = step_inputs(OptimizerRule.LINEAR, (2 * SMALL_GROUP * 2 + 3,), torch.bfloat16)
    cases = [
        case(OptimizerRule.ADAM, [broken, step_inputs(OptimizerRule.ADAM, (1024,))]),
        case(OptimizerRule.LINEAR, [several], far=True),
    ]
    run(programs["tsan"].result(), cases, seed=1)
