"""gather_rows and row_squares: rows, casts and squared norms against torch, on the CPU and the GPU."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ops.graphs import nothing_waits
from fastfs import reference
from fastfs._core import ops
from tests.helpers.busy_device import occupied
from tests.helpers.cases import DTYPES, LAYOUTS, run_apart
from tests.helpers.compare import assert_close_squares, assert_same, assert_same_values
from tests.helpers.gather_cases import SHAPES, gather, rows_for, table, values

# torch's own, when its compiler is imported
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_casts_and_squares(dtype: torch.dtype, to: torch.dtype, device: str) -> None:
    for shape, row_dims in SHAPES:
        x = values(shape, dtype, device)
        rows = rows_for(x, row_dims)
        out, squares = gather(x, rows, row_dims, to)
        what = f"{shape} {row_dims}"
        expected = table(x, row_dims)[rows]
        assert_same_values(out, expected.to(to), what)
        assert_close_squares(squares, expected, what=what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dtype_of_x_is_the_default(dtype: torch.dtype, device: str) -> None:
    x = values((5, 3), dtype, device)
    rows = rows_for(x, 1)
    assert_same_values(gather(x, rows, 1)[0], x[rows])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: Any, device: str) -> None:
    for dtype, (shape, row_dims) in itertools.product(DTYPES, SHAPES[:-1]):
        x = LAYOUTS[layout](values(shape, dtype, device))
        rows = rows_for(x, row_dims)
        to = DTYPES[(len(shape) + row_dims) % 4]
        out, squares = gather(x, rows, row_dims, to)
        what = f"{layout} {shape} {row_dims} {dtype}"
        assert_same_values(out, table(x, row_dims)[rows].to(to), what)
        assert_same(squares, gather(x.contiguous(), rows, row_dims)[1], what)


def test_more_layouts_of_rows_and_width(device: str) -> None:
    x = values((4, 6, 5, 8, 3), torch.bfloat16, device)
    for order in ((4, 3, 2, 1, 0), (1, 0, 2, 4, 3), (2, 0, 4, 1, 3), (0, 2, 1, 3, 4)):
        moved = x.permute(order)[:, 1:, :, ::2]
        for row_dims in range(6):
            rows = rows_for(moved, row_dims)
            out, squares = gather(moved, rows, row_dims, torch.float32)
            expected = table(moved, row_dims)[rows]
            assert_same_values(out, expected.float(), f"{order} {row_dims}")
            assert_same(squares, gather(expected, torch.arange(12, device=device), 1)[1], f"{order} {row_dims}")


def test_rows_may_be_strided_or_expanded(device: str) -> None:
    x = values((50, 40), torch.float32, device)
    rows = rows_for(x, 1, 30)
    for index in (rows[::3], rows[:1].expand(5), rows[5:6], rows.view(15, 2)[:, 1]):
        out, squares = gather(x, index, 1)
        assert_same_values(out, x[index])
        assert_close_squares(squares, x[index])


def test_large_offsets_in_a_view(device: str) -> None:
    """More than 2^31 elements, of which hardly any memory is touched."""
    buffer = torch.empty(2**31 + 300, dtype=torch.bfloat16, device=device)
    x = buffer.as_strided((3, 100), (2**30 + 100, 1))
    x.copy_(values((3, 100), torch.bfloat16, device))
    rows = torch.tensor([2, 0], device=device)
    assert_same_values(gather(x, rows, 1)[0], x[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_do(dtype: torch.dtype, device: str) -> None:
    none = torch.empty(0, dtype=torch.int64, device=device)
    for x, rows, row_dims, shape in (
        (values((5, 3), dtype, device), none, 1, (0, 3)),
        (values((0, 3), dtype, device), none, 1, (0, 3)),
        (values((2, 0, 3), dtype, device), none, 2, (0, 3)),
        (values((2, 0, 3), dtype, device), none, 1, (0, 0)),
        (values((2, 0), dtype, device), torch.tensor([1, 0, 1], device=device), 1, (3, 0)),
        (values((0,), dtype, device), torch.tensor([0, 0], device=device), 0, (2, 0)),
    ):
        out, squares = gather(x, rows, row_dims, torch.float32)
        assert out.shape == shape
        assert squares.shape == shape[:1]
        assert not squares.any()


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_is_cast_as_torch_does(dtype: torch.dtype, to: torch.dtype, device: str) -> None:
    """All 16-bit patterns; of the others the halves between them, extremes and subnormal numbers."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    if dtype in (torch.float16, torch.bfloat16):
        x = patterns.view(dtype)
    else:
        near = [patterns.view(d).to(torch.float64) for d in (torch.float16, torch.bfloat16)]
        middle = [(v[1:] + v[:-1]) / 2 for v in near]
        x = torch.cat([*near, *middle, *(v * (1 + s * 2.0**-e) for v in middle for s in (1, -1) for e in (12, 23, 40))])
        info = torch.finfo(torch.float32)
        extremes = [
            info.tiny,
            info.tiny / 3,
            info.smallest_normal * 2.0**-23,
            info.max,
            65519.99,
            65520.0,
            1e300,
            1e-300,
        ]
        x = torch.cat(
            [x, torch.tensor(extremes, dtype=torch.float64), torch.tensor(extremes, dtype=torch.float64).neg()]
        )
        x = x.to(dtype)
    x = torch.nn.functional.pad(x, (0, -len(x) % 256)).view(-1, 256).to(device)
    rows = torch.arange(len(x), device=device)
    assert_same_values(gather(x, rows, 1, to)[0], x.to(to), f"{dtype} to {to}")


