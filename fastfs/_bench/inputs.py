"""Inputs of measurements: features before and after an update and backward vectors, in copies that exceed the cache.

A call on inputs that an earlier call left in the cache is not limited by memory bandwidth. Small inputs are therefore
copied until all copies together are several times as large as the cache, and calls use the copies round-robin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["COLD", "Dtypes", "Inputs", "RoundRobin", "bytes_of", "copies_for", "make_inputs"]

Inputs = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""Features before, features after, backward vectors: one tensor per layer."""

Dtypes = tuple[torch.dtype, torch.dtype]
"""Dtype of the features and dtype of the backward vectors."""

COLD = 4
"""Ratio of the size of all copies to the size of the cache."""

_TILE = 2**20
"""Number of random numbers, which larger inputs repeat."""

T = TypeVar("T")


def copies_for(size: int, cache: int) -> int:
    """Return how many copies of inputs of `size` bytes are needed so that none is in the cache when it is reused."""
    return max(1, math.ceil(COLD * cache / max(1, size)))


class RoundRobin:
    """Round-robin selection of input copies, shared by all implementations so that none reads a recently used copy."""

    def __init__(self, copies: int) -> None:
        self.copies = copies
        self._next = 0

    def next(self) -> int:
        """Return the index of the copy for the next call."""
        turn = self._next
        self._next = (turn + 1) % self.copies
        return turn

    def over(self, calls: Sequence[Callable[[], T]]) -> Callable[[], T]:
        """Combine one call per copy into a call that uses the next copy each time.

        Args:
            calls: one per copy.

        Returns:
            The combined call.

        Raises:
            ValueError: the number of calls differs from the number of copies.
        """
        if len(calls) != self.copies:
            raise ValueError(f"expected {self.copies} calls, one per copy, got {len(calls)}")
        return lambda: calls[self.next()]()


def make_inputs(
    shapes: Sequence[tuple[int, ...]], dtypes: Dtypes, device: torch.device, copies: int = 1
) -> list[Inputs]:
    """Create copies of the inputs of one call: normal features, a relative update of 0.1, backward vectors of 1e-3.

    Args:
        shapes: one per layer.
        dtypes: dtypes of features and backward vectors.
        device: device of the inputs.
        copies: number of copies, as from :func:`copies_for`.

    Returns:
        One triple of lists per copy.
    """
    generator = torch.Generator(device).manual_seed(0)
    f, change, b = (torch.empty(_TILE, device=device).normal_(generator=generator) for _ in range(3))
    tiles = f.to(dtypes[0]), (f + 0.1 * change).to(dtypes[0]), (1e-3 * b).to(dtypes[1])
    lists: list[list[list[Tensor]]] = [[[] for _ in range(copies)] for _ in tiles]
    for layer, shape in enumerate(shapes):
        for kind, tile in enumerate(tiles):
            buffer = torch.empty((copies, *shape), dtype=tile.dtype, device=device)
            _fill(buffer, tile, layer * 7919 % _TILE)  # layers differ, so that mixing them up would be detected
            for copy, tensor in zip(lists[kind], buffer.unbind(0), strict=True):
                copy.append(tensor)
    return list(zip(*lists, strict=True))


def _fill(out: Tensor, tile: Tensor, start: int) -> None:
    flat, at = out.view(-1), 0
    while at < flat.numel():
        part = tile[start : start + flat.numel() - at]
        flat[at : at + part.numel()] = part
        at, start = at + part.numel(), 0


def bytes_of(inputs: Sequence[Sequence[Tensor]]) -> int:
    """Return the size of all tensors in bytes."""
    return sum(x.numel() * x.element_size() for tensors in inputs for x in tensors)
