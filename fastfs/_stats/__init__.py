"""FeatureStats, UpdateStats and ParameterStats: sums of products in, derived quantities out.

Every statistic is a sum over elements, so that parts (micro-batches, ranks, shards, rows) merge exactly by adding;
ratios and angles are taken last, from the total. See the properties for the formulas. In them, of one layer:
f and f' are the features before and after the update of the parameters, df = f' - f, b the backward vector
dLoss/df, g the gradient of a parameter, dw its update. Sections are those of "The Feature Speed Formula"
(Chizat and Netrapalli, arXiv 2311.18718) and of the notes in docs.
"""

from fastfs._stats.base import Stats, span
from fastfs._stats.features import FeatureStats
from fastfs._stats.parameters import ParameterStats, UpdateStats

__all__ = ["FeatureStats", "ParameterStats", "Stats", "UpdateStats", "span"]
