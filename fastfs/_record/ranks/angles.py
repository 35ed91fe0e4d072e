"""The last measured angles, by which speeds are predicted between measured steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastfs._record.ranks.part import Array

__all__ = ["LastAngles", "within"]

_CAPACITY = 32  # sorts of steps that are remembered

Key = tuple[bytes, tuple[bool, ...]]


class LastAngles:
    """Cosines of the last angle of each layer, for each sort of step.

    A sort of step is given by the parameters that receive a gradient (a byte each) and the layers that run. Parameters
    without a gradient in some of the steps only (an expert without a token) do not matter: they add nothing.

    Args:
        layers: Number of layers.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._cosines: OrderedDict[Key, Array] = OrderedDict()

    def keep(self, key: Key, cosines: Array, where: Any) -> None:
        """Keeps the cosines of a measured step, for this key and for keys that differ by parameters without a gradient.

        Args:
            key: Of the step.
            cosines: Of its angles, (L,).
            where: Layers whose cosine may be used, bool (L,).
        """
        touched, ran = key
        self._cosines.setdefault(key, np.full(self._layers, np.nan))
        self._cosines.move_to_end(key)
        if len(self._cosines) > _CAPACITY:
            self._cosines.popitem(last=False)
        for (others, layers), last in self._cosines.items():
            if layers == ran and (within(touched, others) or within(others, touched)):
                last[where] = cosines[where]

    def find(self, key: Key) -> Array | None:
        """Returns the cosines for a step, (L,) with NaN where none is known; None if no such step was measured."""
        found = self._cosines.get(key)
        if found is not None:
            return found
        touched, ran = key
        for (others, layers), last in reversed(self._cosines.items()):
            if layers == ran and within(touched, others):
                return last
        return None

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the cosines as plain values, NaN as None."""
        return [
            {"touched": list(touched), "ran": list(ran), "cosine": [None if x != x else x for x in last.tolist()]}
            for (touched, ran), last in self._cosines.items()
        ]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Restores a state; entries of another number of layers are left out."""
        self._cosines.clear()
        for each in state:
            if len(each["cosine"]) == self._layers:
                cosine = [np.nan if x is None else float(x) for x in each["cosine"]]
                self._cosines[bytes(each["touched"]), tuple(map(bool, each["ran"]))] = np.asarray(cosine)


def within(touched: bytes, others: bytes) -> bool:
    """Returns whether every parameter with a gradient in one step has one in the other, too."""
    return len(touched) == len(others) and all(b or not a for a, b in zip(touched, others, strict=True))
