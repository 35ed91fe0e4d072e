"""Copies of sampled feature rows, within the memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fastfs._monitor.capture.forward_capture import ForwardCapture
from fastfs._monitor.capture.memory_budget import MemoryBudget
from fastfs._monitor.capture.sampling import KeptRows, RowSampler, row_dims
from fastfs._network.feature_tensors import strided

__all__ = ["RowKeeper"]


class RowKeeper:
    """Copies as many rows of a layer's features as the sampler wants and the budget allows.

    Args:
        layers: Number of watched layers.
        sampler: Chooses the rows.
        budget: Bounds the bytes that all copies take.
        warn: Called with a kind and a message if not even one row fits.
    """

    def __init__(
        self, layers: int, sampler: RowSampler, budget: MemoryBudget, warn: Callable[[str, str], None]
    ) -> None:
        self.sampler = sampler
        self.budget = budget
        self._layers = layers
        self._warn = warn

    def account(self) -> ForwardCapture:
        """Returns an empty capture to which a mode can charge rows that it keeps itself, for as long as it lives."""
        self.budget.expect_one_forward()
        captured = ForwardCapture(self._layers, -1)
        self.budget.live.add(captured)
        return captured

    def keep(self, captured: ForwardCapture, features: Tensor) -> KeptRows | None:
        """Copies rows of one layer call, or returns None if the budget has no room for a single row of each sample."""
        features = strided(features)
        total = math.prod(features.shape[: row_dims(features)])
        size = self.budget.row_bytes(features)
        choice = self.sampler.choose(total, self.budget.room(captured, size) if size else total, captured.samples)
        if choice.kept == 0 < total:
            each = "" if captured.samples is None else f" for each of {captured.samples.kept} samples"
            self._warn(
                "budget",
                f"has no room for even one row of {size // self.budget.copies:,} bytes of a layer{each}: it gets a "
                f"row of nulls. Raise memory= above {self.budget.limit:,} bytes or watch fewer layers",
            )
            return None
        self.budget.take(captured, choice.kept * size, "rows of features")
        return self.sampler.keep(features, choice)
