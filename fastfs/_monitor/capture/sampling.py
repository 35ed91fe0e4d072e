"""Chooses and copies rows of feature tensors.

A row is one sample of the features: one token of (batch, tokens, width), one image of (batch, channels, height, width).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

__all__ = ["BudgetError", "KeptRows", "RowSampler", "row_dims"]

_SUBSETS = 16  # cached subsets; batches of varying size need several


class BudgetError(RuntimeError):
    """Raised if a copy does not fit into the memory budget."""


def row_dims(x: Tensor) -> int:
    """Returns how many leading dimensions index rows: all but the last of up to 3 dimensions, else the first one."""
    dims = x.dim()
    return dims - 1 if 1 < dims <= 3 else min(dims, 1)


@dataclass(slots=True)
class KeptRows:
    """Rows kept of one tensor.

    Attributes:
        values: The rows, shape (k, width).
        total: Number of rows of the tensor.
    """

    values: Tensor
    total: int

    @property
    def scale(self) -> float:
        """Factor from a sum over the kept rows to an estimate of the sum over all rows."""
        return self.total / self.values.shape[0] if self.values.shape[0] else 1.0


class RowSampler:
    """Selects fixed random subsets of rows, with a generator of its own.

    A subset depends only on the seed, the number of rows and how many are kept. Features before, backward vector and
    features after therefore have the same rows, and so have all layers with equally many.

    Args:
        rows: The most rows that are kept of a tensor; None for all.
        seed: Seed of the subsets.
    """

    def __init__(self, rows: int | None, seed: int = 0) -> None:
        self.rows = rows
        self._seed = seed
        self._subsets: OrderedDict[tuple[int, int, torch.device], Tensor] = OrderedDict()

    def wanted(self, total: int) -> int:
        """Returns how many of ``total`` rows are kept if memory allows."""
        return total if self.rows is None else min(total, self.rows)

    def subset(self, total: int, kept: int, device: torch.device) -> Tensor:
        """Returns ``kept`` of the integers below ``total``, ascending, on the device: int64 (kept,)."""
        key = total, kept, device
        if key in self._subsets:
            self._subsets.move_to_end(key)
            return self._subsets[key]
        if kept < total:
            numbers = np.random.default_rng((self._seed, total, kept)).choice(total, kept, replace=False, shuffle=False)
            numbers.sort()
        else:
            numbers = np.arange(total)
        host = torch.from_numpy(numbers)
        index = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
        self._subsets[key] = index
        if len(self._subsets) > _SUBSETS:
            self._subsets.popitem(last=False)
        return index

    def keep(self, x: Tensor, kept: int) -> KeptRows:
        """Returns a contiguous copy of ``kept`` rows of ``x``, shape (kept, width)."""
        dims = row_dims(x)
        total = math.prod(x.shape[:dims])
        if kept == total and _plain(x):  # for the thousands of small features of a deep network, a clone is faster
            copy = x.detach().clone(memory_format=torch.contiguous_format)
            return KeptRows(copy.view(total, math.prod(x.shape[dims:])), total)
        values, _ = torch.ops.fastfs.gather_rows(x, self.subset(total, kept, x.device), dims)
        return KeptRows(values, total)

    def squares(self, x: Tensor, most: int) -> tuple[Tensor, float]:
        """Returns squared norms of at most ``most`` rows, float64 (k,), and the factor from their sum to all rows.

        If these are all rows, it returns the norm of the whole tensor instead, float64 (), in one operation.
        """
        dims = row_dims(x)
        total = math.prod(x.shape[:dims])
        kept = min(self.wanted(total), most)
        if kept == total and _plain(x):
            return torch.linalg.vector_norm(x.detach(), dtype=torch.float64), 1.0
        sums: Tensor = torch.ops.fastfs.row_squares(x, self.subset(total, kept, x.device), dims)
        return sums, total / kept if kept else 1.0


def _plain(x: Tensor) -> bool:
    """Returns whether a tensor is plain memory: no subclass, no functorch wrapper, no negative or conjugate bit."""
    if type(x) is not Tensor or x.layout is not torch.strided:
        return False
    return not (is_functorch_wrapped_tensor(x) or x.is_neg() or x.is_conj())
