"""Norms of the backward vectors of every layer, from the squared norms that capture has collected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LayerNorms"]

SquaredNorms = Sequence[tuple[Tensor, float]]
"""Per gradient, squared norms of rows with the factor from their sum to all rows; or the norm of all rows, 0-d."""


class LayerNorms:
    """Combines squared norms in few operations, without waiting for the device.

    Args:
        device: Device of the results.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def norms(self, layers: Sequence[SquaredNorms]) -> Tensor:
        """Returns the norm of each layer's backward vectors, nan for a layer without any: float64 (L,)."""
        if all(len(parts) == 1 and not parts[0][0].dim() for parts in layers):
            return torch.stack([parts[0][0].to(self._device, non_blocking=True) for parts in layers])
        rows = [[(x if x.dim() else x.square().view(1), factor) for x, factor in parts] for parts in layers]
        return self._squares(rows).sqrt()

    def _squares(self, layers: Sequence[SquaredNorms]) -> Tensor:
        """Returns per layer the sum over its parts of sum of squares times factor, nan without any: float64 (L,)."""
        flat = [part for parts in layers for part in parts]
        if len(flat) == len(layers) and len({len(rows) for rows, _ in flat}) == 1 and all(layers):  # few operations
            factors = torch.tensor([factor for _, factor in flat], dtype=torch.float64)
            sums = torch.stack([rows for rows, _ in flat]).to(self._device).sum(dim=1)
            return sums * factors.to(self._device, non_blocking=True)
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        totals = [[rows.sum().to(self._device) * factor for rows, factor in parts] for parts in layers]
        return torch.stack([sum(parts, zero) if parts else zero + torch.nan for parts in totals])
