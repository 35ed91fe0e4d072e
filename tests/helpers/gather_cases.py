"""Calls of gather_rows and row_squares in the native core and in the reference, and tensors for them."""

import math

import torch
from torch import Tensor

from tests.helpers.compare import assert_same

# Shape and the number of dimensions that number rows.
SHAPES = (
    ((), 0),
    ((7,), 1),
    ((7,), 0),
    ((1, 1), 1),
    ((64, 33), 1),
    ((9, 255), 1),
    ((9, 256), 1),
    ((6, 1024), 1),
    ((6, 1025), 1),
    ((3, 8191), 1),
    ((3, 8193), 1),
    ((2, 3, 16), 2),
    ((2, 3, 17), 1),
    ((2, 3, 17), 0),
    ((2, 3, 17), 3),
    ((2, 8, 6, 7), 1),
    ((2, 8, 6, 7), 2),
    ((2, 8, 6, 7), 3),
    ((3, 1, 257, 2), 2),
    ((2, 67 * 8192 + 5), 1),
)
Call = tuple[Tensor, Tensor]


def gather(x: Tensor, rows: Tensor, row_dims: int, dtype: torch.dtype | None = None) -> Call:
    """The op, and what every call of it must fulfil."""
    out, squares = torch.ops.fastfs.gather_rows(x, rows, row_dims, dtype)
    assert out.is_contiguous()
    assert out.dtype == (dtype or x.dtype)
    assert squares.dtype == torch.float64
    assert_same(torch.ops.fastfs.row_squares(x, rows, row_dims), squares, "squares alone")
    return out, squares


def rows_for(x: Tensor, row_dims: int, count: int = 12) -> Tensor:
    """Row numbers in any order, with repeats, first and last row among them."""
    rows = math.prod(x.shape[:row_dims])
    chosen = torch.randint(0, rows, (count,))
    chosen[0], chosen[1], chosen[2] = rows - 1, 0, rows - 1
    return chosen.to(x.device)


def table(x: Tensor, row_dims: int) -> Tensor:
    return x.reshape(math.prod(x.shape[:row_dims]), math.prod(x.shape[row_dims:]))


def values(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(device, dtype)
