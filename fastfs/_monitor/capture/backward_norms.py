"""Squared norms of the backward vectors of a step that is only predicted."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor

__all__ = ["Squares"]


class Squares:
    """What the sampler gave for every gradient that came to a layer's features, by backward and visit."""

    def __init__(self, layers: int) -> None:
        self._parts: list[list[tuple[int, int, int, tuple[Tensor, float]]]] = [[] for _ in range(layers)]
        self._lost: set[int] = set()  # layers of which a part is missing
        self._visits = itertools.count()

    def __bool__(self) -> bool:
        return any(self._parts)

    def visit(self) -> int:
        """A number for one more visit of a layer."""
        return next(self._visits)

    def add(self, layer: int, visit: int, backward: int, elements: int, square: tuple[Tensor, float]) -> None:
        self._parts[layer].append((backward, visit, elements, square))

    def lose(self, layer: int) -> None:
        """A part of this layer could not be taken: its norm is not known."""
        self._lost.add(layer)

    def clear(self) -> None:
        for parts in self._parts:
            parts.clear()
        self._lost.clear()

    def per_layer(self, counts: Callable[[int], bool]) -> list[tuple[int, list[tuple[Tensor, float]]]]:
        """How many elements the backward vectors have, and their squares, from the backwards that count.

        None of a layer of which a part was lost, or whose visit two of these backwards came to: their norms do not tell
        that of the sum.
        """
        whole = ([] if layer in self._lost else parts for layer, parts in enumerate(self._parts))
        found = [[part for part in parts if counts(part[0])] for parts in whole]
        once = [parts if len({visit for _, visit, *_ in parts}) == len(parts) else [] for parts in found]
        return [(sum(size for *_, size, _ in parts), [square for *_, square in parts]) for parts in once]
