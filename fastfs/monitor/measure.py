"""Captured tensors in, sums out; pure, and without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfs.functional import feature_stats
from fastfs.stats import FeatureStats

__all__ = ["Triple", "measure"]

Triple = tuple[Tensor, Tensor, Tensor]
"""Features before, features after, backward vector; one shape."""


def measure(layers: Sequence[Sequence[Triple]]) -> FeatureStats:
    """The sums of every layer over its visits: one call for all layers and visits.

    Args:
        layers: for each of L layers its visits in one forward: one, several (stacked as rows), or none (all sums 0).

    Returns:
        Statistics of shape (L,), on the device of the features.

    Raises:
        ValueError: features before and after differ in shape or dtype.
    """
    flat = [visit for visits in layers for visit in visits]
    stats = feature_stats([v[0] for v in flat], [v[1] for v in flat], [v[2] for v in flat])
    if all(len(visits) == 1 for visits in layers):
        return stats
    sums = stats.sums
    parts = sums.split([len(visits) for visits in layers])
    return FeatureStats(torch.stack([part.sum(dim=0) for part in parts]) if layers else sums)
