"""The columns of a record, each declared once.

Everything else that names columns follows from these declarations: the schema check, the sinks, the JSONL reader (also
the native one), the Parquet reader, the report's quantities and the tables in ``docs/record.md``
(``scripts/record_columns.py`` writes them).
"""

from __future__ import annotations

from fastfs._record.column import Column, Display, ValueType
from fastfs._record.detail_columns import DETAIL_COLUMNS, DETAIL_FIELDS, DETAILS
from fastfs._record.parameter_columns import PARAMETER_COLUMNS
from fastfs._record.step_columns import ROW_KINDS, STEP_COLUMNS

__all__ = [
    "ALWAYS_PER_STEP",
    "BY_NAME",
    "COLUMNS",
    "DETAILS",
    "EVENT_FIELDS",
    "FROM_STATS",
    "KEYS",
    "KINDS",
    "PART",
    "PER_LAYER",
    "PER_STEP",
    "QUANTITIES",
    "ROW_KINDS",
    "SCHEMA",
    "SCHEMAS",
    "quantile_name",
    "type_of",
]

SCHEMA = 2
"""Version of the record format. It is raised when a column changes its meaning or is removed."""

SCHEMAS = (1, 2)
"""Versions that the readers accept."""

KINDS = ("header", "structure", *ROW_KINDS, DETAILS, "skipped", "alert")

PART = "part"
"""Kind of the lines in the file of one rank: what it contributes to a step, from which readers make records."""

_STANDARD_ERROR = "standard error of `{}` that comes from the sample of rows; null if all rows were kept"

KEYS = (
    Column("kind", "string", per="row", since=1),
    Column("run", "string", per="row", since=1),
    Column("step", "integer", per="row", since=1),
    Column("time", "number", "s", per="row", since=1),
    Column("layer", "integer", per="row", since=1),
    Column("name", "string", per="row", since=1),
    Column("group", "boolean", per="row"),
)
"""The first columns of a table: they say what a row is about."""

