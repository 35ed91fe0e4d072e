"""Checks that a second forward with the parameters of the first one gives the features of the first one.

If it does not, the forward depends on something that the monitor does not know of: other weights, a state of its own, a
file. The measured update of the features contains that difference, so it cannot be trusted where the difference is not
small beside the update. The check costs a forward, made before the step at the first measured steps, after any change
of structure, and then now and then; its result holds until the next one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

from fastfs._monitor.measure import trust
from fastfs._record.row_reasons import UNREPEATED
from fastfs._stats import FeatureStats

__all__ = ["ReplayChecks"]

PLAIN = 2e-3
"""Allowed difference, relative to an update that is measured as a difference from the first forward."""

_ROUNDINGS = 16.0  # allowed for other measurements: squared difference, in units of the variance by rounding
_LARGEST = 0.02  # and the largest difference, relative to the features, that rounding may explain
_PERIOD = 32  # measured steps
_MOST = 32  # sets of graphs that are remembered


class ReplayChecks:
    """Decides when a check is due, keeps the last result, and refuses measurements that it does not allow.

    Results are kept for each set of graphs that the forwards of a step may have.

    Args:
        layers: Number of watched layers.
        device: Of the sums.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self._layers = layers
        self._device = device
        # By graphs: number of measured steps, and squared differences relative to the features.
        self._results: OrderedDict[Hashable, tuple[int, Tensor]] = OrderedDict()

    def due(self, graphs: Hashable) -> bool:
        """Returns whether to check before the coming measured step: the 1st, 2nd, 4th, 8th, ... and each 32nd."""
        count = self._results[graphs][0] + 1 if graphs in self._results else 1
        return count & (count - 1) == 0 if count < _PERIOD else count % _PERIOD == 0

    def record(self, graphs: Hashable, difference: FeatureStats) -> None:
        """Records a result.

        Args:
            graphs: Of the step.
            difference: Of the second forward's features from those of the first, shape (L,).
        """
        relative = difference.update_sq / difference.before_sq
        # A layer that the second forward does not run, or that holds no numbers, has no difference.
        relative = torch.where(difference.update_sq == 0, 0.0, relative)
        self._put(graphs, self._results[graphs][0] if graphs in self._results else 0, relative)

    def count_step(self, graphs: Hashable) -> None:
        """Counts a measured step."""
        count, relative = self._results.get(graphs, (0, self._unknown()))
        self._put(graphs, count + 1, relative)

    def refuse_unrepeated(
        self, graphs: Hashable, update: trust.AssessedUpdate, eps: Tensor, depth: Tensor, code: int = UNREPEATED
    ) -> trust.AssessedUpdate:
        """Returns the update without layers whose second forward has not given the features of the first.

        Args:
            graphs: Of the step.
            update: The measurement.
            eps: See :func:`fastfs._monitor.measure.trust.assess`.
            depth: See :func:`fastfs._monitor.measure.trust.assess`.
            code: The reason for the refusal.
        """
        relative = self._results[graphs][1] if graphs in self._results else self._unknown()
        rounding = (_ROUNDINGS * trust.rounding_variance(eps, depth)).clamp_max(_LARGEST**2)
        moved = update.stats.update_sq / update.stats.before_sq
        limit = torch.where(update.self_contained, rounding, PLAIN**2 * moved)
        bad = ~(relative <= limit) & (update.stats.update_sq > 0)
        return trust.refuse(update, code, bad & (update.valid | (relative > rounding)))

    def clear(self) -> None:
        """Forgets all results, since the model has changed."""
        self._results.clear()

    def _unknown(self) -> Tensor:
        """The result for steps that cannot be checked, such as a step in the backward: no difference."""
        return torch.zeros(self._layers, dtype=torch.float64, device=self._device)

    def _put(self, graphs: Hashable, count: int, relative: Tensor) -> None:
        self._results[graphs] = count, relative
        self._results.move_to_end(graphs)
        if len(self._results) > _MOST:
            self._results.popitem(last=False)
