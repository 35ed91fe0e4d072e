"""Which rows of a feature tensor are kept, and how much memory all of them together may take.

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

__all__ = ["BudgetError", "Kept", "Sampler", "row_dims"]

_SUBSETS = 16  # remembered; batches of changing size have many


class BudgetError(RuntimeError):
    """What is to be copied does not fit into the memory budget."""


def row_dims(x: Tensor) -> int:
    """How many leading dimensions number the rows: all but the last up to 3 dimensions, the first one from 4 on."""
    dims = x.dim()
    return dims - 1 if 1 < dims <= 3 else min(dims, 1)


@dataclass(slots=True)
class Kept:
    """The rows kept of one tensor: (k, width), out of ``total``."""

    values: Tensor
    total: int

    @property
    def scale(self) -> float:
        """What a sum over the kept rows has to be multiplied with, as an estimate of the sum over all."""
        return self.total / self.values.shape[0] if self.values.shape[0] else 1.0


class Sampler:
    """Fixed random subsets of rows, from a generator of its own.

    The subset depends on the seed, the number of rows and how many are kept, so that the features before, the backward
    vector and the features after have the same rows, in every layer with as many.

    Args:
        rows: the most rows that are kept of a tensor; None for all.
        seed: of the subsets.
    """

    def __init__(self, rows: int | None, seed: int = 0) -> None:
        self.rows = rows
        self._seed = seed
        self._subsets: OrderedDict[tuple[int, int, torch.device], Tensor] = OrderedDict()

    def wanted(self, total: int) -> int:
        return total if self.rows is None else min(total, self.rows)

    def subset(self, total: int, kept: int, device: torch.device) -> Tensor:
        """``kept`` of the numbers below ``total``, ascending, on the device."""
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

    def keep(self, x: Tensor, kept: int) -> Kept:
        """A copy of ``kept`` rows of ``x``: (kept, width), contiguous."""
        dims = row_dims(x)
        total = math.prod(x.shape[:dims])
        if kept == total and _plain(x):  # a deep network has thousands of small features: the op takes longer to call
            copy = x.detach().clone(memory_format=torch.contiguous_format)
            return Kept(copy.view(total, math.prod(x.shape[dims:])), total)
        values, _ = torch.ops.fastfs.gather_rows(x, self.subset(total, kept, x.device), dims)
        return Kept(values, total)

    def squares(self, x: Tensor, most: int) -> tuple[Tensor, float]:
        """Squared norms of the wanted rows, ``most`` at most: float64 (k,), and the factor from their sum to all.

        Where these are all rows the norm of all of them, float64 (), in one operation.
        """
        dims = row_dims(x)
        total = math.prod(x.shape[:dims])
        kept = min(self.wanted(total), most)
        if kept == total and _plain(x):
            return torch.linalg.vector_norm(x.detach(), dtype=torch.float64), 1.0
        sums: Tensor = torch.ops.fastfs.row_squares(x, self.subset(total, kept, x.device), dims)
        return sums, total / kept if kept else 1.0


def _plain(x: Tensor) -> bool:
    """Whether nothing but memory is behind a tensor: no subclass, no wrapper of ``torch.func``, no pending sign."""
    if type(x) is not Tensor or x.layout is not torch.strided:
        return False
    return not (is_functorch_wrapped_tensor(x) or x.is_neg() or x.is_conj())
