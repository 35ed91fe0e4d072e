"""Sums over the parameters that belong to each layer, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfs._monitor.measure.segment_sums import IntervalSums, SegmentSums, on_device
from fastfs._network.parameter_sets import ParameterSets

__all__ = ["Incidence"]

_FEW = 2**14  # total size of the sets up to which their members are listed one by one


def _direct(sets: Sequence[ParameterSets], device: torch.device) -> SegmentSums | None:
    """Sums over listed members of all sets; None if there are too many."""
    if sum(int(each.counts().sum()) for each in sets) > _FEW:
        return None
    lengths = np.concatenate([each.counts() for each in sets])
    rows = [each.numbering[start:end] for each in sets for start, end in each.bounds.tolist()]
    members = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    return SegmentSums(lengths, device, members)


class Incidence:
    """Sums over the parameters upstream of each layer, and over its own. Memory is linear in layers and parameters.

    Args:
        upstream: ``Structure.upstream_sets``, or bool (L, P).
        own: ``Structure.own_sets``, or bool (L, P): parameters upstream of a layer and of no watched layer before it.
        device: Of the numbers to be summed.

    Attributes:
        known: Whether a layer has any parameters upstream, bool (L,); if not, it did not run or the graph hides it.
        everywhere: Whether all layers have.
        columns: P, with the inputs of a pipeline stage after its parameters.
    """

    def __init__(self, upstream: ParameterSets | Tensor, own: ParameterSets | Tensor, device: torch.device) -> None:
        self._upstream = ParameterSets.from_dense(upstream) if isinstance(upstream, Tensor) else upstream
        self._own = ParameterSets.from_dense(own) if isinstance(own, Tensor) else own
        self.known = on_device(self._upstream.counts() > 0, device)
        self.everywhere = bool((self._upstream.counts() > 0).all())
        self._sum_upstream = IntervalSums(self._upstream, device)
        self._sum_own = IntervalSums(self._own, device)
        self._sum_both = _direct((self._upstream, self._own), device)
        self.columns = self._upstream.columns

    def upstream(self, values: Tensor) -> Tensor:
        """Sums float64 (P, C) over the parameters upstream of each layer: (L, C)."""
        return self._sum_upstream(values)

    def own(self, values: Tensor) -> Tensor:
        """Sums float64 (P, C) over each layer's own parameters: (L, C)."""
        return self._sum_own(values)

    def both(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns :meth:`upstream` and :meth:`own`, in fewer operations if the sets are small."""
        if self._sum_both is None or values.shape[0] != self.columns:
            return self.upstream(values), self.own(values)
        sums = self._sum_both(values)
        half = sums.shape[0] // 2
        return sums[:half], sums[half:]

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors on the CPU, for :meth:`from_state`."""
        return {"upstream": self._upstream.state_dict(), "own": self._own.state_dict()}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Incidence:
        """Restores what :meth:`state_dict` has returned."""
        return cls(ParameterSets.from_state(state["upstream"]), ParameterSets.from_state(state["own"]), device)
