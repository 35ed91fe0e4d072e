"""Which parameters count for which layer, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfs._monitor.measure.segment_sums import IntervalSums, SegmentSums, on_device
from fastfs._network.parameter_sets import ParameterSets

__all__ = ["Incidence"]

_FEW = 2**14  # members of all sets up to which they are listed one by one


def _direct(sets: Sequence[ParameterSets], device: torch.device) -> SegmentSums | None:
    """Sums over all members of all sets; None if these are many."""
    if sum(int(each.counts().sum()) for each in sets) > _FEW:
        return None
    lengths = np.concatenate([each.counts() for each in sets])
    rows = [each.numbering[start:end] for each in sets for start, end in each.bounds.tolist()]
    members = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    return SegmentSums(lengths, device, members)


class Incidence:
    """Sums over the parameters upstream of each layer, and over its own. Memory is linear in layers and parameters.

    Args:
        upstream: ``Structure.upstream_sets``; or bool (L, P).
        own: ``Structure.own_sets``; or bool (L, P).
        device: of the numbers that are summed.
    """

    def __init__(self, upstream: ParameterSets | Tensor, own: ParameterSets | Tensor, device: torch.device) -> None:
        self._upstream = ParameterSets.from_dense(upstream) if isinstance(upstream, Tensor) else upstream
        self._own = ParameterSets.from_dense(own) if isinstance(own, Tensor) else own
        # Without any parameter upstream nothing is known: the layer did not run, or is hidden from the graph.
        self.known = on_device(self._upstream.counts() > 0, device)
        self.everywhere = bool((self._upstream.counts() > 0).all())
        self._sum_upstream = IntervalSums(self._upstream, device)
        self._sum_own = IntervalSums(self._own, device)
        self._sum_both = _direct((self._upstream, self._own), device)
        self._parameters = self._upstream.columns

    def upstream(self, values: Tensor) -> Tensor:
        """float64 (P, C), numbers of each parameter, to (L, C)."""
        return self._sum_upstream(values)

    def own(self, values: Tensor) -> Tensor:
        """The same over the parameters upstream of this layer and of no watched layer before."""
        return self._sum_own(values)

    def both(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(P, C) to (L, C) twice: upstream, and own. In as few operations as there can be where the sets are small."""
        if self._sum_both is None or values.shape[0] != self._parameters:
            return self.upstream(values), self.own(values)
        sums = self._sum_both(values)
        half = sums.shape[0] // 2
        return sums[:half], sums[half:]

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU: for :meth:`from_state`."""
        return {"upstream": self._upstream.state_dict(), "own": self._own.state_dict()}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Incidence:
        return cls(ParameterSets.from_state(state["upstream"]), ParameterSets.from_state(state["own"]), device)
