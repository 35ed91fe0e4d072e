"""What the optimizers do to the parameters, in one order for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfs.monitor.measure.updates import UpdateMeter
from fastfs.stats import ParameterStats

__all__ = ["Parameters"]


class Parameters:
    """The parameters of all optimizers: optimizer by optimizer, group by group.

    Args:
        optimizers: those of the loop.
        snapshot: in steps that are watched in full, copy the parameters before the step.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], *, snapshot: bool) -> None:
        self._meters = [UpdateMeter(optimizer) for optimizer in optimizers]
        self._snapshots = [UpdateMeter(optimizer, snapshot=True) for optimizer in optimizers] if snapshot else []
        self._results: list[list[Tensor]] = [[] for _ in optimizers]

    @property
    def tensors(self) -> list[Tensor]:
        return [p for meter in self._meters for p in meter.parameters]

    @property
    def previous(self) -> list[Tensor]:
        """Values before the step; only with ``snapshot``, after a step that was watched in full."""
        return [p for meter in self._snapshots for p in meter.previous]

    @property
    def snapshot_bytes(self) -> int:
        return sum(meter.snapshot_bytes for meter in (*self._meters, *self._snapshots))

    def before(self, index: int, full: bool) -> None:
        self._of(index, full).before()

    def after(self, index: int, full: bool) -> None:
        self._results[index].append(self._of(index, full).after().sums)

    def take(self, device: torch.device) -> ParameterStats:
        """The statistics of all parameters since the last call; zeros for those of an optimizer that did not step."""
        parts = []
        for meter, results in zip(self._meters, self._results, strict=True):
            size = len(meter.parameters)
            total = torch.zeros((size, len(ParameterStats.names)), dtype=torch.float64, device=device)
            for sums in results:
                total = total + sums.to(device, non_blocking=True)
            parts.append(total)
            results.clear()
        return ParameterStats(torch.cat(parts))

    def clear(self) -> None:
        for results in self._results:
            results.clear()

    def _of(self, index: int, full: bool) -> UpdateMeter:
        return (self._snapshots if full and self._snapshots else self._meters)[index]