def test_non_finite_entries(device: str) -> None:
    for dtype, width in itertools.product(DTYPES, (3, 300, 1100, 20_000)):
        x = values((6, width), dtype, device)
        x[1, 0], x[2, -1], x[3, width // 2] = torch.nan, torch.inf, -torch.inf
        x[4, 0], x[4, 1] = torch.inf, torch.nan
        rows = torch.tensor([0, 1, 2, 3, 4, 5, 1], device=device)
        for to in DTYPES:
            out, squares = gather(x, rows, 1, to)
            assert_same_values(out, x[rows].to(to))
            assert squares.isfinite().tolist() == [True, False, False, False, False, True, False]
            assert squares.isnan().tolist() == [False, True, False, False, True, False, True]
        assert_close_squares(squares[[0, 5]], x[[0, 5]])


def test_squares_out_of_the_range_of_float(device: str) -> None:
    for dtype, scale in (
        (torch.float16, 6e-8),
        (torch.float16, 1e4),
        (torch.bfloat16, 1e-38),
        (torch.float32, 1e-41),
        (torch.float32, 1e-25),
        (torch.bfloat16, 1e36),
        (torch.float32, 1e37),
        (torch.float64, 1e-150),
        (torch.float64, 1e150),
    ):
        for width in (40, 2000, 9000):
            x = values((4, width), torch.float64, device, scale).to(dtype)
            assert_close_squares(gather(x, torch.arange(4, device=device), 1)[1], x, what=f"{dtype} {scale} {width}")
    huge = torch.full((1, 3), 1e200, dtype=torch.float64, device=device)
    assert gather(huge, torch.zeros(1, dtype=torch.int64, device=device), 1)[1].tolist() == [math.inf]


def test_long_rows_do_not_drift(device: str) -> None:
    x = torch.ones(2, 3 * 8192, dtype=torch.float32, device=device)
    x[:, 0] = 4096.0  # in float, 2^24 + 1 is 2^24
    assert_close_squares(gather(x, torch.tensor([1], device=device), 1)[1], x[1:])


# the same bits


def everything() -> list[Tensor]:
    """Bits of copies and squares: shapes, dtypes, layouts, extremes."""
    results = []
    for i, (dtype, to) in enumerate(itertools.product(DTYPES, DTYPES)):
        for shape, row_dims in (*SHAPES[: None if i % 5 == 0 else -1], ((300, 768), 1), ((3, 50, 257), 2)):
            x = values(shape, torch.float64)
            if shape[-1:] == (768,):
                x[::3] *= 1e-30
                x[1::3] *= 1e25
                x[5, 7], x[8, 9] = torch.nan, torch.inf
            x = LAYOUTS["transposed" if i % 3 == 0 else "misaligned_by_1"](x.to(dtype))
            rows = rows_for(x, row_dims, 100 if x.numel() < 10**6 else 3)
            out, squares = torch.ops.fastfs.gather_rows(x, rows, row_dims, to)
            results += [out.view(torch.uint8).flatten(), squares.view(torch.uint8)]
    return results


@pytest.mark.slow
def test_number_of_threads(threads: Any) -> None:
    threads(1)
    torch.manual_seed(1)
    expected = everything()
    for n in (2, 5):
        threads(n)
        torch.manual_seed(1)
        for i, (a, b) in enumerate(zip(everything(), expected, strict=True)):
            assert torch.equal(a, b), f"{n} threads, result {i}"


FINGERPRINT = """
import hashlib
import torch
from fastfs._core import ops
from tests.core.test_gather import everything
torch.manual_seed(0)
torch.set_num_threads(THREADS)
data = [hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16] for x in everything()]
print(ops.build_info()["instruction_set"], *data)
"""


@pytest.mark.slow
def test_instruction_sets() -> None:
    names = ops.build_info()["usable_instruction_sets"]
    expected = None
    for i, name in enumerate(names):
        used, *hashes = run_apart(FINGERPRINT.replace("THREADS", str(1 + i)), FASTFS_CPU=name).split()
        assert used == name
        expected = expected or hashes
        differ = [i for i, (a, b) in enumerate(zip(hashes, expected, strict=True)) if a != b]
        assert not differ, f"{name} and {names[0]} differ in results {differ} of {len(hashes)}"


def test_flushing_of_subnormal_numbers() -> None:
    x = values((40, 300), torch.float32, scale=1e-41)
    rows = rows_for(x, 1)
    expected = gather(x, rows, 1, torch.bfloat16)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        out, squares = gather(x, rows, 1, torch.bfloat16)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(out.view(torch.int16), expected[0].view(torch.int16))
    assert_same(squares, expected[1])


# CUDA alone


@pytest.mark.gpu
@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_numbers_of_no_row_are_nan_on_the_gpu(to: torch.dtype) -> None:
    for dtype, width in itertools.product(DTYPES, (5, 2000, 9000)):
        x = values((6, width), dtype, "cuda")
        rows = torch.tensor([0, 6, -1, 5, 2**62, -(2**62)], device="cuda")
        for call in (torch.ops.fastfs.gather_rows, reference.gather_rows):
            out, squares = call(x, rows, 1, to)
            assert out[[1, 2, 4, 5]].isnan().all()
            assert squares.isnan().tolist() == [False, True, True, False, True, True]
            assert_same_values(out[[0, 3]], x[[0, 5]].to(to))
    empty = torch.empty(0, 3, device="cuda")
    assert torch.ops.fastfs.gather_rows(empty, rows, 1)[0].isnan().all()


@pytest.mark.gpu
def test_no_synchronisation_and_captured_in_a_graph() -> None:
    x = values((200, 9000), torch.bfloat16, "cuda")
    rows = rows_for(x, 1, 64)
    gather(x, rows, 1, torch.float32)
    with nothing_waits():
        torch.ops.fastfs.gather_rows(x, rows, 1, torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, squares = torch.ops.fastfs.gather_rows(x, rows, 1, torch.float32)
    for _ in range(3):
        x.normal_()
        rows.random_(200)
        graph.replay()
        assert_same_values(out, x[rows].float())
        assert_same(squares, torch.ops.fastfs.row_squares(x, rows, 1))


@pytest.mark.gpu
def test_current_stream() -> None:
    x = values((4000, 1000), torch.float32, "cuda")
    rows = rows_for(x, 1, 1000)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        occupied(0.1)
        y = x * 2
        out, squares = torch.ops.fastfs.gather_rows(y, rows, 1)
    # On another stream it would not have waited, and have read y before it was written.
    stream.synchronize()
    assert_same_values(out, x[rows] * 2)
    assert_close_squares(squares, x[rows] * 2)


@pytest.mark.gpu
def test_the_tensor_is_not_copied() -> None:
    x = values((4096, 4, 1024), torch.bfloat16, "cuda").transpose(0, 1)
    rows = rows_for(x, 2, 64)
    gather(x, rows, 2)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.ops.fastfs.gather_rows(x, rows, 2)
    assert torch.cuda.max_memory_allocated() - before < 2**20
