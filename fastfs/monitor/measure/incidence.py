"""Which parameters count for which layer, on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfs.monitor.measure.segments import IntervalSums, on_device
from fastfs.network.parameter_sets import ParameterSets

__all__ = ["Incidence"]


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
        self._sum_upstream = IntervalSums(self._upstream, device)
        self._sum_own = IntervalSums(self._own, device)

    def upstream(self, values: Tensor) -> Tensor:
        """float64 (P, C), numbers of each parameter, to (L, C)."""
        return self._sum_upstream(values)

    def own(self, values: Tensor) -> Tensor:
        """The same over the parameters upstream of this layer and of no watched layer before."""
        return self._sum_own(values)

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU: for :meth:`from_state`."""
        return {"upstream": self._upstream.state_dict(), "own": self._own.state_dict()}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Incidence:
        return cls(ParameterSets.from_state(state["upstream"]), ParameterSets.from_state(state["own"]), device)
