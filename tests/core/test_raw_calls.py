"""The raw entry points of the core: arguments that would be read or written beyond their memory are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastfs._core import ops
from fastfs._stats import ParameterStats

_C = ops._C

pytestmark = pytest.mark.skipif(_C is None, reason="needs the native core")


def freed(*shape: Any, dtype: Any = torch.float32) -> Any:
    tensor = torch.ones(shape, dtype=dtype)
    tensor.untyped_storage().resize_(0)
    return tensor


def out(rows: int = 1, columns: int = 9) -> Any:
    return torch.empty(rows, columns, dtype=torch.float64)


X = torch.ones(4, 3)
PARAMETERS = len(ParameterStats.names)
MEASURE: Any = _C.feature_stats_cpu if _C is not None else None
F64 = {"dtype": torch.float64}


@pytest.mark.parametrize(
    "call",
    [
        lambda: MEASURE(([freed(4, 3)], [X], [X]), False, out(), 1),
        lambda: MEASURE(([X], [X], [freed(4, 3)]), False, out(), 1),
        lambda: MEASURE(([X], [X], [X]), False, freed(1, 9, **F64), 1),
        lambda: MEASURE(([X], [X], [X]), False, out(2), 1),
        lambda: MEASURE(([X], [X], [X]), True, out(1), 1),
        lambda: MEASURE(([X], [X], [X]), False, out(1, 8), 1),
        lambda: MEASURE(([X], [X], [X]), False, out().float(), 1),
        lambda: MEASURE(([X], [X], [X]), False, torch.empty(9, 1, **F64).t()[:, ::2], 1),
        lambda: MEASURE(([X], [X, X], [X]), False, out(), 1),
        lambda: MEASURE(([X], [X]), False, out(), 1),
        lambda: MEASURE(([X], [X], [X.long()]), False, out(), 1),
        lambda: MEASURE(([X], [X], [X[:2]]), False, out(), 1),
        lambda: MEASURE(([X], [X], [X]), False, out(), 0),
        lambda: MEASURE(([X], [X], [X]), False, out(), -3),
        lambda: _C.linear_stats_cpu(([X], [X], [X]), freed(1, 4, **F64), out(1, PARAMETERS), 1),
        lambda: _C.linear_stats_cpu(([X], [X], [X]), torch.ones(1, 3, **F64), out(1, PARAMETERS), 1),
        lambda: _C.stream_read_cpu(([X[:1].expand(1000, 3)],) * 3, 1),
        lambda: _C.stream_read_cpu(([X],) * 3, 0),
        lambda: _C.gather_rows_cpu(freed(4, 3), torch.tensor([0]), 1, None, out(1, 1)[0], 1),
        lambda: _C.gather_rows_cpu(X, freed(1, dtype=torch.int64), 1, None, out(1, 1)[0], 1),
        lambda: _C.gather_rows_cpu(X, torch.tensor([0]), 1, None, freed(1, **F64), 1),
        lambda: _C.gather_rows_cpu(X, torch.tensor([0]), 1, freed(1, 3), out(1, 1)[0], 1),
        lambda: _C.gather_rows_cpu(X, torch.tensor([0]), 1, torch.empty(2, 3), out(1, 1)[0], 1),
        lambda: _C.gather_rows_cpu(X, torch.tensor([0]), -1, None, out(1, 1)[0], 1),
        lambda: _C.gather_rows_cpu(X, torch.tensor([0]), 3, None, out(1, 1)[0], 1),
        lambda: _C.gather_rows_cpu(X, torch.tensor([0]), 1, None, out(1, 1)[0], 0),
        lambda: _C.RecordLines([("angle", 4)], [], []),
        lambda: _C.RecordLines([], [], []).expect("a", -1, 3),
        lambda: _C.RecordLines([], [], []).expect("a", 0, -3),
        lambda: _C.RecordLines([], [], []).read(b"abc\n", 5),
        lambda: _C.RecordLines([], [], []).strings(1),
    ],
)
def test_absurd_arguments_are_refused(call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        call()


@pytest.mark.parametrize("row", [-1, 4, 2**40, -(2**62)])
def test_rows_that_are_not_there_are_refused(row: Any) -> None:
    with pytest.raises(IndexError):
        _C.gather_rows_cpu(X, torch.tensor([row]), 1, None, out(1, 1)[0], 1)


@pytest.mark.parametrize("wrong", [None, 3, "x", [1], object()])
def test_what_is_no_tensor_is_refused(wrong: Any) -> None:
    for call in (
        lambda: MEASURE(([wrong], [X], [X]), False, out(), 1),
        lambda: MEASURE(([X], [X], [X]), False, wrong, 1),
        lambda: MEASURE((wrong, [X], [X]), False, out(), 1),
        lambda: _C.gather_rows_cpu(wrong, torch.tensor([0]), 1, None, out(1, 1)[0], 1),
        lambda: _C.count_rows([wrong]),
        lambda: _C.RecordLines([], [], []).read(wrong, 0),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            call()


def test_empty_tensors_are_fine() -> None:
    empty = torch.ones(0, 3)
    into = out()
    MEASURE(([empty], [empty], [empty]), False, into, 1)
    assert into.tolist() == [[0.0] * 9]
    MEASURE(([], [], []), False, out(0), 1)
