"""gather_rows and row_squares as ops: errors, opcheck, compilation, results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastfs import reference
from tests.helpers.cases import DTYPES
from tests.helpers.compare import assert_close_squares, assert_same, assert_same_values
from tests.helpers.gather_cases import SHAPES, Call, gather, rows_for, table, values

# torch's own, when its compiler is imported
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

# errors


@pytest.mark.parametrize(("bad", "at"), [([0, 6], 1), ([-1], 0), ([1, 2, 2**40, -5], 2)])
@pytest.mark.parametrize("call", [torch.ops.fastfs.gather_rows, torch.ops.fastfs.row_squares, reference.gather_rows])
def test_numbers_of_no_row_are_refused_on_the_cpu(call: Any, bad: list[Any], at: int) -> None:
    x = values((2, 3, 5), torch.float32)
    with pytest.raises(IndexError, match=rf"^rows\[{at}\] is {bad[at]}, expected the number of one of the 6 rows of x"):
        call(x, torch.tensor(bad), 2)


def test_there_is_no_row_in_an_empty_tensor() -> None:
    for x in (torch.empty(0, 3), torch.empty(0, 0)):
        for call in (torch.ops.fastfs.gather_rows, reference.gather_rows):
            with pytest.raises(IndexError, match=r"^rows\[0\] is 0, expected the number of one of the 0 rows of x"):
                call(x, torch.tensor([0]), 1)


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("call", [torch.ops.fastfs.gather_rows, torch.ops.fastfs.row_squares, reference.gather_rows])
def test_wrong_arguments_are_named(call: Any, fake: bool) -> None:
    mode = FakeTensorMode()
    x, rows = torch.ones(4, 3), torch.tensor([1])
    for changed, message in (
        ({"x": x.int()}, "x has dtype torch.int32, expected one of torch.float16, "),
        ({"rows": rows.int()}, r"rows is torch.int32 of shape \(1,\), expected an ordinary tensor of torch.int64"),
        ({"rows": rows[0]}, r"rows is torch.int64 of shape \(\), expected an ordinary tensor"),
        ({"rows": rows[None]}, r"rows is torch.int64 of shape \(1, 1\), expected an ordinary tensor"),
        ({"row_dims": 3}, r"row_dims is 3, expected 0 to 2, .*x has shape \(4, 3\)"),
        ({"row_dims": -1}, "row_dims is -1, expected 0 to 2"),
    ):
        arguments = {"x": x, "rows": rows, "row_dims": 1, **changed}
        if fake:
            arguments = {n: mode.from_tensor(a) if isinstance(a, Tensor) else a for n, a in arguments.items()}
        with pytest.raises(ValueError, match=message):
            call(*arguments.values())
    if call is not torch.ops.fastfs.row_squares:
        with pytest.raises(ValueError, match=r"dtype is torch.int64, expected one of torch.float16.* or None"):
            call(x, rows, 1, torch.int64)
    meta = torch.ones(4, 3, device="meta")
    with pytest.raises(ValueError, match="rows is on device cpu, expected meta as x is"):
        reference.gather_rows(meta, rows, 1)


def test_the_reference_names_what_is_no_ordinary_tensor() -> None:
    with pytest.raises(TypeError, match=r"^rows: expected a tensor, got list"):
        reference.gather_rows(torch.ones(2, 3), [0], 1)
    with pytest.raises(ValueError, match=r"^x is a tensor of layout torch.sparse_coo, expected an ordinary"):
        reference.gather_rows(torch.ones(2, 3).to_sparse(), torch.tensor([0]), 1)


# the dispatcher


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool, device: str) -> None:
    pytest.importorskip("expecttest")
    for shape, row_dims in (((5, 3), 1), ((2, 3, 40), 2), ((4, 4), 0), ((2, 0), 1)):
        x = values(shape, torch.float32, device).requires_grad_(requires_grad)
        rows = rows_for(x, row_dims)
        for dtype in (None, torch.bfloat16):
            torch.library.opcheck(torch.ops.fastfs.gather_rows.default, (x, rows, row_dims, dtype))
        torch.library.opcheck(torch.ops.fastfs.row_squares.default, (x, rows, row_dims))
    x = values((6, 8), torch.float16, device).t()
    torch.library.opcheck(torch.ops.fastfs.gather_rows.default, (x, rows_for(x, 1), 1, torch.float64))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend: str, device: str) -> None:
    torch._dynamo.reset()

    def kept(x: Tensor, rows: Tensor) -> Call:
        out, squares = torch.ops.fastfs.gather_rows(x * 2, rows, 2, torch.bfloat16)
        return out + 1, squares

    compiled = torch.compile(kept, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((2, 5, 8), (3, 4, 6)):
        x = values(shape, torch.float32, device)
        rows = rows_for(x, 2)
        for a, b in zip(compiled(x, rows), kept(x, rows), strict=True):
            assert torch.equal(a, b)
    torch._dynamo.reset()


def test_results_are_detached(device: str) -> None:
    x = values((5, 3), torch.float32, device).requires_grad_()
    for call in (torch.ops.fastfs.gather_rows, reference.gather_rows):
        out, squares = call(x, torch.tensor([1], device=device), 1)
        assert not out.requires_grad
        assert not squares.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_the_specification(dtype: torch.dtype, device: str) -> None:
    for shape, row_dims in SHAPES:
        x = values(shape, dtype, device)
        rows = rows_for(x, row_dims)
        out, _ = gather(x, rows, row_dims, torch.bfloat16)
        expected, exact = reference.gather_rows(x, rows, row_dims, torch.bfloat16)
        assert_same_values(out, expected)
        assert_close_squares(exact, table(x, row_dims)[rows], relative=1e-13)
        assert_same(reference.row_squares(x, rows, row_dims), exact)
