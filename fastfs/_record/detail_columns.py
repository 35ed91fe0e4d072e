"""The columns of a record with details, see ``Monitor(details=True)``."""

from __future__ import annotations

from fastfs._record.column import Column, Display

__all__ = ["DETAILS", "DETAIL_COLUMNS", "DETAIL_FIELDS"]

DETAILS = "details"
"""Kind of the records of what is inside of layers."""

_OPTION = ("details", True)
_OF_MATRICES = "of the layer's weight matrices together"

DETAIL_COLUMNS = (
    Column(
        name="weight_alignment",
        type="number",
        meaning=f"|W x| / (|W| |x|) {_OF_MATRICES}, with details",
        option=_OPTION,
        display=Display(
            22,
            "Alignment of weights",
            "How well weight matrices are aligned with their inputs: |Wx| / (|W| |x|).",
            logarithmic=True,
        ),
    ),
    Column(
        name="update_alignment",
        type="number",
        meaning=f"|dW x| / (|dW| |x|) {_OF_MATRICES}, with details",
        option=_OPTION,
        display=Display(
            23,
            "Alignment of updates",
            "How well the updates of weight matrices are aligned with their inputs: |dW x| / (|dW| |x|).",
            logarithmic=True,
        ),
    ),
    Column(
        name="own_motion",
        type="number",
        unit="per step",
        meaning=f"|dW x'| / |W x| {_OF_MATRICES}, x' the input after the step, with details",
        option=_OPTION,
        display=Display(
            24,
            "Own motion",
            "How far the outputs of weight matrices move because these change, relative to their size.",
            logarithmic=True,
        ),
    ),
    Column(
        name="inherited_motion",
        type="number",
        unit="per step",
        meaning=f"|W dx| / |W x| {_OF_MATRICES}, with details",
        option=_OPTION,
        display=Display(
            25,
            "Inherited motion",
            "How far the outputs of weight matrices move because their inputs change, relative to their size.",
            logarithmic=True,
        ),
    ),
    Column(
        name="dead_share",
        type="number",
        meaning="share of the units before activation functions in the layer that are inactive on all kept rows, "
        "with details",
        option=_OPTION,
        display=Display(
            26,
            "Dead features",
            "Share of the units in front of activation functions that no kept row activates: the derivative is 0.",
        ),
    ),
    Column(
        name="saturated_share",
        type="number",
        meaning="share of the entries before activation functions in the layer where the derivative is at most 0.001, "
        "with details",
        option=_OPTION,
        display=Display(
            27,
            "Saturated features",
            "Share of the entries in front of activation functions where the derivative is 0 or tiny.",
        ),
    ),
    Column(
        name="attention_logit_max",
        type="number",
        meaning="largest attention logit of the layer, of the kept queries and all keys, with details",
        option=_OPTION,
        display=Display(28, "Attention logit", "Largest logit of attention that a kept query has."),
    ),
    Column(
        name="expert_load_max",
        type="number",
        meaning="largest number of tokens of an expert relative to the mean over the experts, with details",
        option=_OPTION,
        display=Display(29, "Expert load", "Tokens of the busiest expert relative to the mean: 1 is balanced."),
    ),
)
"""Per layer."""

DETAIL_FIELDS = (
    Column("name", "string", kinds=(DETAILS,), meaning="the parameter, or the module with the calls"),
    Column("quantity", "string", kinds=(DETAILS,), meaning="what the value is"),
    Column("index", "integer", kinds=(DETAILS,), optional=True, meaning="the head or the expert; null for all"),
    Column("value", "number", kinds=(DETAILS,), optional=True, meaning="null if it is not known"),
    Column(
        "standard_error",
        "number",
        kinds=(DETAILS,),
        optional=True,
        meaning="that comes from the sample of rows; null if all rows were kept",
    ),
    Column("why", "string", kinds=(DETAILS,), optional=True, meaning="why the value is null"),
)
"""Of an entry."""
