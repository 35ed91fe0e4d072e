"""The real CUDA kernels of the row ops on the host: results, determinism, sanitizers, and bugs that must be caught."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda.on_cpu import harness
from tests.cuda.on_cpu.harness import Programs
from tests.cuda.on_cpu.row_cases import RowCase, RowResult, run_rows
from tests.helpers.cases import DTYPES, LAYOUTS
from tests.helpers.compare import assert_close_squares, assert_same, assert_same_values
from tests.helpers.gather_cases import SHAPES, rows_for, table, values

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(harness.missing() is not None, reason=str(harness.missing())),
]

BF16 = torch.bfloat16
CHUNK = 8192
# Layouts that a kernel sees (negative bits are resolved before).
STRIDED = [name for name in LAYOUTS if name not in ("contiguous", "negative", "negative_imaginary")]
DRIVER = "rows_driver.cpp"


@dataclass(frozen=True)
class Bug:
    """A change of one place of the kernels that a check must notice."""

    old: str
    new: str
    build: str
    sign: str  # what the sanitizer says; for the plain build, which check fails


BUGS = {
    "one buffer of partial sums": Bug("  side ^= 1;\n", "", "tsan", "data race"),
    "no barrier between the warps": Bug(
        "  __syncthreads();\n  v = 0.0;", "  __syncwarp();\n  v = 0.0;", "tsan", "data race"
    ),
    "shared array too small": Bug(
        "double parts[2][kThreads / 32];", "double parts[2][kThreads / 32 - 1];", "asan", "out of bounds for type"
    ),
    "tail read past the end": Bug("      if (valid == E) {", "      if (valid > 0) {", "asan", "heap-buffer-overflow"),
    "fast loop past the end": Bug("+ (kTiles - 1) * tile + E <= count", "<= count", "asan", "heap-buffer-overflow"),
    "tail written past the end": Bug("    if (i >= valid) break;\n", "", "asan", "heap-buffer-overflow"),
    "wide stores of a copy that is not aligned": Bug(
        "kWords % 4 == 0 && aligned(p, 16)", "kWords % 4 == 0", "asan", "misaligned address"
    ),
    "rows of no tensor are read": Bug("row >= 0 && row < job.rows", "row < job.rows", "asan", "AddressSanitizer"),
    "float chains too long": Bug("kSize == 8 ? 1 : kChain / E", "kSize == 8 ? 1 : 64", "plain", "long row"),
    "no repetition in double": Bug("squares_need_double(sum)) {", "false) {", "plain", "range"),
    "bfloat16 without the tie to even": Bug("0x7fffu + (u >> 16 & 1u)", "0x8000u", "plain", "cast"),
    "chunks of another row": Bug("job.partials + row * job.chunks", "job.partials + row", "plain", "rows"),
    "inner dimension not followed": Bug("if (++inner == length && e + 1 < valid)", "if (false)", "plain", "strides"),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("rows_on_cpu")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        result = Programs(folder, pool)
        for build in ("plain", "asan", "tsan"):
            result.start(build, build, harness.CUDA_SOURCES, driver=DRIVER)
        for name, bug in BUGS.items():
            sources = folder / "sources" / name.replace(" ", "_")
            harness.with_change(sources, harness.CUDA_SOURCES / "cuda" / "gather_rows.cuh", bug.old, bug.new)
            result.start(name, bug.build, sources, driver=DRIVER)
        yield result
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def plain(programs: Programs) -> Path:
    return programs["plain"]


def results(program: Path, cases: list[RowCase], seed: int = 0) -> list[RowResult]:
    return run_rows(program, cases, seed=seed).results


def check_rows(program: Path, cases: list[RowCase], what: str) -> None:
    """Copies exact, squares within the budget."""
    for case, result in zip(cases, results(program, cases), strict=True):
        expected = table(case.x, case.row_dims)[case.rows]
        where = f"{what} {case.x.dtype} {tuple(case.x.shape)} {case.row_dims} {case.copy}"
        if case.copy is not None:
            assert result.copy is not None
            assert_same_values(result.copy, expected.to(case.copy), where)
        assert_close_squares(result.squares, expected, what=where)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(plain: Path, dtype: torch.dtype) -> None:
    shapes = [*SHAPES[:-1], ((2, 2 * CHUNK + 5), 1), ((40, 768), 1)]
    check_rows(plain, rows_cases(dtype, shapes), "rows")


def rows_cases(dtype: torch.dtype, shapes: list[tuple[tuple[int, ...], int]]) -> list[RowCase]:
    cases = []
    for (shape, row_dims), to in itertools.product(shapes, (*DTYPES, None)):
        x = values(shape, dtype)
        cases.append(RowCase(x, rows_for(x, row_dims), row_dims, to))
    return cases


def test_several_hundred_chunks(plain: Path) -> None:
    x = values((2, 300 * CHUNK + 1), BF16)
    check_rows(plain, [RowCase(x, torch.tensor([1, 0, 1]), 1, None, multiprocessors=3)], "chunks")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_and_strides_do_not_change_bits(plain: Path, dtype: torch.dtype) -> None:
    for shape, row_dims in (((3, 300), 1), ((3, 1100), 1), ((2, 5, 3, 7), 1), ((2, 5, 4, 70), 2), ((2, 3, 9000), 1)):
        x = values(shape, dtype)
        rows = rows_for(x, row_dims)
        to = DTYPES[(DTYPES.index(dtype) + len(shape)) % 4]
        cases = [RowCase(x, rows, row_dims, to)]
        cases += [RowCase(x, rows, row_dims, to, misaligned=i, copy_misaligned=j) for i, j in ((1, 0), (2, 1), (4, 2))]
        cases += [
            RowCase(LAYOUTS[n](x), rows, row_dims, to) for n in STRIDED if not n.startswith(("exp", "one", "over"))
        ]
        cases += [RowCase(x, torch.stack([rows, rows], 1)[:, 0], row_dims, to)]
        first, *others = results(plain, cases)
        for i, other in enumerate(others):
            assert first.copy is not None
            assert other.copy is not None
            assert_same_values(other.copy, first.copy, f"{shape} case {i}")
            assert_same(other.squares, first.squares, f"{shape} case {i}")
    check_strides(plain, dtype)


def check_strides(program: Path, dtype: torch.dtype) -> None:
    x = values((4, 6, 5, 8, 3), dtype)
    cases = []
    for order in ((4, 3, 2, 1, 0), (1, 0, 2, 4, 3), (2, 0, 4, 1, 3), (0, 1, 2, 3, 4)):
        moved = x.permute(order)[:, 1:, :, ::2]
        cases += [RowCase(moved, rows_for(moved, n), n, torch.float32) for n in range(6)]
    cases += [RowCase(LAYOUTS[n](values((9, 70), dtype)), torch.tensor([8, 0, 1]), 1, dtype) for n in STRIDED]
    check_rows(program, cases, "strides")


def test_grid_and_order_do_not_change_bits(plain: Path) -> None:
    x = (torch.randn(60, 2 * CHUNK + 33) * torch.exp(10 * torch.randn(60, 2 * CHUNK + 33))).to(BF16)
    for width in (300, 3000, 2 * CHUNK + 33):
        part = x[:, :width].contiguous()
        rows = rows_for(part, 1, 40)
        (expected,) = results(plain, [RowCase(part, rows, 1, torch.float32, multiprocessors=1)])
        for seed, multiprocessors in ((1, 1), (2, 2), (3, 40)):
            case = RowCase(part, rows, 1, torch.float32, multiprocessors=multiprocessors)
            (result,) = results(plain, [case], seed=seed)
            assert_same(result.squares, expected.squares, f"{width} {seed}")
            assert result.copy is not None
            assert expected.copy is not None
            assert_same_values(result.copy, expected.copy, f"{width} {seed}")


def test_numbers_of_no_row_give_nan_and_read_nothing(plain: Path, programs: Programs) -> None:
    for dtype, (shape, row_dims) in itertools.product(DTYPES, (((6, 5), 1), ((3, 2, 2000), 2), ((6, 9000), 1))):
        x = values(shape, dtype)
        rows = torch.tensor([0, 6, -1, 5, 2**62, -(2**62)])
        cases = [RowCase(x, rows, row_dims, to) for to in (*DTYPES, None)]
        cases.append(RowCase(torch.empty((0, *shape[1:]), dtype=dtype), rows, row_dims, BF16))
        for program in (plain, programs["asan"]):
            *found, empty = results(program, cases)
            for case, result in zip(cases, found, strict=False):
                assert result.squares.isnan().tolist() == [False, True, True, False, True, True]
                if case.copy is not None:
                    assert result.copy is not None
                    assert result.copy[[1, 2, 4, 5]].isnan().all()
                    assert_same_values(result.copy[[0, 3]], table(x, row_dims)[[0, 5]].to(case.copy))
            assert empty.copy is not None
            assert empty.copy.isnan().all()
            assert empty.squares.isnan().all()


def test_nothing_to_do(plain: Path) -> None:
    none = torch.empty(0, dtype=torch.int64)
    cases = [
        RowCase(values((5, 3), BF16), none, 1, BF16),
        RowCase(values((0, 3), BF16), none, 1, BF16),
        RowCase(values((2, 0), BF16), torch.tensor([1, 2]), 1, BF16),
    ]
    found = results(plain, cases)
    assert [r.launches for r in found] == [0, 0, 1]
    assert found[2].squares[0] == 0
    assert found[2].squares[1].isnan()


def test_casts(plain: Path) -> None:
    check_casts(plain)


def check_casts(program: Path) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    near = [patterns.view(d).to(torch.float64) for d in (torch.float16, BF16)]
    middle = [(v[1:] + v[:-1]) / 2 for v in near]
    x = torch.cat([*near, *middle, *(v * (1 + s * 2.0**-30) for v in middle for s in (1, -1))])
    x = torch.nn.functional.pad(x, (0, -len(x) % 512)).view(-1, 512)
    cases = [RowCase(x.to(d), torch.arange(len(x)), 1, to) for d, to in itertools.product(DTYPES, DTYPES)]
    for case, result in zip(cases, results(program, cases), strict=True):
        assert case.copy is not None
        assert result.copy is not None
        assert_same_values(result.copy, case.x.to(case.copy), f"cast of {case.x.dtype} to {case.copy}")


def test_long_rows_do_not_drift(plain: Path) -> None:
    check_long_row(plain)


def check_long_row(program: Path) -> None:
    # In float, 2^24 + 1 is 2^24. Everything of one thread is one; the others have zeros.
    x = torch.zeros(1, CHUNK, dtype=BF16)
    x.view(-1, 1024)[:, :8] = 1.0
    x[0, 0] = 4096.0
    (result,) = results(program, [RowCase(x, torch.tensor([0]), 1, None)])
    assert abs(float(result.squares) - (2**24 + 63)) <= 16, f"long row: {result.squares}"


def test_range_and_non_finite(plain: Path) -> None:
    check_range(plain)


def check_range(program: Path, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    for dtype in dtypes:
        scales = {torch.float16: (6e-8, 1e4), torch.float64: (1e-150, 1e150)}.get(dtype, (1e-38, 1e-25, 1e36))
        xs = [values((4, width), torch.float64, scale=s).to(dtype) for s in scales for width in (40, 2000, 9000)]
        check_rows(program, [RowCase(x, torch.tensor([3, 0]), 1, None) for x in xs], "range")
        for width in (40, 2000, 9000):
            x = values((5, width), dtype)
            x[1, 0], x[2, -1], x[3, 1], x[3, 2] = torch.nan, -torch.inf, torch.inf, torch.nan
            (result,) = results(program, [RowCase(x, torch.arange(5), 1, torch.float32)])
            assert result.squares.isnan().tolist() == [False, True, False, True, False], f"range {dtype}"
            assert result.squares.isinf().tolist() == [False, False, True, False, False], f"range {dtype}"


# sanitizers


def memory_cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[RowCase]:
    """Every way to load and store, with buffers of exact size."""
    cases = []
    for dtype, width, to in itertools.product(dtypes, (1, 9, 777, 1030, CHUNK + 9), (*DTYPES, None)):
        x = values((3, width), dtype)
        for misaligned, copy_misaligned in ((0, 0), (1, 0), (0, 1), (3, 2)):
            rows = torch.tensor([2, -1, 0, 3])
            cases.append(RowCase(x, rows, 1, to, misaligned=misaligned, copy_misaligned=copy_misaligned))
    for dtype, layout, row_dims in itertools.product(dtypes, STRIDED, (0, 1, 2)):
        x = LAYOUTS[layout](values((5, 37), dtype))
        cases.append(RowCase(x, rows_for(x, row_dims), row_dims, BF16))
    return cases


def race_cases() -> list[RowCase]:
    """A block that takes several rows, chunks that are repeated in double, many chunks, rows of no tensor."""
    x = values((8, 2000), BF16)
    x[3, 5] = torch.nan
    wide = values((2, 5 * CHUNK + 3), BF16)
    rows = torch.tensor([0, 3, 3, 9, 1, 2, -1, 7] * 6)
    cases = [RowCase(x, rows, 1, torch.float32, multiprocessors=n) for n in (1, 40)]
    cases += [RowCase(wide, torch.tensor([1, 0, 1]), 1, BF16, multiprocessors=n) for n in (1, 40)]
    return [*cases, RowCase(values((8, 40), BF16), torch.arange(8), 1, BF16)]


def test_address_and_undefined_sanitizers_are_silent(programs: Programs) -> None:
    run_rows(programs["asan"], [*memory_cases(), *race_cases()])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_thread_sanitizer_is_silent(programs: Programs, seed: int) -> None:
    run_rows(programs["tsan"], race_cases(), seed=seed)


def plain_checks(program: Path) -> dict[str, Callable[[], None]]:
    wide = RowCase(values((3, 2 * CHUNK + 5), BF16), torch.tensor([2, 0, 1]), 1, BF16)
    return {
        "rows": lambda: check_rows(program, [wide], "rows"),
        "strides": lambda: check_strides(program, BF16),
        "cast": lambda: check_casts(program),
        "long row": lambda: check_long_row(program),
        "range": lambda: check_range(program, (BF16,)),
    }


@pytest.mark.parametrize("name", BUGS)
def test_seeded_bug_is_caught(programs: Programs, name: str) -> None:
    bug, program = BUGS[name], programs[name]
    if bug.build == "plain":
        with pytest.raises(AssertionError, match=bug.sign):
            plain_checks(program)[bug.sign]()
        return
    cases = memory_cases((BF16,)) + race_cases() if bug.build == "asan" else race_cases()
    done = run_rows(program, cases, seed=1, check=False)
    assert done.code != 0
    assert bug.sign in done.text


def test_unchanged_kernels_pass_the_checks_for_bugs(programs: Programs) -> None:
    for check in plain_checks(programs["plain"]).values():
        check()
