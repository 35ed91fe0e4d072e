"""Sums over many sets of rows at once, on the device, in a fixed number of operations."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfs._network.parameter_sets import ParameterSets

__all__ = ["IntervalSums", "SegmentSums", "on_device"]

_WIDTH = 32  # of the tables; longer segments take several rows, which are summed in turn

_Ints = npt.NDArray[np.int64]


def on_device(numbers: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Copies an array to the device, without waiting for it."""
    host = torch.from_numpy(np.ascontiguousarray(numbers))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class SegmentSums:
    """Sums of S segments of rows of a matrix.

    The segments are gathered by tables padded to equal length, not scattered: the order of every sum is fixed on every
    device, and a non-finite number stays in the segments that contain it.

    Args:
        lengths: Lengths of the segments, (S,).
        device: Of the matrix.
        rows: The rows of each segment, one after the other; by default all rows in their order.
    """

    def __init__(self, lengths: _Ints, device: torch.device, rows: _Ints | None = None) -> None:
        lengths = np.asarray(lengths, dtype=np.int64)
        self._segments = len(lengths)
        self._tables: list[Tensor] = []
        self._length = int(lengths[0]) if len(lengths) else 0
        if rows is None and (lengths == self._length).all():
            return  # no table is needed
        rows = np.arange(int(lengths.sum())) if rows is None else rows
        while True:
            width = int(min(max(lengths.max(initial=1), 1), _WIDTH))
            parts = np.maximum(-(-lengths // width), 1)
            first = np.cumsum(parts) - parts
            table = np.full((int(parts.sum()), width), -1, dtype=np.int64)
            segment = np.repeat(np.arange(len(lengths)), lengths)
            place = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            table[first[segment] + place // width, place % width] = rows
            self._tables.append(on_device(table + 1, device))  # row 0 contains zeros
            if (parts == 1).all():
                return
            lengths, rows = parts, np.arange(int(parts.sum()))

    def __call__(self, matrix: Tensor) -> Tensor:
        """Sums (N, C) to (S, C)."""
        if not self._tables:
            return matrix.reshape(self._segments, self._length, matrix.shape[1]).sum(dim=1)
        for table in self._tables:
            padded = torch.cat([matrix.new_zeros((1, matrix.shape[1])), matrix])
            matrix = padded[table].sum(dim=1)
        return matrix


class IntervalSums:
    """Sums over sets of parameters, which are unions of intervals.

    An interval is the sum of a few nodes of a binary tree of sums. Unlike differences of running totals, these have no
    cancellation: a layer with small numbers is not affected by one with large numbers or NaN.

    Args:
        sets: The sets.
        device: Of the values.
    """

    def __init__(self, sets: ParameterSets, device: torch.device) -> None:
        self._depth = max(sets.columns - 1, 0).bit_length()
        self._padding = (1 << self._depth) - sets.columns
        self._numbering = on_device(sets.numbering, device)
        owner = np.repeat(np.arange(len(sets)), np.diff(sets.offsets))
        start, end = sets.bounds[:, 0].copy(), sets.bounds[:, 1].copy()
        owners, nodes = [owner[:0]], [start[:0]]
        base, size = 0, 1 << self._depth
        while len(start):
            for odd, node in ((start & 1) & (start < end), start), ((end & 1) & (start < end), end - 1):
                taken = odd.astype(np.bool_)
                owners.append(owner[taken])
                nodes.append(base + node[taken])
            start, end = (start + 1) >> 1, end >> 1
            base, size = base + size, size >> 1
            left = start < end
            owner, start, end = owner[left], start[left], end[left]
        owner = np.concatenate(owners)
        order = np.argsort(owner, kind="stable")
        self._sums = SegmentSums(np.bincount(owner, minlength=len(sets)), device, np.concatenate(nodes)[order])

    def __call__(self, values: Tensor) -> Tensor:
        """Sums (P, C) to (L, C)."""
        level = torch.nn.functional.pad(values[self._numbering], (0, 0, 0, self._padding))
        levels = [level]
        for _ in range(self._depth):
            level = level[0::2] + level[1::2]
            levels.append(level)
        return self._sums(torch.cat(levels))
