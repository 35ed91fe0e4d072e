"""What a report can show of a record: columns with names, units and one line that explains them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["QUANTITIES", "Quantity"]


@dataclass(frozen=True)
class Quantity:
    """A column of a record as it is shown.

    ``log``: shown on a logarithmic scale at first. ``guarded``: means nothing where ``valid`` is false. ``error``: the
    column with its standard error.
    """

    key: str
    label: str
    unit: str
    about: str
    log: bool = False
    guarded: bool = False
    error: str | None = None


QUANTITIES = (
    Quantity(
        "angle",
        "Angle",
        "rad",
        "Angle between the feature update and the steepest way down, -dLoss/df. 0: straight down; pi/2 "
        "(1.57): the move does not change the loss.",
        guarded=True,
        error="angle_se",
    ),
    Quantity(
        "update_rms",
        "Speed",
        "feature units per step",
        "Root mean square of how far the features of the layer moved in one optimizer step.",
        log=True,
        guarded=True,
        error="update_rms_se",
    ),
    Quantity(
        "relative_update",
        "Relative update",
        "per step",
        "Speed divided by the size of the features: 0.01 is a move of 1 % in one step.",
        log=True,
        guarded=True,
    ),
    Quantity(
        "aligned_decrease",
        "Aligned decrease",
        "loss per step",
        "The loss decrease, to first order, that the parameters up to this layer contribute in one step. "
        "Negative: they raise the loss.",
        log=True,
    ),
    Quantity(
        "residual",
        "Residual",
        "1 = 100 %",
        "How far aligned decrease and measured move disagree. Near 0: consistent; else the step is large,"
        " rounding dominates, or the layer is no cut.",
        guarded=True,
    ),
    Quantity(
        "cos_angle",
        "Cosine of the angle",
        "no unit",
        "1: straight down the loss; 0: the move does not change the loss; negative: up.",
        guarded=True,
    ),
    Quantity(
        "noise_floor",
        "Noise floor",
        "per step",
        "The relative update that rounding alone would show. A relative update should be at least 5 times this.",
        log=True,
    ),
    Quantity(
        "feature_rms",
        "Feature size",
        "feature units",
        "Root mean square of the features before the step.",
        log=True,
    ),
    Quantity(
        "backward_rms",
        "Backward size",
        "loss per feature unit",
        "Root mean square of the gradient of the loss with respect to the features.",
        log=True,
    ),
    Quantity(
        "radial_update",
        "Radial update",
        "share of the features, per step",
        "The part of the move along the features themselves: growth or shrinking.",
        guarded=True,
    ),
    Quantity(
        "tangential_update",
        "Tangential update",
        "share of the features, per step",
        "The part of the move across the features: rotation.",
        log=True,
        guarded=True,
    ),
    Quantity(
        "gradient_norm",
        "Gradient norm",
        "loss per parameter unit",
        "Norm of the gradient of the parameters between this layer and the one before.",
        log=True,
    ),
    Quantity(
        "parameter_update_norm",
        "Parameter update norm",
        "parameter units per step",
        "Norm of the optimizer's change of those parameters.",
        log=True,
    ),
    Quantity(
        "parameter_norm",
        "Parameter norm",
        "parameter units",
        "Norm of those parameters.",
        log=True,
    ),
)
"""In the order of the menu."""
