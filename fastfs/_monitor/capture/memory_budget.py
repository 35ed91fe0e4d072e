"""Limits the memory that the copies of a step take, and divides it among layers and forwards."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

from torch import Tensor

from fastfs._monitor.capture.forward_capture import ForwardCapture
from fastfs._monitor.capture.sampling import BudgetError, row_dims

__all__ = ["MemoryBudget"]

_UNKNOWN = 4  # assumed number of micro-batches, and of calls per layer, before the first step is measured


class MemoryBudget:
    """Bounds the bytes of all captures that are alive.

    Args:
        limit: The bound in bytes.
        copies: How many copies of a kept row are held at a time: before, backward, after, ...
        layers: Number of watched layers, which get equal shares.

    Attributes:
        most: The most bytes that were ever reserved at a time.
        live: The captures whose bytes count.
    """

    def __init__(self, limit: int, copies: int, layers: int) -> None:
        self.limit = limit
        self.copies = copies
        self.most = 0
        self.live: weakref.WeakSet[ForwardCapture] = weakref.WeakSet()
        # Bytes of the other captures, summed once when a capture becomes the current one and not at every call. Some of
        # these may have been freed since, so they are summed again before anything is refused.
        self._current: weakref.ref[ForwardCapture] | None = None
        self._others = 0
        self._layers = layers
        # Calls per layer and forwards per step: an estimate until the first step has been measured.
        self._calls = self._forwards = _UNKNOWN

    def take(self, captured: ForwardCapture, size: int, what: str) -> None:
        """Charges bytes to a capture.

        Raises:
            BudgetError: The limit does not leave that many bytes.
        """
        used = self._used(captured, size)
        if used + size > self.limit:
            left = self.limit - used
            raise BudgetError(f"{what} takes {size:,} bytes, and {left:,} of the memory budget are left")
        captured.bytes += size
        self.most = max(self.most, used + size)

    def left(self, captured: ForwardCapture) -> int:
        """Returns the bytes that are left for a capture."""
        return max(self.limit - self._used(captured, self.limit), 0)

    def row_bytes(self, features: Tensor) -> int:
        """Returns the bytes of one row of these features, in all copies."""
        return math.prod(features.shape[row_dims(features) :]) * features.element_size() * self.copies

    def room(self, captured: ForwardCapture, size: int) -> int:
        """Returns how many rows of ``size`` bytes one layer call may keep: at least one while bytes are left."""
        wanted = max(self._share(captured), size)
        return min(wanted, self.limit - self._used(captured, wanted)) // size

    def learn(self, forwards: Sequence[ForwardCapture], dropped: int) -> None:
        """Learns from a measured step how many forwards a step has, and how often a layer is called in it."""
        self._forwards = len(forwards) + dropped
        most = max(sum(len(p.calls[i]) for p in forwards) for i in range(self._layers))
        self._calls = max(1, math.ceil(most * self._forwards / len(forwards)))

    def expect_one_forward(self) -> None:
        """Divides the budget for steps with one forward that calls every layer once."""
        self._calls = self._forwards = 1

    def _used(self, captured: ForwardCapture, wanted: int) -> int:
        """Returns the bytes in use. The number is exact if ``wanted`` more could exceed the limit."""
        current = None if self._current is None else self._current()
        if current is not captured or self._others + captured.bytes + wanted > self.limit:
            self._current = weakref.ref(captured)
            self._others = sum(other.bytes for other in self.live if other is not captured)
        return self._others + captured.bytes

    def _share(self, captured: ForwardCapture) -> int:
        """Returns the bytes for the rows of one call, such that later inputs and the rows of all layers have room."""
        rest = self.limit - captured.inputs
        rest = max(rest // 2, rest - (self._forwards - 1) * captured.inputs)
        return rest // (self._layers * self._calls)
