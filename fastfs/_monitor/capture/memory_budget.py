"""How much memory the copies of a step may take, and how it is shared out."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

from torch import Tensor

from fastfs._monitor.capture.passes import Pass
from fastfs._monitor.capture.sampling import BudgetError, row_dims

__all__ = ["Budget"]

_UNKNOWN = 4  # micro-batches, or runs of a layer, that the first measured step is prepared for


class Budget:
    """Bytes that everything captured may take; they count as long as the pass that they belong to lives.

    Args:
        limit: bytes.
        copies: of every kept row that are held at a time: before, backward, after, ...
        layers: how many are watched; they have equal shares.
    """

    def __init__(self, limit: int, copies: int, layers: int) -> None:
        self.limit = limit
        self.copies = copies
        self.most = 0  # ever reckoned with at a time
        self.live: weakref.WeakSet[Pass] = weakref.WeakSet()
        # What the others took when a pass became the one that is written to: they are added up once a pass, not once a
        # visit. Some may have ended since, so they are counted anew before anything is refused.
        self._current: weakref.ref[Pass] | None = None
        self._others = 0
        self._layers = layers
        # Visits of a layer in a step, and forwards. Until one step is over several have to be reckoned with.
        self._visits = self._forwards = _UNKNOWN

    def take(self, passed: Pass, size: int, what: str) -> None:
        """Raises BudgetError if that many bytes are not left."""
        used = self._used(passed, size)
        if used + size > self.limit:
            left = self.limit - used
            raise BudgetError(f"{what} takes {size:,} bytes, and {left:,} of the memory budget are left")
        passed.bytes += size
        self.most = max(self.most, used + size)

    def row_bytes(self, features: Tensor) -> int:
        """What one row of these features takes, in all copies."""
        return math.prod(features.shape[row_dims(features) :]) * features.element_size() * self.copies

    def room(self, passed: Pass, size: int) -> int:
        """How many rows of ``size`` bytes one visit of a layer may keep; at least one, while anything is left."""
        wanted = max(self._share(passed), size)
        return min(wanted, self.limit - self._used(passed, wanted)) // size

    def learn(self, passes: Sequence[Pass], dropped: int) -> None:
        """How many forwards a step has, and how often a layer runs in it."""
        self._forwards = len(passes) + dropped
        most = max(sum(len(p.visits[i]) for p in passes) for i in range(self._layers))
        self._visits = max(1, math.ceil(most * self._forwards / len(passes)))

    def single(self) -> None:
        """A step has one forward."""
        self._visits = self._forwards = 1

    def _used(self, passed: Pass, wanted: int) -> int:
        """Bytes that are taken; exact where ``wanted`` more may be too many."""
        current = None if self._current is None else self._current()
        if current is not passed or self._others + passed.bytes + wanted > self.limit:
            self._current = weakref.ref(passed)
            self._others = sum(other.bytes for other in self.live if other is not passed)
        return self._others + passed.bytes

    def _share(self, passed: Pass) -> int:
        """Bytes for the rows of one visit, so that the inputs of later forwards have room, and the rows of all."""
        rest = self.limit - passed.inputs
        rest = max(rest // 2, rest - (self._forwards - 1) * passed.inputs)
        return rest // (self._layers * self._visits)
