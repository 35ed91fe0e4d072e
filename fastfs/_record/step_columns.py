"""The columns of a record with one value per step."""

from __future__ import annotations

from fastfs._record.column import Column

__all__ = ["ROW_KINDS", "STEP_COLUMNS"]

ROW_KINDS = ("measured", "predicted")
"""Kinds of records that become rows of a table."""

STEP_COLUMNS = (
    Column(
        name="loss",
        type="number",
        meaning="what the loop gave to `monitor.log`",
        per="step",
        kinds=ROW_KINDS,
        since=1,
    ),
    Column(
        name="micro_batches",
        type="integer",
        meaning="forwards whose gradients the step used",
        per="step",
        since=1,
        tensorboard=False,
    ),
    Column(
        name="overhead_seconds",
        type="number",
        unit="s",
        meaning="host time spent in the monitor; a GPU may take longer",
        per="step",
        kinds=ROW_KINDS,
        since=1,
        former_name="measure_seconds",
    ),
    Column(
        name="loss_scale",
        type="number",
        meaning="factor that was divided out of b and g",
        per="step",
        kinds=ROW_KINDS,
    ),
    Column(
        name="kappa",
        type="number",
        meaning="factor by which `amplify=True` enlarged the update",
        per="step",
        optional=True,
    ),
    Column(
        name="choices",
        type="integer",
        meaning="discrete choices of the forward: elements that top-k, argmax and argmin returned, at steps where the "
        "[replay check](validity.md#the-replay-check) runs",
        per="step",
        optional=True,
        tensorboard=False,
    ),
    Column(
        name="choices_changed",
        type="integer",
        meaning="how many of these choices the step changed",
        per="step",
        optional=True,
    ),
    Column(
        name="gradient_scale",
        type="number",
        meaning="by how much gradients are larger than the losses and `loss_weight` say: the median of D / -<b, df> "
        "over the cuts, times a factor that the loop applied after the backward; 1 if the loop scales as declared, to "
        "first order",
        per="step",
        source="2, identity",
    ),
    Column(
        name="overshoot",
        type="number",
        meaning="2 (dL + D) / D, with D of all parameters and dL the change of the loss on the same batch: D is the "
        "decrease to first order, and curvature takes half of this share of it. 0: first order describes the step; 1: "
        "it ends at the minimum along its direction; 2: the loss is what it was. [Null](monitor.md#overshoot) unless "
        "the loss after the step is known",
        per="step",
        source="[2103.00065](https://arxiv.org/abs/2103.00065), 2",
    ),
    Column(
        name="ranks",
        type="integer",
        meaning="number of ranks whose numbers the record contains; only in runs of several",
        per="step",
        kinds=ROW_KINDS,
        optional=True,
        tensorboard=False,
    ),
)
"""In the order of a table."""
