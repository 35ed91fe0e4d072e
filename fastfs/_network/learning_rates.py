"""Resolve the learning rate of every parameter from one number or from patterns of parameter names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TypeAlias

from torch import Tensor

__all__ = ["LearningRates", "resolve"]

LearningRates: TypeAlias = float | Mapping[str, float | Tensor]
"""One learning rate for all parameters, or regular expression -> learning rate; a tensor has one rate per entry."""


def resolve(lr: LearningRates, names: Sequence[str], parameters: Sequence[Tensor]) -> list[float | Tensor]:
    """Return the learning rate of each parameter.

    Args:
        lr: a number for all parameters, or a mapping from regular expressions, searched for in the names, to a number
            or a tensor that broadcasts to the parameter. Each parameter has to match exactly one expression, and each
            expression at least one parameter.
        names: names of the parameters.
        parameters: the parameters, in the order of the names.

    Returns:
        A number or tensor per parameter.

    Raises:
        TypeError: ``lr`` is neither a number nor a mapping.
        ValueError: a parameter matches no or several expressions, an expression is invalid or matches no parameter, a
            rate is negative or not finite, or a tensor does not broadcast to its parameter.
    """
    if not isinstance(lr, Mapping):
        return [_number(lr, "lr")] * len(parameters)
    patterns = {}
    for expression in lr:
        try:
            patterns[expression] = re.compile(expression)
        except (TypeError, re.error) as error:
            raise ValueError(f"lr: {expression!r} is not a regular expression: {error}") from None
    found = {name: [e for e, pattern in patterns.items() if pattern.search(name)] for name in names}
    for name, expressions in found.items():
        if len(expressions) != 1:
            which = f"several do: {expressions}" if expressions else f"got {list(lr)}"
            raise ValueError(f"lr: expected exactly one expression to find parameter {name!r}; {which}")
    unused = [e for e in lr if not any(e in expressions for expressions in found.values())]
    if unused:
        raise ValueError(f"lr: {unused} find no parameter. Parameters: {', '.join(names)}")
    result: list[float | Tensor] = []
    for name, parameter in zip(names, parameters, strict=True):
        value = lr[found[name][0]]
        result.append(_tensor(value, name, parameter) if isinstance(value, Tensor) else _number(value, f"lr of {name}"))
    return result


def _number(value: object, what: str) -> float:
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what}: expected a number, or a mapping of regular expression -> number, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{what}: expected a finite number >= 0, got {number!r}")
    return number


def _tensor(value: Tensor, name: str, parameter: Tensor) -> Tensor:
    try:
        value.expand(parameter.shape)
    except RuntimeError:
        raise ValueError(
            f"lr of {name}: expected a tensor that broadcasts to {tuple(parameter.shape)}, got {tuple(value.shape)}"
        ) from None
    if not bool(((value >= 0) & value.isfinite()).all()):
        raise ValueError(f"lr of {name}: expected finite numbers >= 0 in the tensor")
    return value.to(parameter.device, parameter.dtype)
