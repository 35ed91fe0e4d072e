"""The rules of `optimizer_stats`: which state of an optimizer gives its update, and with which coefficients.

`csrc/parameter_sums.h` derives them. g, w, s and t are the gradient, the parameter after the step, and the first and
second state; a quotient with denominator 0 counts with denominator 1.
"""

from __future__ import annotations

import enum


class OptimizerRule(enum.IntEnum):
    """How the update dw of a parameter follows from what a step leaves behind."""

    LINEAR = 0  # dw = cw w + cg g + cs s, and the gradient is g + e s
    ADAM = 1  # dw = cw w + cs s / (r sqrt(t) + e)
    ADAMAX = 2  # dw = cs s / t
    RMSPROP = 3  # dw = (cw w + cg g) / (sqrt(s - k t^2) + e)

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Names of the coefficients, in the order of their columns."""
        return _COEFFICIENTS[self]

    @property
    def states(self) -> int:
        """How many tensors of state a parameter has: 1 (`first`) or 2 (`first` and `second`)."""
        return 1 if self is OptimizerRule.LINEAR else 2


_COEFFICIENTS = {
    OptimizerRule.LINEAR: ("cw", "cg", "cs", "e"),
    OptimizerRule.ADAM: ("cw", "cs", "r", "e"),
    OptimizerRule.ADAMAX: ("cs",),
    OptimizerRule.RMSPROP: ("cw", "cg", "k", "e"),
}