COLUMNS = (
    Column(
        name="angle",
        type="number",
        unit="rad",
        meaning="angle between df and -b",
        since=1,
        source="2, backward-feature angle",
        from_stats=True,
        display=Display(
            0,
            "Angle",
            "Angle between the feature update and the direction of steepest descent, -dLoss/df. 0: straight down; pi/2 "
            "(1.57): the update does not change the loss.",
            guarded=True,
            error="angle_se",
        ),
    ),
    Column(
        name="cos_angle",
        type="number",
        meaning="-<df, b> / (|df| |b|)",
        since=1,
        source="2",
        from_stats=True,
        quantiles=True,
        display=Display(
            5,
            "Cosine of the angle",
            "1: straight down the loss; 0: the update does not change the loss; negative: up.",
            guarded=True,
        ),
    ),
    Column(
        name="update_rms",
        type="number",
        unit="feature units per step",
        meaning="rms(df); in `predicted` records, its value by the feature speed formula",
        kinds=ROW_KINDS,
        since=1,
        source="2, feature speed",
        from_stats=True,
        quantiles=True,
        display=Display(
            1,
            "Speed",
            "Root mean square of the change of the layer's features in one optimizer step.",
            logarithmic=True,
            guarded=True,
            error="update_rms_se",
        ),
    ),
    Column(
        name="relative_update",
        type="number",
        unit="per step",
        meaning="|df| / |f|",
        since=1,
        from_stats=True,
        display=Display(
            2,
            "Relative update",
            "Speed divided by the size of the features: 0.01 is a change of 1 % in one step.",
            logarithmic=True,
            guarded=True,
        ),
    ),
    Column(
        name="feature_rms",
        type="number",
        unit="feature units",
        meaning="rms(f)",
        since=1,
        source="1",
        from_stats=True,
        display=Display(7, "Feature size", "Root mean square of the features before the step.", logarithmic=True),
    ),
    Column(
        name="backward_rms",
        type="number",
        unit="loss per feature unit",
        meaning="rms(b), with the loss scale divided out",
        kinds=ROW_KINDS,
        since=1,
        source="1",
        from_stats=True,
        display=Display(
            8,
            "Backward size",
            "Root mean square of the gradient of the loss with respect to the features.",
            logarithmic=True,
        ),
    ),
    Column(
        name="radial_update",
        type="number",
        unit="per step",
        meaning="<f, df> / |f|^2: the signed relative growth of f",
        from_stats=True,
        display=Display(
            9,
            "Radial update",
            "Component of the update along the features, relative to their size: growth if positive.",
            guarded=True,
        ),
    ),
    Column(
        name="tangential_update",
        type="number",
        unit="per step",
        meaning="norm of the component of df orthogonal to f, relative to |f|; its square and that of `radial_update` "
        "add up to the square of `relative_update`",
        from_stats=True,
        display=Display(
            10,
            "Tangential update",
            "Component of the update orthogonal to the features, relative to their size: rotation.",
            logarithmic=True,
            guarded=True,
        ),
    ),
    Column(
        name="noise_floor",
        type="number",
        unit="per step",
        meaning="the `relative_update` that rounding alone may produce",
        since=1,
        from_stats=True,
        display=Display(
            6,
            "Noise floor",
            "The relative update that rounding alone would show. Trust relative updates of at least 5 times this.",
            logarithmic=True,
        ),
    ),
    Column(
        name="valid",
        type="boolean",
        meaning="whether the measurement is right: [by estimate](validity.md#when-an-angle-is-valid), the errors of "
        "norm and angle are at most 2 %",
        since=1,
    ),
    Column(name="why", type="string", meaning="[why](loops_and_models.md#why-a-row-is-not-valid) the row is not valid"),
    Column(
        name="linear",
        type="boolean",
        meaning="whether first order describes the step: |`residual`| is at most 0.1 or, if there is no residual, with "
        "`amplify=True`, the second-order part of df is at most 0.1 of the first-order part; null if neither is known",
    ),
    Column(name="method", type="string", meaning="`plain`, `amplified` or `jvp`"),
    Column(
        name="nonfinite",
        type="integer",
        unit="entries",
        meaning="entries of features or backward vectors that are NaN or infinite",
        since=1,
    ),
    Column(name="count", type="integer", unit="entries", meaning="entries of the features", since=1, tensorboard=False),
    Column(name="rows", type="integer", unit="rows", meaning="rows that were kept", tensorboard=False),
    Column(name="angle_se", type="number", unit="rad", meaning=_STANDARD_ERROR.format("angle")),
    Column(
        name="update_rms_se",
        type="number",
        unit="feature units per step",
        meaning=_STANDARD_ERROR.format("update_rms"),
    ),
    Column(name="residual_se", type="number", meaning=_STANDARD_ERROR.format("residual")),
    Column(
        name="aligned_decrease",
        type="number",
        unit="loss per step",
        meaning="D = -sum of <g, dw> over the upstream parameters",
        kinds=ROW_KINDS,
        source="2",
        display=Display(
            3,
            "Aligned decrease",
            "First-order decrease of the loss that the parameters up to this layer contribute in one step. "
            "Negative: they raise the loss.",
            logarithmic=True,
            error="decrease_se",
        ),
    ),
    Column(
        name="decrease_se",
        type="number",
        unit="loss per step",
        meaning="standard error of `aligned_decrease` that comes from the "
        "[sample of the parameters](validity.md#sampled-parameters); 0 where all upstream ones were read completely, "
        "null in measured steps and if no parameter is sampled",
        kinds=ROW_KINDS,
    ),
    Column(
        name="decrease_why",
        type="string",
        meaning="[why](loops_and_models.md#why-a-decrease-is-null) `aligned_decrease` is null",
        kinds=ROW_KINDS,
    ),
    Column(
        name="residual",
        type="number",
        meaning="1 - D / (-<b, df>), at cuts",
        source="2, feature speed formula",
        display=Display(
            4,
            "Residual",
            "How far aligned decrease and measured update disagree; 1 is 100 %. Near 0: they are consistent; otherwise "
            "the step is large, rounding dominates, or the layer is not a cut.",
            guarded=True,
        ),
    ),
    *PARAMETER_COLUMNS,
    Column(
        name="nonlinear_update",
        type="number",
        meaning="with `nonlinear=True`: |df - J dw| / |df|, with the first-order update J dw; null where rounding "
        "could be mistaken for it",
        source="[2505.01618](https://arxiv.org/abs/2505.01618)",
        option=("nonlinear", True),
        display=Display(
            21,
            "Nonlinear update",
            "How much of the feature update first order does not explain, relative to it. Near 0: the layers up to "
            "this one are lazy in this step, i.e. linear in their parameters.",
            logarithmic=True,
            guarded=True,
            error="nonlinear_update_se",
        ),
    ),
    Column(
        name="nonlinear_update_se",
        type="number",
        meaning=_STANDARD_ERROR.format("nonlinear_update").replace("null", "0"),
        option=("nonlinear", True),
    ),
    Column(
        name="rank_angle_sd",
        type="number",
        unit="rad",
        meaning="in runs of several ranks: standard deviation of the angles of their batches, each by itself",
        optional=True,
        display=Display(
            14,
            "Angles of ranks",
            "Standard deviation of the angles of the ranks' batches, each by itself.",
            guarded=True,
        ),
    ),
    Column(
        name="rank_apart",
        type="integer",
        meaning="in runs of at least four batches: a rank whose angle, speed, backward or feature size stands far "
        "apart from those of the others, as these scatter at the last 8 measured steps; null if none does",
        optional=True,
        tensorboard=False,
    ),
    *DETAIL_COLUMNS,
    *STEP_COLUMNS,
)
"""In the order of a table. A record may have others, such as quantiles."""

