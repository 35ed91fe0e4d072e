"""The feature speed formula on any model: identity, predicted speed, residual, sensitivity, and which layers are cuts.

Source: sections 1 and 2 of "The Feature Speed Formula", arXiv 2311.18718.
"""

from fastfs.formula._cuts import Cuts, cuts
from fastfs.formula._function_rates import FunctionLearningRates, function_learning_rates
from fastfs.formula._measure import Measurement, measure
from fastfs.formula._parameter_updates import gradient_descent, optimizer_update
from fastfs.formula._relations import aligned_decrease, decompose, predicted_update_norm, residual, sensitivity

__all__ = [
    "Cuts",
    "FunctionLearningRates",
    "Measurement",
    "aligned_decrease",
    "cuts",
    "decompose",
    "function_learning_rates",
    "gradient_descent",
    "measure",
    "optimizer_update",
    "predicted_update_norm",
    "residual",
    "sensitivity",
]


def __dir__() -> list[str]:
    return __all__
