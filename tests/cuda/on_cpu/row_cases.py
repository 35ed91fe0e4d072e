"""Runs cases of the row ops through their kernels, compiled for the host."""

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tests.cuda.on_cpu.harness import DTYPES, exchange, reached


@dataclass
class RowCase:
    """A call, and how to launch it. `copy` None: squares alone."""

    x: Tensor
    rows: Tensor
    row_dims: int
    copy: torch.dtype | None
    multiprocessors: int = 2
    misaligned: int = 0  # elements of x
    copy_misaligned: int = 0  # elements of the copy


@dataclass
class RowResult:
    """The copy (None without), the squares and the number of launches."""

    copy: Tensor | None
    squares: Tensor
    launches: int


@dataclass
class RowRun:
    """A finished driver."""

    code: int
    text: str
    results: list[RowResult] = field(default_factory=list)


def run_rows(program: Path, cases: list[RowCase], *, seed: int = 0, check: bool = True) -> RowRun:
    """Runs the cases in one process; `seed` shuffles the order of blocks and threads."""
    code, text, data = exchange(program, [_encode(case) for case in cases], seed, check)
    outcome = RowRun(code, text)
    if code == 0:
        at = 0
        for case in cases:
            launches, size = struct.unpack_from("2q", data, at)
            at += 16
            copy = None
            if case.copy is not None:
                width = math.prod(case.x.shape[case.row_dims :])
                copy = _tensor(data[at : at + size], case.copy).view(len(case.rows), width)
            at += size
            (kept,) = struct.unpack_from("q", data, at)
            squares = _tensor(data[at + 8 : at + 8 + 8 * kept], torch.float64)
            at += 8 + 8 * kept
            outcome.results.append(RowResult(copy, squares, launches))
        assert at == len(data)
    return outcome


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _encode(case: RowCase) -> bytes:
    x, rows = case.x, case.rows
    data = reached(x)
    head = [case.multiprocessors, DTYPES[x.dtype], case.row_dims, x.dim(), *x.shape, *x.stride()]
    head += [case.misaligned * x.element_size(), len(data)]
    stride = max(rows.stride(0), 1)
    index = torch.zeros(len(rows) * stride, dtype=torch.int64)
    index[::stride] = rows
    tail = [len(rows), stride, *index.tolist()]
    tail += [-1, 0] if case.copy is None else [DTYPES[case.copy], case.copy_misaligned * case.copy.itemsize]
    return struct.pack(f"{len(head)}q", *head) + data + struct.pack(f"{len(tail)}q", *tail)
