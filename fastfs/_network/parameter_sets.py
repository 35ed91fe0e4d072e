"""Sets of parameters as intervals: the parameters below each of thousands of layers.

A matrix of L layers by P parameters grows with the square of the depth. If the parameters are numbered in the order in
which the forward uses them, the parameters below a layer form one interval or a few. Each set is stored as a row of
intervals of positions in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["EMPTY", "Intervals", "ParameterSets", "intervals_of", "union"]

Intervals = tuple[int, ...]
"""Ascending intervals that do not touch: start and end (exclusive) of the first, start of the second, ..."""

EMPTY: Intervals = ()

_Ints = npt.NDArray[np.int64]


def union(sets: Sequence[Intervals]) -> Intervals:
    """Return the union of non-empty sets, interval by interval, so that common intervals cost nothing extra."""
    if len(sets) == 1:
        return sets[0]
    pairs = sorted({pair for each in sets for pair in zip(each[::2], each[1::2], strict=True)})
    merged: list[int] = []
    for start, end in pairs:
        if merged and start <= merged[-1]:
            merged[-1] = max(merged[-1], end)
        else:
            merged += start, end
    return tuple(merged)


def intervals_of(positions: Sequence[int]) -> Intervals:
    """Return ascending positions as intervals."""
    merged: list[int] = []
    for position in positions:
        if merged and position == merged[-1]:
            merged[-1] = position + 1
        else:
            merged += position, position + 1
    return tuple(merged)


@dataclass(frozen=True, eq=False)
class ParameterSets:
    """L sets of P parameters, stored as intervals.

    Attributes:
        numbering: int64 (P,) parameter at each position.
        offsets: int64 (L + 1,) row of ``bounds`` at which the intervals of each set begin.
        bounds: int64 (K, 2) start and end (exclusive) position of each interval.
    """

    numbering: _Ints
    offsets: _Ints
    bounds: _Ints

    @classmethod
    def of(cls, numbering: _Ints, sets: Sequence[Intervals]) -> ParameterSets:
        flat = [bound for each in sets for bound in each]
        offsets = np.cumsum([0, *(len(each) // 2 for each in sets)], dtype=np.int64)
        return cls(numbering, offsets, np.asarray(flat, dtype=np.int64).reshape(-1, 2))

    @classmethod
    def from_dense(cls, bits: Tensor) -> ParameterSets:
        """Create sets from bool (L, P), numbered by column."""
        rows = bits.to(device="cpu", dtype=torch.bool).numpy()
        return cls.of(np.arange(rows.shape[1]), [intervals_of(np.flatnonzero(row).tolist()) for row in rows])

    @property
    def columns(self) -> int:
        return len(self.numbering)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def counts(self) -> _Ints:
        """Return the number of parameters in each set: (L,)."""
        return self.total(np.ones(self.columns, dtype=np.int64))

    def total(self, values: npt.NDArray[Any]) -> _Ints:
        """Return the sum of the integers (P,), one per parameter, over each set: (L,)."""
        upto = np.concatenate([[0], np.cumsum(values[self.numbering], dtype=np.int64)])
        sums = np.concatenate([[0], np.cumsum(upto[self.bounds[:, 1]] - upto[self.bounds[:, 0]])])
        found: _Ints = sums[self.offsets[1:]] - sums[self.offsets[:-1]]
        return found

    def row(self, index: int) -> _Ints:
        """Return the parameters of one set in ascending order."""
        bounds = self.bounds[self.offsets[index] : self.offsets[index + 1]]
        return np.sort(np.concatenate([self.numbering[:0], *(self.numbering[a:b] for a, b in bounds)]))

    def dense(self) -> Tensor:
        """Return the sets as bool (L, P) on the CPU."""
        steps = np.zeros((len(self), self.columns + 1), dtype=np.int8)
        rows = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        steps[rows, self.bounds[:, 0]] += 1  # intervals of a set do not touch, so no position is incremented twice
        steps[rows, self.bounds[:, 1]] -= 1
        bits = np.zeros((len(self), self.columns), dtype=np.bool_)
        bits[:, self.numbering] = np.cumsum(steps[:, :-1], axis=1, dtype=np.int8).astype(np.bool_)
        return torch.from_numpy(bits)

    def same_as(self, other: ParameterSets) -> bool:
        """Whether the sets are equal, regardless of their numbering."""
        if np.array_equal(self.numbering, other.numbering):
            return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.bounds, other.bounds)
        if len(self) != len(other) or self.columns != other.columns:
            return False
        if not np.array_equal(self.counts(), other.counts()):
            return False
        return all(np.array_equal(self.row(index), other.row(index)) for index in range(len(self)))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the arrays as tensors on the CPU."""
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in ("numbering", "offsets", "bounds")}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> ParameterSets:
        return cls(*(state[name].cpu().numpy() for name in ("numbering", "offsets", "bounds")))
