"""What is measured: features, features after an update, backward vectors; and copies of them that outlast the cache.

A call on inputs that an earlier call has left in the cache is not limited by the memory. So small inputs come in so
many copies that all of them together are several times as large as the cache, and the calls take them in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["COLD", "Dtypes", "Inputs", "Turns", "bytes_of", "copies_for", "make_inputs"]

Inputs = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""Features before, features after, backward vectors: one tensor per layer."""

Dtypes = tuple[torch.dtype, torch.dtype]
"""That of the features, and that of the backward vectors."""

COLD = 4
"""All copies together are so many times as large as the cache."""

_TILE = 2**20
"""Random numbers that large inputs repeat."""

T = TypeVar("T")


def copies_for(size: int, cache: int) -> int:
    """How many copies of inputs of `size` bytes are needed, so that each is out of the cache when its turn comes."""
    return max(1, math.ceil(COLD * cache / max(1, size)))


class Turns:
    """Whose turn it is among so many copies. All contestants share one, so none finds what another has just read."""

    def __init__(self, copies: int) -> None:
        self.copies = copies
        self._next = 0

    def next(self) -> int:
        """The copy for the next call."""
        turn = self._next
        self._next = (turn + 1) % self.copies
        return turn

    def over(self, calls: Sequence[Callable[[], T]]) -> Callable[[], T]:
        """One call for those of all copies: each time it is called, that of the next copy.

        Raises:
            ValueError: there are not as many calls as copies.
        """
        if len(calls) != self.copies:
            raise ValueError(f"expected {self.copies} calls, one per copy, got {len(calls)}")
        return lambda: calls[self.next()]()


def make_inputs(
    shapes: Sequence[tuple[int, ...]], dtypes: Dtypes, device: torch.device, copies: int = 1
) -> list[Inputs]:
    """Copies of one call's inputs: normal features, a relative update of 0.1, backward vectors of 1e-3.

    Args:
        shapes: one per layer.
        dtypes: of features and of backward vectors.
        device: where to.
        copies: as many as :func:`copies_for` says.
    """
    generator = torch.Generator(device).manual_seed(0)
    f, change, b = (torch.empty(_TILE, device=device).normal_(generator=generator) for _ in range(3))
    tiles = f.to(dtypes[0]), (f + 0.1 * change).to(dtypes[0]), (1e-3 * b).to(dtypes[1])
    lists: list[list[list[Tensor]]] = [[[] for _ in range(copies)] for _ in tiles]
    for layer, shape in enumerate(shapes):
        for kind, tile in enumerate(tiles):
            buffer = torch.empty((copies, *shape), dtype=tile.dtype, device=device)
            _fill(buffer, tile, layer * 7919 % _TILE)  # layers differ, so that mixing them up would show
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
    """Bytes of all tensors."""
    return sum(x.numel() * x.element_size() for tensors in inputs for x in tensors)