EVENT_FIELDS = {
    "structure": (
        Column("cut", "boolean", kinds=("structure",), meaning="whether the layer is a cut"),
        Column("reason", "string", kinds=("structure",), meaning="why it is not"),
        Column("parameters", "integer", kinds=("structure",), meaning="number of upstream parameters"),
    ),
    DETAILS: DETAIL_FIELDS,
    "skipped": (Column("reason", "string", per="step", kinds=("skipped",), meaning="why there are no rows"),),
    "alert": (
        Column("rule", "string", per="step", kinds=("alert",), meaning="name of the rule"),
        Column("layer", "string", per="step", kinds=("alert",), optional=True, meaning="null: the whole model"),
        Column("value", "number", per="step", kinds=("alert",), optional=True, meaning="what the rule looked at"),
        Column("message", "string", per="step", kinds=("alert",), meaning="what the rule found"),
    ),
}
"""Fields of the records that are not rows, by kind. Those of alerts and skipped steps may be null if optional."""

PER_LAYER = tuple(column.name for column in COLUMNS if column.per == "layer")
PER_STEP = tuple(column.name for column in COLUMNS if column.per == "step")
ALWAYS_PER_STEP = tuple(column.name for column in COLUMNS if column.per == "step" and not column.optional)
QUANTITIES = tuple(
    sorted((one for one in COLUMNS if one.display), key=lambda one: one.display.menu if one.display else 0)
)
"""Those that the report shows, in the order of its menu."""
FROM_STATS = tuple(column.name for column in COLUMNS if column.from_stats)
BY_NAME = {column.name: column for column in (*KEYS, *COLUMNS)}


def type_of(name: str) -> ValueType | None:
    """The type of a column; None for a column that this version does not know."""
    column = BY_NAME.get(name)
    return None if column is None else column.type


def quantile_name(column: str, quantile: float) -> str:
    """The column with a quantile of the rows' own values: ``cos_angle_q10`` for 0.1."""
    return f"{column}_q{100 * quantile:g}"
