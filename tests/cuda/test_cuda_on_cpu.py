"""The real CUDA kernels and launchers on the host: sums, determinism, sanitizers, and bugs that must be caught."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fastfs import reference
from tests.cuda.on_cpu import harness
from tests.cuda.on_cpu.harness import STREAM_READ, UPDATES, Case, Programs, rows, run
from tests.cuda.on_cpu.seeded_bugs import BUGS
from tests.helpers.cases import DTYPES, LAYOUTS, SHAPES, inputs
from tests.helpers.compare import assert_close, assert_same, feature_truth, update_truth

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(harness.missing() is not None, reason=str(harness.missing())),
]

CHUNK, ROW = 16384, 8192  # elements of a small chunk of 16 bits, and of the longest row of a warp
SIZES = (0, 1, 7, 8, 9, 255, 2047, 2048, 2049, 4095, 4097, 8193, CHUNK, CHUNK + 1, 32769, 65535, 65536, 65537, 81921)
# With the small policy (on_cpu/shim_policy.h), for bfloat16: widths at which the chunk grows, or a level is added.
SMALL_SIZES = (1023, 1024, 1025, 4095, 4096, 4097, 8191, 8192, 8193, 16383, 16384, 16385, 65537)
GROUP = 16384  # elements of a group of chunks of 16 bits there
BF16 = torch.bfloat16
# Layouts that a kernel sees (negative bits are resolved before).
STRIDED = [name for name in LAYOUTS if name not in ("contiguous", "negative", "negative_imaginary")]
REORDERED = ("transposed", "reversed_dims", "channels_last")  # strides in another order than dimensions


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        result = Programs(folder, pool)
        for build in ("plain", "small", "asan", "tsan"):
            result.start(build, build, harness.CUDA_SOURCES)
        for name, bug in BUGS.items():
            sources = folder / "sources" / name.replace(" ", "_")
            harness.with_change(sources, harness.CUDA_SOURCES / "cuda" / bug.file, bug.old, bug.new)
            result.start(name, bug.build, sources, harness.BF16_ONLY)
        yield result
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def plain(programs: Programs) -> Path:
    return programs["plain"]


@pytest.fixture(scope="session")
def small(programs: Programs) -> Path:
    return programs["small"]


# sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_all_dtypes_and_sizes(plain: Path, dtype: torch.dtype) -> None:
    cases, truths = [], []
    for last, size in itertools.product(DTYPES, SIZES):
        f, g, b = inputs((size,), dtype, last)
        cases += [Case([(f, g, b)]), Case([(f, b)], op=UPDATES)]
        truths += [feature_truth(f, g, b), update_truth(f, b)]
    for result, truth, case in zip(rows(plain, *cases), truths, cases, strict=True):
        assert_close(result[0], truth, what=f"{case.op} {[(x.dtype, x.shape) for x in case.layers[0]]}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_at_the_borders_of_the_cut(small: Path, dtype: torch.dtype) -> None:
    check_borders(small, dtype)


def check_borders(program: Path, dtype: torch.dtype) -> None:
    sizes = [size * 2 // dtype.itemsize for size in SMALL_SIZES]
    layers = [inputs((size,), dtype) for size in sizes]
    for layer, result in zip(layers, rows(program, *(Case([layer]) for layer in layers)), strict=True):
        assert_close(result[0], feature_truth(*layer), what=f"sums at the borders, {dtype} {layer[0].shape}")


@pytest.mark.parametrize("size", [2**24, 2**24 + 1, 2**25 + 1])
def test_sums_of_wide_layers(plain: Path, size: int) -> None:
    # 1024 chunks of 2^14 elements, 513 of 2^15 and 513 of 2^16. The values depend on the place and have exact sums.
    update = (torch.arange(size) // 1000 % 127).to(BF16)
    (result,) = rows(plain, Case([(torch.zeros(size, dtype=BF16), update, torch.full((size,), 2.0, dtype=BF16))]))
    sums = [int(update.sum(dtype=torch.int64)) * 2, int(update.double().square().sum()), 4 * size]
    assert result[0, :3].tolist() == sums
    assert result[0, -1] == size


def test_more_groups_than_a_block_reads_at_once(small: Path) -> None:
    layer = inputs((130 * GROUP + 5,), BF16)
    (first,) = rows(small, Case([layer]))
    assert_close(first[0], feature_truth(*layer))
    assert_same(rows(small, Case([layer]), seed=7)[0], first)


def test_long_sums_do_not_drift(plain: Path) -> None:
    check_long_sum(plain)


def check_long_sum(program: Path) -> None:
    # In float, 2^24 + 1 is 2^24: a long chain loses every one that follows. All is in the hands of one thread.
    before = torch.zeros(3, ROW, dtype=BF16)
    before.view(3, -1, 256)[..., :8] = 1.0
    before[:, 0] = 4096.0
    layer = (before, before * 2, before)
    truth = feature_truth(*layer, per_row=True)
    assert_close(rows(program, Case([layer], per_row=True))[0], truth, what="long sum")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(plain: Path, dtype: torch.dtype) -> None:
    cases, truths = [], []
    more = [(70, 64), (33, 512), (35, 513), (40, 768), (19, 1024), (9, 1025), (9, ROW), (3, ROW + 1), (2, CHUNK + 1)]
    for shape in [s for s in SHAPES if s != ()] + more:
        layer = inputs(shape, dtype)
        cases.append(Case([layer], per_row=True))
        truths.append(feature_truth(*layer, per_row=True))
    for result, truth, case in zip(rows(plain, *cases), truths, cases, strict=True):
        assert_close(result, truth, what=str(case.layers[0][0].shape))


def test_rows_one_after_the_other(plain: Path) -> None:
    # So many short rows that a team takes several; the last block has teams without a row.
    layers = [inputs((50001, 8), BF16), inputs((9, 40), BF16)]
    (result,) = rows(plain, Case(layers, per_row=True))
    assert_close(result[:50001], feature_truth(*layers[0], per_row=True))
    assert_close(result[50001:], feature_truth(*layers[1], per_row=True))
    assert_same(rows(plain, Case(layers[1:], per_row=True))[0], result[50001:])


def test_spacing_of_every_float16_number(plain: Path) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)[:, None]
    zero = torch.zeros_like(x)
    (result,) = rows(plain, Case([(x, zero, zero)], per_row=True))
    expected = reference.spacing(x[:, 0]).square() / 12
    torch.testing.assert_close(result[:, 6], expected, rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [8, 600, 2000])
def test_a_repeated_row_does_not_change_its_neighbours(plain: Path, width: int) -> None:
    check_rows(plain, width)


def check_rows(program: Path, width: int) -> None:
    layer = inputs((9, width), BF16)
    (clean,) = rows(program, Case([layer], per_row=True))
    assert_close(clean, feature_truth(*layer, per_row=True), what="rows")
    layer[1][4, 3] = torch.nan
    (result,) = rows(program, Case([layer], per_row=True))
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert_same(result[others], clean[others], what="rows beside a repeated one")
    assert result[4, 7] == 1.0


def mixed_layers(count: int) -> list[tuple[torch.Tensor, ...]]:
    """Layers of all sizes, dtypes and strides, with empty ones at both ends."""
    layers = [inputs((0,), BF16)]
    for i in range(count):
        shape = (CHUNK + 5 * i,) if i % 5 == 0 else (3, i % 7 + 1, 11)
        layout = STRIDED[i % len(STRIDED)] if i % 3 == 0 else "contiguous"
        layers.append(inputs(shape, DTYPES[i % 4], DTYPES[(i + i // 4 % 2) % 4], (layout, "contiguous", layout)))
    return [*layers, inputs((5, 0), torch.float32)]


def test_many_layers_in_one_call(small: Path) -> None:
    layers = mixed_layers(60)
    (result,) = rows(small, Case(layers))
    for i, layer in enumerate(layers):
        assert_close(result[i], feature_truth(*layer), what=f"layer {i}")
    updates = [(f, b) for f, _, b in layers]
    (result,) = rows(small, Case(updates, op=UPDATES))
    for i, layer in enumerate(updates):
        assert_close(result[i], update_truth(*layer), what=f"layer {i}")


def test_no_layers_no_launch(plain: Path) -> None:
    for layers in ([], [inputs((0, 5), BF16)]):
        (result,) = run(plain, [Case(layers, per_row=True)]).results
        assert (result.launches, result.rows.shape) == (0, (0, 9))


@pytest.mark.parametrize(("dtype", "launches"), [(BF16, (9, 2)), (torch.float64, (13, 13))], ids=str)
def test_large_parameters_save_launches(plain: Path, dtype: torch.dtype, launches: tuple[int, int]) -> None:
    """Double has no kernel with a large table."""
    layers = [inputs((1 + i % 13,), dtype) for i in range(700)]
    small, large = run(plain, [Case(layers), Case(layers, large_parameters=True)]).results
    assert (small.launches, large.launches) == launches
    assert_same(small.rows, large.rows)
    for i, layer in enumerate(layers):
        assert_close(small.rows[i], feature_truth(*layer), what=f"layer {i}")


# the same bits whatever the circumstances


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_and_strides_do_not_change_bits(small: Path, dtype: torch.dtype) -> None:
    for shape in ((3, CHUNK + 7), (70, 131), (2, 5, 3, 7)):
        layer = inputs(shape, dtype)
        cases = [Case([layer])]
        cases += [Case([layer], misaligned=m) for m in ((1, 0, 0), (0, 2, 4), (3, 3, 1), (4, 4, 4))]
        reordered = [False] * len(cases)  # a whole layer is summed in the order of its strides
        for name in STRIDED:
            if not name.startswith(("expanded", "one_value", "overlapping")):
                moved = tuple(LAYOUTS[name](x) for x in layer)
                cases += [Case([moved]), Case([(moved[0], layer[1], moved[2])])]
                reordered += [name in REORDERED] * 2
        cases += [Case(c.layers, per_row=True, misaligned=c.misaligned) for c in cases]
        results = rows(small, *cases)
        half = len(cases) // 2
        for i, result in enumerate(results):
            what = f"{shape} case {i}"
            if i < half and reordered[i]:
                assert_close(result[0], feature_truth(*layer), what=what)
            else:
                assert_same(result, results[0 if i < half else half], what=what)


def test_expanded_inputs(plain: Path) -> None:
    for dtype, name in itertools.product(DTYPES, ("expanded_first", "expanded_last", "one_value", "overlapping")):
        layer = tuple(LAYOUTS[name](x) for x in inputs((9, 1100), dtype))
        dense = tuple(x.contiguous() for x in layer)
        whole, by_row, dense_by_row = rows(
            plain, Case([layer]), Case([layer], per_row=True), Case([dense], per_row=True)
        )
        assert_close(whole[0], feature_truth(*layer), what=f"{dtype} {name}")
        assert_same(by_row, dense_by_row, what=f"rows {dtype} {name}")


@pytest.mark.parametrize("build", ["plain", "small"])
def test_order_of_blocks_does_not_change_bits(programs: Programs, build: str) -> None:
    check_same_bits(programs[build])


def check_same_bits(program: Path) -> None:
    # So wide a range that even sums of double are rounded.
    layer = tuple(x * torch.exp(10 * torch.randn(x.shape)).to(BF16) for x in inputs((5 * GROUP + 11,), BF16))
    expected = rows(program, Case([layer]))[0]
    for seed in (1, 2, 3, 4):
        assert_same(rows(program, Case([layer]), seed=seed)[0], expected, what=f"same bits, seed {seed}")


def test_neighbours_do_not_change_bits(small: Path) -> None:
    layers = mixed_layers(24)
    together = rows(small, Case(layers), seed=5)[0]
    alone = rows(small, *(Case([layer]) for layer in layers))
    assert_same(together, torch.cat(alone))


@pytest.mark.parametrize("build", ["plain", "small"])
def test_tickets_wrap(programs: Programs, build: str) -> None:
    check_tickets(programs[build])


def check_tickets(program: Path) -> None:
    layer = inputs((3 * GROUP + 5,), BF16)
    once, twice = run(program, [Case([layer]), Case([layer], repeats=2)]).results
    assert (once.dirty_tickets, twice.dirty_tickets) == (0, 0), "tickets are not zero again"
    assert_same(once.rows, twice.rows)


# extremes


@pytest.mark.parametrize("per_row", [False, True])
def test_non_finite_entries_are_counted(small: Path, per_row: bool) -> None:
    for dtype, last in itertools.product(DTYPES, DTYPES):
        check_non_finite(small, dtype, last, per_row)


def check_non_finite(program: Path, dtype: torch.dtype, last: torch.dtype, per_row: bool) -> None:
    f, g, b = inputs((2, CHUNK if not per_row else 300), dtype, last)
    f[0, 3] = torch.nan
    g[0, 3], g[1, -1] = torch.inf, -torch.inf
    b[1, 0], b[1, 7], b[1, 8] = torch.inf, torch.nan, -torch.inf
    what = f"{dtype} {last}"
    (result,) = rows(program, Case([(f, g, b)], per_row=per_row))
    assert result[:, 7].tolist() == ([2.0, 4.0] if per_row else [6.0]), f"{what}: non-finite entries"
    assert result[:, 8].sum() == f.numel(), what
    assert not result[:, :6].isfinite().all(), what
    (result,) = rows(program, Case([(f, b)], op=UPDATES, per_row=per_row))
    assert result[:, 3].tolist() == ([1.0, 3.0] if per_row else [4.0]), f"{what}: non-finite entries"


def check_extremes(program: Path, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    for dtype, size in itertools.product(dtypes, (100, CHUNK + 100)):
        scales = (6e-8, 1e-6, 1e4) if dtype == torch.float16 else (1e-20, 1e-35, 1e18)
        for scale in scales:
            f, g, b = inputs((size,), dtype, scale=scale if dtype != torch.float16 else 1.0)
            if dtype == torch.float16:
                f, g, b = (x * scale for x in (f, g, b))
            (result,) = rows(program, Case([(f, g, b)]))
            assert_close(result[0], feature_truth(f, g, b), what=f"{dtype} {scale} extremes")
        f, g, b = inputs((size,), dtype)
        b *= 6e-8 if dtype == torch.float16 else 1e-20
        (result,) = rows(program, Case([(f, g, b)]))
        assert_close(result[0], feature_truth(f, g, b), what=f"{dtype} extremes of backward alone")


def test_extremes(small: Path) -> None:
    check_extremes(small)


def test_zeros(plain: Path) -> None:
    zero = torch.zeros(3, 100, dtype=BF16)
    expected = torch.tensor([0.0] * 8 + [300.0], dtype=torch.float64)
    (result,) = rows(plain, Case([(zero, zero, zero)]))
    assert_same(result[0], expected)


# sanitizers


def memory_cases(dtypes: tuple[torch.dtype, ...] = DTYPES, *, whole: bool = True) -> list[Case]:
    """Every way to load, with buffers of exact size."""
    cases = []
    for dtype, size in itertools.product(dtypes, (1, 9, 2049, CHUNK - 5)):
        layer = inputs((size,), dtype)
        cases += [Case([layer], misaligned=m) for m in ((0, 0, 0), (0, 1, 0), (1, 2, 3))]
        if whole:
            cases += [Case([layer[:2]], op=UPDATES), Case([layer], op=STREAM_READ)]
            cases.append(Case([inputs((size,), dtype, DTYPES[size % 4])]))
    for dtype, layout in itertools.product(dtypes, STRIDED):
        cases.append(Case([inputs((5, 37), dtype, layouts=(layout, "contiguous", layout))]))
    for dtype in dtypes:
        layers = [inputs(shape, dtype) for shape in ((9, 301), (0,), (33, 20), (7, 700), (3, 1100))]
        cases.append(Case(layers, per_row=True))
    return cases


def race_cases() -> list[Case]:
    """Several chunks and groups in a segment, and chunks that are repeated in double; for the small policy."""
    f, g, b = inputs((5 * 1024 + 3,), BF16)
    g[0] = torch.nan
    many = [(f, g, b), inputs((3,), BF16), inputs((2048,), BF16)]
    several = inputs((2 * GROUP + 3,), BF16)
    return [Case(many), Case([several], repeats=2), Case([several])]


def test_address_and_undefined_sanitizers_are_silent(programs: Programs) -> None:
    layers = [layer for layer in mixed_layers(12) if layer[0].numel() < 2 * CHUNK]
    run(programs["asan"], [*memory_cases(), Case(layers), race_cases()[0]])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_thread_sanitizer_is_silent(programs: Programs, seed: int) -> None:
    rows_case = Case([inputs((9, 301), torch.float32), inputs((3, ROW), torch.float32)], per_row=True)
    run(programs["tsan"], [*race_cases(), rows_case], seed=seed)


def checks(program: Path) -> dict[str, Callable[[], None]]:
    """Those that find the bugs of the builds without a sanitizer."""
    layers = [inputs((size,), BF16) for size in (3, 4 * CHUNK + 1, 9, 5 * CHUNK, 5)] + [inputs((2,), BF16)] * 100

    def sums() -> None:
        (result,) = rows(program, Case(layers))
        for i, layer in enumerate(layers):
            assert_close(result[i], feature_truth(*layer), what=f"sums of layer {i}")

    return {
        "tickets": lambda: check_tickets(program),
        "same bits": lambda: check_same_bits(program),
        "sums": sums,
        "sums at the borders": lambda: check_borders(program, BF16),
        "rows": lambda: check_rows(program, 600),
        "long sum": lambda: check_long_sum(program),
        "non-finite": lambda: check_non_finite(program, BF16, BF16, False),
        "extremes": lambda: check_extremes(program, (BF16,)),
    }


@pytest.mark.parametrize("name", BUGS)
def test_seeded_bug_is_caught(programs: Programs, name: str) -> None:
    bug, program = BUGS[name], programs[name]
    if bug.build in ("plain", "small"):
        with pytest.raises(AssertionError, match=f"{bug.sign}|tickets"):
            checks(program)[bug.sign]()
        return
    cases = memory_cases((BF16,), whole=False) if bug.build == "asan" else race_cases()
    if bug.mixed:
        cases = [Case([inputs((3000,), BF16, torch.float32), inputs((3,), BF16, torch.float32)])]
    done = run(program, cases, seed=1, check=False)
    assert done.code != 0
    assert bug.sign in done.text


@pytest.mark.parametrize("build", ["plain", "small"])
def test_unchanged_kernels_pass_the_checks_for_bugs(programs: Programs, build: str) -> None:
    for check in checks(programs[build]).values():
        check()
