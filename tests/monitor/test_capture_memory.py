"""Copies of rows, whatever the layout, and the memory that they may take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastfs._core import ops
from fastfs._monitor.capture.forward_capture import ForwardCapture
from fastfs._monitor.capture.memory_budget import MemoryBudget
from fastfs._monitor.capture.sampling import BudgetError, RowChoice, RowSampler, row_dims


@pytest.mark.skipif(not ops.native_available(), reason="no native core")
@pytest.mark.parametrize("shape", [(), (3,), (4, 3), (2, 4, 3), (2, 3, 4, 5), (2, 3, 4, 5, 2), (0, 3), (4, 0), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_rows_are_copied_as_the_operator_does(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    transposed = x.transpose(0, -1) if x.dim() > 1 else x
    for features in (x, transposed, x.expand(2, *shape), x.requires_grad_()):
        total = rows_of(features)
        kept = RowSampler(None).keep(features, RowChoice(total, total))
        expected, _ = torch.ops.fastfs.gather_rows(features.detach(), torch.arange(total), row_dims(features))
        assert kept.choice.total == total
        assert kept.values.shape == expected.shape
        assert kept.values.is_contiguous()
        assert not kept.values.requires_grad
        assert torch.equal(kept.values, expected)
        assert kept.values.untyped_storage().data_ptr() != features.untyped_storage().data_ptr() or not features.numel()


@pytest.mark.skipif(not ops.native_available(), reason="no native core")
def test_a_view_with_a_pending_sign_is_copied_with_it() -> None:
    imaginary = torch.randn(3, 4, dtype=torch.complex64).conj().imag  # a view that is negated when it is read
    assert imaginary.is_neg()
    kept = RowSampler(None).keep(imaginary, RowChoice(3, 3))
    assert torch.equal(kept.values, imaginary.resolve_neg())
    assert not kept.values.is_neg()


def rows_of(x: Tensor) -> int:
    count = 1
    for size in x.shape[: row_dims(x)]:
        count *= size
    return count


def test_memory_that_is_given_back_can_be_taken_again() -> None:
    budget = MemoryBudget(100, 1, 1)
    first, second = ForwardCapture(1, 0), ForwardCapture(1, 0)
    budget.live.add(first)
    budget.live.add(second)
    budget.take(first, 60, "a")
    budget.take(second, 40, "b")
    with pytest.raises(BudgetError, match="c takes 1 bytes, and 0 of the memory budget are left"):
        budget.take(second, 1, "c")
    first.drop()
    budget.take(second, 60, "d")
    assert budget.room(second, 1) == 0
    del first
    second.drop()
    third = ForwardCapture(1, 0)
    budget.live.add(third)
    budget.take(third, 100, "e")
    assert budget.most == 100


def test_a_pass_that_ends_while_another_one_grows() -> None:
    budget = MemoryBudget(100, 1, 1)
    budget.expect_one_forward()
    old, new = ForwardCapture(1, 0), ForwardCapture(1, 0)
    budget.live.add(old)
    budget.take(old, 80, "a")
    budget.live.add(new)
    budget.take(new, 10, "b")
    assert budget.room(new, 10) == 1
    del old
    assert budget.room(new, 10) == 9
    budget.take(new, 90, "c")
    with pytest.raises(BudgetError, match="0 of the memory budget are left"):
        budget.take(new, 1, "d")
