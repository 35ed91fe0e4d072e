"""Squared norms of backward vectors, for steps whose features are predicted and not measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor

from fastfs._monitor.capture.sampling import RowSampler
from fastfs._network.feature_tensors import strided
from fastfs._network.placements import is_partial

__all__ = ["BackwardNorms"]

_ROWS = 256  # that enter the norm of a backward vector at a step that is only predicted


class BackwardNorms:
    """Collects a sampled squared norm for every gradient of a layer's features.

    Args:
        layers: Number of watched layers.
    """

    def __init__(self, layers: int) -> None:
        # Per layer: number of the backward, number of the layer call, elements, squared norms with their factor.
        self._parts: list[list[tuple[int, int, int, tuple[Tensor, float]]]] = [[] for _ in range(layers)]
        self._lost: set[int] = set()  # layers with a missing part
        self._calls = itertools.count()

    def __bool__(self) -> bool:
        return any(self._parts)

    def next_call(self) -> int:
        """Returns a number for one more layer call."""
        return next(self._calls)

    def add(self, layer: int, call: int, backward: int, elements: int, square: tuple[Tensor, float]) -> None:
        """Adds the squared norm of one gradient, as :meth:`RowSampler.squares` returns it."""
        self._parts[layer].append((backward, call, elements, square))

    def take(self, layer: int, call: int, backward: int, gradient: Tensor, sampler: RowSampler) -> None:
        """Adds the squared norm of one gradient. A partial sum over ranks has none on this rank."""
        if is_partial(gradient):
            self.lose(layer)
            return
        values = strided(gradient)
        self.add(layer, call, backward, values.numel(), sampler.squares(values, _ROWS))

    def lose(self, layer: int) -> None:
        """Marks the norm of a layer as unknown, because the norm of one gradient could not be computed."""
        self._lost.add(layer)

    def clear(self) -> None:
        """Forgets all norms."""
        for parts in self._parts:
            parts.clear()
        self._lost.clear()

    def per_layer(self, counts: Callable[[int], bool]) -> list[tuple[int, list[tuple[Tensor, float]]]]:
        """Returns per layer the number of elements of its backward vectors and their squared norms.

        Only gradients of backwards that count enter. A layer has no norms if a part was lost, or if two of these
        backwards reached the same call: the norm of a sum does not follow from the norms of its terms.

        Args:
            counts: Tells by the number of a backward whether it counts.
        """
        whole = ([] if layer in self._lost else parts for layer, parts in enumerate(self._parts))
        found = [[part for part in parts if counts(part[0])] for parts in whole]
        once = [parts if len({call for _, call, *_ in parts}) == len(parts) else [] for parts in found]
        return [(sum(size for *_, size, _ in parts), [square for *_, square in parts]) for parts in once]
