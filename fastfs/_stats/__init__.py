"""The results of measurements: sums over elements, and the quantities derived from them.

Every statistic is a sum over elements, so that parts (micro-batches, ranks, shards, rows) merge exactly by addition.
Ratios and angles are computed last, from the total. The properties document the formulas. In them, for one layer,
f and f' are the features before and after the update of the parameters, df = f' - f, b the backward vector
dLoss/df, g the gradient of a parameter, and dw its update. Sections are those of "The Feature Speed Formula"
(Chizat and Netrapalli, arXiv 2311.18718) and of the notes in docs.
"""

from fastfs._stats.base import Stats, span
from fastfs._stats.features import FeatureStats
from fastfs._stats.parameters import ParameterStats, UpdateStats

__all__ = ["FeatureStats", "ParameterStats", "Stats", "UpdateStats", "span"]
