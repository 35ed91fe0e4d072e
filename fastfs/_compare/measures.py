"""What is compared between runs: quantities of the record and ratios of them, on a scale where differences add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastfs._compare.runs import AlignedRuns
from fastfs._report.quantities import QUANTITIES, Quantity

__all__ = ["MEASURES", "Measure"]

Array = np.ndarray[Any, Any]

_NOT_COMPARED = frozenset({"noise_floor"})
"""Quantities about the measurement rather than the training."""


@dataclass(frozen=True)
class Measure:
    """A quantity of the record, or the ratio of two.

    Attributes:
        key: name in JSON.
        label: name in texts.
        quantity: the column.
        over: column by which it is divided.
        direct: whether it is one of the sizes of a layer's parameter update, which the optimizer's settings determine
            almost alone.
    """

    key: str
    label: str
    quantity: Quantity
    over: str | None = None
    direct: bool = False

    @property
    def ratio(self) -> bool:
        """Whether runs are compared by the ratio of their values, otherwise by the difference."""
        return self.quantity.log

    def raw(self, aligned: AlignedRuns, *, valid: bool = True) -> Array:
        """Returns the values, shape (runs, layers, steps), NaN where one is missing or, if asked for, not valid."""
        values = aligned.values(self.quantity.key, guarded=valid and self.quantity.guarded)
        with np.errstate(all="ignore"):
            values = values / aligned.values(self.over) if self.over else values
        values[~np.isfinite(values)] = np.nan
        return values

    def scaled(self, raw: Array) -> Array:
        """Returns values whose differences are relative ones.

        They are logarithms, or values divided by their root mean square over runs and layers at the step. A zero counts
        as a millionth of the smallest value, so that a layer that is frozen in one run differs; in all, it is NaN.

        Args:
            raw: values (runs, layers, steps).

        Returns:
            Shape (runs, layers, steps).
        """
        with np.errstate(all="ignore"):
            if not self.ratio:
                return raw / _size(raw)
            least = np.where(raw > 0, raw, np.inf).min(axis=(0, 1), keepdims=True) * 1e-6
            frozen = (raw == 0) & (raw > 0).any(axis=0)
            return np.log(np.where(frozen, least, np.where(raw > 0, raw, np.nan)))


def _size(raw: Array) -> Array:
    """Root mean square over runs and layers, shape (1, 1, steps)."""
    given = np.isfinite(raw)
    total = np.where(given, raw, 0.0) ** 2
    size: Array = np.sqrt(total.sum((0, 1), keepdims=True) / given.sum((0, 1), keepdims=True))
    return size


def _measures() -> tuple[Measure, ...]:
    known = {quantity.key: quantity for quantity in QUANTITIES}
    update = known["parameter_update_norm"]
    # First what the optimizer's settings determine most directly: it names the cause rather than a consequence.
    first = (
        Measure("update_per_gradient", "Parameter update / gradient", update, "gradient_norm", direct=True),
        Measure("update_per_parameter", "Parameter update / parameter", update, "parameter_norm", direct=True),
        Measure(update.key, update.label, update, direct=True),
    )
    others = [Measure(q.key, q.label, q) for q in QUANTITIES if q.key != update.key and q.key not in _NOT_COMPARED]
    return (*first, *others)


MEASURES = _measures()
"""In the order in which a parting is named if several measures part at the same step."""
