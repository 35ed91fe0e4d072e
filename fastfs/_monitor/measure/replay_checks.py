"""A second forward proves itself: with the parameters of the first it has to give the features of the first.

What differs then is something that a forward depends on and the monitor does not know of: other weights, a state of its
own, a file. The update of the features contains that difference, so it is not to be believed where it is not small
beside the update. The proof costs a forward, made before the step at the first measured steps, after any change of
structure, and then now and then; its result holds until the next one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

from fastfs._monitor.measure import trust
from fastfs._monitor.row_reasons import UNREPEATED
from fastfs._stats import FeatureStats

__all__ = ["Proofs"]

PLAIN = 2e-3
"""Difference that is allowed, relative to the update that is measured as a difference from the first forward."""

_ROUNDINGS = 16.0  # the same for measurements around the parameters: in units of the variance that rounding explains
_LARGEST = 0.02  # and at most, relative to the features: beyond it the function is another one
_PERIOD = 32  # measured steps
_MOST = 32  # kinds of steps that are remembered


class Proofs:
    """When a proof is due, what the last one said, and whether a measurement stands it.

    Args:
        layers: how many are watched.
        device: of the sums.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.made = 0
        self._layers = layers
        self._device = device
        # By the graphs of a step's forwards: measured steps so far, and squared differences relative to the features.
        self._kinds: OrderedDict[Hashable, tuple[int, Tensor]] = OrderedDict()

    def due(self, kind: Hashable) -> bool:
        """Whether the coming measured step of this kind is to be proven: the 1st, 2nd, 4th, 8th, ... and each 32nd."""
        count = self._kinds[kind][0] + 1 if kind in self._kinds else 1
        return count & (count - 1) == 0 if count < _PERIOD else count % _PERIOD == 0

    def keep(self, kind: Hashable, difference: FeatureStats) -> None:
        """The result of a proof: sums over the difference of the second forward from the first, shape (L,)."""
        self.made += 1
        relative = difference.update_sq / difference.before_sq
        # A layer that the second forward does not run, or that holds no numbers, has proven nothing.
        relative = torch.where(difference.update_sq == 0, 0.0, relative)
        self._put(kind, self._kinds[kind][0] if kind in self._kinds else 0, relative)

    def count(self, kind: Hashable) -> None:
        """A step of this kind has been measured."""
        count, relative = self._kinds.get(kind, (0, self._unknown()))
        self._put(kind, count + 1, relative)

    def judge(self, kind: Hashable, verdict: trust.Trusted, eps: Tensor, depth: Tensor) -> trust.Trusted:
        """Refuse rows whose second forward has not given the features of the first.

        Args:
            kind: of the step.
            verdict: of the measurement.
            eps, depth: of the layers, as for :func:`fastfs._monitor.measure.trust.judge`.
        """
        relative = self._kinds[kind][1] if kind in self._kinds else self._unknown()
        rounding = (_ROUNDINGS * trust.rounding_of(eps, depth)).clamp_max(_LARGEST**2)
        update = verdict.stats.update_sq / verdict.stats.before_sq
        limit = torch.where(verdict.around, rounding, PLAIN**2 * update)
        bad = ~(relative <= limit) & (verdict.stats.update_sq > 0)
        return trust.refuse(verdict, UNREPEATED, bad & (verdict.valid | (relative > rounding)))

    def clear(self) -> None:
        """The model is another one."""
        self._kinds.clear()

    def _unknown(self) -> Tensor:
        """Of steps that were not proven: a step in the backward, for instance. They are taken as they are."""
        return torch.zeros(self._layers, dtype=torch.float64, device=self._device)

    def _put(self, kind: Hashable, count: int, relative: Tensor) -> None:
        self._kinds[kind] = count, relative
        self._kinds.move_to_end(kind)
        if len(self._kinds) > _MOST:
            self._kinds.popitem(last=False)
