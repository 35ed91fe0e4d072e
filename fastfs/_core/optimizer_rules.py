"""The rules of `optimizer_stats`: how an optimizer's state gives its update, and with which coefficients.

`csrc/parameter_sums.h` is the counterpart in C++ and derives the formulas; which optimizer of torch follows which rule
is in the table of `fastfs/_monitor/measure/closed_forms.py`. g and w are the gradient and the parameter after the step,
s and t its first and second state. A quotient with denominator 0 counts with denominator 1.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

__all__ = ["OptimizerRule", "update_terms"]

_TINY = 1e-300  # added to denominators, so that 0 / 0 is 0


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
        """Number of state tensors per parameter: 1 (`first`) or 2 (`first` and `second`)."""
        return 1 if self is OptimizerRule.LINEAR else 2


_COEFFICIENTS = {
    OptimizerRule.LINEAR: ("cw", "cg", "cs", "e"),
    OptimizerRule.ADAM: ("cw", "cs", "r", "e"),
    OptimizerRule.ADAMAX: ("cs",),
    OptimizerRule.RMSPROP: ("cw", "cg", "k", "e"),
}


def update_terms(rule: OptimizerRule, w: Any, g: Any, s: Any, t: Any, c: Sequence[Any]) -> list[Any]:
    """Returns the terms whose sum is the update of each element.

    Where a RMSPROP denominator nearly cancels, two terms of opposite sign are added that have the size of the
    resulting error, so that the norms of the terms bound the rounding error of their sum.

    Args:
        rule: How the update follows from the other arguments.
        w: Elements of P parameters after the step, (P, W) in float64, as a tensor or a NumPy array. NumPy takes a
            fraction of the time on the CPU.
        g: Gradients of these elements; None if the rule does not read them. So for the states.
        s: First state.
        t: Second state.
        c: The coefficients, (P, 1) each.
    """
    if rule is OptimizerRule.LINEAR:
        return [c[0] * w, c[1] * g, c[2] * s]
    if rule is OptimizerRule.ADAM:
        return [c[0] * w, c[1] * s / (c[2] * t**0.5 + (c[3] + _TINY))]
    if rule is OptimizerRule.ADAMAX:
        return [c[0] * s / (t + _TINY)]
    centre = c[2] * t * t
    variance = s - centre
    below = variance**0.5 + (c[3] + _TINY)
    terms = [c[0] * w / below, c[1] * g / below]
    lost = (terms[0] + terms[1]) * ((s + centre) / (variance + _TINY))
    return [*terms, lost, -lost]
