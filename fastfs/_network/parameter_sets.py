"""Many sets of parameters, each as few intervals: what lies below each of thousands of layers.

A matrix of L layers by P parameters grows with the square of the depth. But the parameters can be numbered so that what
lies below a layer is an interval or a few of them: in the order in which the forward comes by. A set is a row of
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
"""Ascending intervals that do not touch: first position, position behind the last, first of the next, ..."""

EMPTY: Intervals = ()

_Ints = npt.NDArray[np.int64]


def union(sets: Sequence[Intervals]) -> Intervals:
    """Of sets that are not empty. Interval by interval: what they hold in common costs nothing more."""
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
    """Of ascending positions."""
    merged: list[int] = []
    for position in positions:
        if merged and position == merged[-1]:
            merged[-1] = position + 1
        else:
            merged += position, position + 1
    return tuple(merged)


@dataclass(frozen=True, eq=False)
class ParameterSets:
    """L sets of P parameters, in memory for the intervals alone.

    Attributes:
        numbering: int64 (P,) the parameter at each position.
        offsets: int64 (L + 1,) where the intervals of each set begin.
        bounds: int64 (K, 2) first position, and the one behind the last.
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
        """From bool (L, P), numbered as they come."""
        rows = bits.to(device="cpu", dtype=torch.bool).numpy()
        return cls.of(np.arange(rows.shape[1]), [intervals_of(np.flatnonzero(row).tolist()) for row in rows])

    @property
    def columns(self) -> int:
        return len(self.numbering)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def counts(self) -> _Ints:
        """How many parameters each set has: (L,)."""
        return self.total(np.ones(self.columns, dtype=np.int64))

    def total(self, values: npt.NDArray[Any]) -> _Ints:
        """The sum of integers (P,), of each parameter, over each set: (L,)."""
        upto = np.concatenate([[0], np.cumsum(values[self.numbering], dtype=np.int64)])
        sums = np.concatenate([[0], np.cumsum(upto[self.bounds[:, 1]] - upto[self.bounds[:, 0]])])
        found: _Ints = sums[self.offsets[1:]] - sums[self.offsets[:-1]]
        return found

    def row(self, index: int) -> _Ints:
        """The parameters of one set, ascending."""
        bounds = self.bounds[self.offsets[index] : self.offsets[index + 1]]
        return np.sort(np.concatenate([self.numbering[:0], *(self.numbering[a:b] for a, b in bounds)]))

    def dense(self) -> Tensor:
        """bool (L, P) on the CPU."""
        steps = np.zeros((len(self), self.columns + 1), dtype=np.int8)
        rows = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        steps[rows, self.bounds[:, 0]] += 1  # intervals of a set do not touch, so no place is met twice
        steps[rows, self.bounds[:, 1]] -= 1
        bits = np.zeros((len(self), self.columns), dtype=np.bool_)
        bits[:, self.numbering] = np.cumsum(steps[:, :-1], axis=1, dtype=np.int8).astype(np.bool_)
        return torch.from_numpy(bits)

    def same_as(self, other: ParameterSets) -> bool:
        """Whether the sets are the same, however they are numbered."""
        if np.array_equal(self.numbering, other.numbering):
            return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.bounds, other.bounds)
        if len(self) != len(other) or self.columns != other.columns:
            return False
        if not np.array_equal(self.counts(), other.counts()):
            return False
        return all(np.array_equal(self.row(index), other.row(index)) for index in range(len(self)))

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors on the CPU."""
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in ("numbering", "offsets", "bounds")}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> ParameterSets:
        return cls(*(state[name].cpu().numpy() for name in ("numbering", "offsets", "bounds")))
