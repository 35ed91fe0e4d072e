"""What follows from the sums of a step over the products with one weight matrix, or with all of one layer.

The definitions and their sources are in :mod:`fastfs._monitor.measure.weight_motion`.
"""

from __future__ import annotations

import math

import numpy as np

from fastfs._record.ranks.part import Array

__all__ = ["MOTIONS", "QUANTITIES_OF_WEIGHTS", "SUMS", "is_noise", "weight_quantities"]

SUMS = (
    "output",  # |W x|^2
    "weight_bound",  # |W|^2 |x|^2
    "update",  # |dW x|^2
    "update_bound",  # |dW|^2 |x|^2
    "own",  # |dW x'|^2
    "inherited",  # |W dx|^2
    "own_dot_inherited",  # <dW x', W dx>
    "input_update",  # |dx|^2
    "input_noise",  # variance of dx by rounding
)
"""Sums over the rows of all calls of a matrix. Norms of matrices are Frobenius norms, of the part that is applied."""

MOTIONS = ("own_motion", "inherited_motion", "motion_cosine")
QUANTITIES_OF_WEIGHTS = ("weight_alignment", "update_alignment", "weight_exponent", "update_exponent", *MOTIONS)

_NOISE = 5.0  # times its rounding noise that dx has to be, as the change of features has to be

# Each is a product of powers of sums.
_POWERS: dict[str, dict[str, float]] = {
    "weight_alignment": {"output": 0.5, "weight_bound": -0.5},
    "update_alignment": {"update": 0.5, "update_bound": -0.5},
    "own_motion": {"own": 0.5, "output": -0.5},
    "inherited_motion": {"inherited": 0.5, "output": -0.5},
    "motion_cosine": {"own_dot_inherited": 1.0, "own": -0.5, "inherited": -0.5},
}


def is_noise(sums: Array) -> bool:
    """Returns whether the change of the input may be rounding noise; an input with the same bits has not changed."""
    return bool(0.0 < sums[SUMS.index("input_update")] < _NOISE**2 * sums[SUMS.index("input_noise")])


def weight_quantities(sums: Array, covariances: Array | None, fan_in: int) -> dict[str, tuple[float, float]]:
    """Returns each of `QUANTITIES_OF_WEIGHTS` with its standard error; NaN is what is not known.

    The standard errors are the linearised ones of ratios of totals. The exponents are log_n of |W x| / (|W| |x|) in
    root mean squares instead of norms, n the fan-in: 1 if W and x are aligned, 1/2 if they are independent.

    Args:
        sums: As `SUMS`, (9,).
        covariances: Of the estimates of these from the sample of rows, (9, 9); None if all rows were kept.
        fan_in: n, 0 if it is not one number: without exponents then.
    """
    found: dict[str, tuple[float, float]] = {}
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for name, powers in _POWERS.items():
            value = float(np.prod([sums[SUMS.index(each)] ** power for each, power in powers.items()]))
            error = math.nan
            if covariances is not None:
                slope = np.zeros(len(SUMS))
                for each, power in powers.items():
                    others = [sums[SUMS.index(x)] ** p for x, p in powers.items() if x != each]
                    slope[SUMS.index(each)] = power * sums[SUMS.index(each)] ** (power - 1) * np.prod(others)
                error = float(np.sqrt(np.maximum(slope @ covariances @ slope, 0.0))) if value else 0.0
            found[name] = value, error
        for kind in ("weight", "update"):
            value, error = found[f"{kind}_alignment"]
            scale = 1.0 / np.log(fan_in) if fan_in > 1 else math.nan
            found[f"{kind}_exponent"] = float(1.0 + np.log(value) * scale), float(error / value * scale)
    if is_noise(sums):
        found["inherited_motion"] = found["motion_cosine"] = (math.nan, math.nan)
    return {name: found[name] for name in QUANTITIES_OF_WEIGHTS}
