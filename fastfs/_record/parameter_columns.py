"""The columns of a record about the parameters of each layer."""

from __future__ import annotations

from fastfs._record.column import Column, Display
from fastfs._record.step_columns import ROW_KINDS

__all__ = ["CASTS", "PARAMETER_COLUMNS"]

CASTS = ("bfloat16", "float8_e4m3fn", "mxfp8")
"""Casts of parameters whose effect the monitor can measure."""

_OWN = "of the parameters that are upstream of this layer and of no earlier watched layer"
_NOT_SAMPLED = "null where only a [sample](validity.md#sampled-parameters) of these was read"


def _columns_of(cast: str, menu: int) -> tuple[Column, Column]:
    name = f"cast_loss_{cast}"
    return (
        Column(
            name=name,
            type="number",
            meaning=f"with `casts=`: 1 - cos^2 of the angle between dw and dc = c(w + dw) - c(w) for the "
            f"[cast c to {cast}](monitor.md#casts), {_OWN}, of those with at least two dimensions: the share of the "
            "step that the cast parameters do not follow",
            option=("casts", cast),
            display=Display(
                menu,
                f"Loss by {cast}",
                f"Share of the optimizer's step that is rounding if the forward uses parameters in {cast}. 0: the cast "
                "parameters move as the parameters do; 1: their move has nothing to do with it.",
                error=f"{name}_se",
            ),
        ),
        Column(
            name=f"{name}_se",
            type="number",
            meaning=f"standard error of `{name}` that comes from the sample of the parameters",
            option=("casts", cast),
            tensorboard=False,
        ),
    )


PARAMETER_COLUMNS = (
    Column(
        name="parameter_norm",
        type="number",
        unit="parameter units",
        meaning=f"|w| {_OWN}",
        kinds=ROW_KINDS,
        display=Display(
            13,
            "Parameter norm",
            "Norm of the parameters between the previous watched layer and this one.",
            logarithmic=True,
        ),
    ),
    Column(
        name="parameter_update_norm",
        type="number",
        unit="parameter units per step",
        meaning=f"|dw| {_OWN}",
        kinds=ROW_KINDS,
        display=Display(
            12,
            "Parameter update norm",
            "Norm of the optimizer's update of the parameters between the previous watched layer and this one.",
            logarithmic=True,
        ),
    ),
    Column(
        name="gradient_norm",
        type="number",
        unit="loss per parameter unit",
        meaning=f"|g| {_OWN}",
        kinds=ROW_KINDS,
        display=Display(
            11,
            "Gradient norm",
            "Norm of the gradient of the parameters between the previous watched layer and this one.",
            logarithmic=True,
        ),
    ),
    Column(
        name="parameter_rotation",
        type="number",
        unit="rad",
        meaning=f"angle between w and w + dw {_OWN}, w before the step: their angular update; {_NOT_SAMPLED}",
        kinds=ROW_KINDS,
        source="[2305.17212](https://arxiv.org/abs/2305.17212), 2",
        display=Display(
            15,
            "Parameter rotation",
            "Angle by which one optimizer step turns the parameters between the previous watched layer and this one: "
            "the effective learning rate of layers whose scale does not matter.",
            logarithmic=True,
        ),
    ),
    Column(
        name="parameter_radial_update",
        type="number",
        unit="per step",
        meaning=f"<w, dw> / |w|^2 {_OWN}, w before the step: their signed relative growth, to first order; "
        f"{_NOT_SAMPLED}",
        kinds=ROW_KINDS,
        source="[2006.08419](https://arxiv.org/abs/2006.08419)",
        display=Display(
            16,
            "Parameter radial update",
            "Component of the step along the parameters between the previous watched layer and this one, relative to "
            "their size: growth if positive, as weight decay shrinks them if negative.",
        ),
    ),
    Column(
        name="parameter_cos_angle",
        type="number",
        meaning=f"-<g, dw> / (|g| |dw|) {_OWN}: cosine between the step and steepest descent; {_NOT_SAMPLED}",
        kinds=ROW_KINDS,
        source="2, identity",
        display=Display(
            17,
            "Parameter cosine",
            "1: the optimizer steps along the negative gradient of the parameters between the previous watched layer "
            "and this one; 0: across it; negative: it raises the loss.",
        ),
    ),
    *(column for number, cast in enumerate(CASTS) for column in _columns_of(cast, 18 + number)),
)
"""In the order of a table."""
