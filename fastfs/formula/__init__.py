"""The feature speed formula on any model: identity, predicted speed, residual, sensitivity; which layers are cuts.

Source: sections 1 and 2 of "The Feature Speed Formula", arXiv 2311.18718.
"""

from fastfs.formula.cuts import Cuts, cuts
from fastfs.formula.measure import Measurement, measure
from fastfs.formula.relations import aligned_decrease, decompose, predicted_update_norm, residual, sensitivity
from fastfs.formula.updates import gradient_descent, optimizer_update

__all__ = [
    "Cuts",
    "Measurement",
    "aligned_decrease",
    "cuts",
    "decompose",
    "gradient_descent",
    "measure",
    "optimizer_update",
    "predicted_update_norm",
    "residual",
    "sensitivity",
]
