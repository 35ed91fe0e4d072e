"""The summary of a run in numbers and sentences, computed from all rows."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from fastfs._record.reading.confidence import LARGEST_FACTOR, SHARE, overall_factor
from fastfs._report import ranks
from fastfs._report.grids import Grid, Predictions

__all__ = [
    "STEP_TIME_RATIO",
    "WITHHELD",
    "cards",
    "confidence_in_words",
    "duration",
    "findings",
    "number",
    "predicted_text",
    "since",
]

STEP_TIME_RATIO = "step_time_ratio"
"""Key of a record's metadata: ratios of step times with and without the monitor, as ``fastfs demo`` measures them."""

WITHHELD = "withheld"
"""What stands in place of a predicted speed of which too little is known."""

_AS_DECLARED = 0.1  # relative distance of the gradient scale from 1
_RECENT = 0.2  # share of the measured steps that "at the end" means


def number(value: float | None, digits: int = 3) -> str:
    """Formats a number for a person."""
    if value is None or not math.isfinite(value):
        return "-"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def since(seconds: float) -> str:
    """Formats a duration in its two largest units."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    if seconds < 10:
        return f"{seconds:.2g} s"
    parts = [(86400, "d"), (3600, "h"), (60, "min"), (1, "s")]
    rest = round(seconds)
    said: list[str] = []
    for size, unit in parts:
        if rest >= size or (unit == "s" and not said):
            said.append(f"{rest // size} {unit}")
            rest %= size
        elif said:
            break
    return " ".join(said[:2])


def duration(header: Mapping[str, Any], grids: Sequence[Grid]) -> float:
    """Seconds from the start in the header to the last row; NaN without rows."""
    times = np.concatenate([grid.times for grid in grids]) if grids else np.array([])
    times = times[np.isfinite(times)]
    if not len(times):
        return math.nan
    start = float(times.min())
    with contextlib.suppress(ValueError):  # without a readable start in the header, the first row counts
        start = min(start, datetime.fromisoformat(str(header.get("started"))).timestamp())
    return float(times.max()) - start


def cards(
    header: Mapping[str, Any], measured: Grid, predicted: Grid, layers: int, alerts: int, skipped: int
) -> list[dict[str, str]]:
    """The boxes at the top of the page, each with label, value and note."""
    steps = np.union1d(measured.steps, predicted.steps)
    seconds = duration(header, [measured, predicted])
    angle = measured.columns.get("angle", np.empty((0, 0)))[:layers]
    present = int((np.isfinite(angle) | measured.invalid[:layers]).sum()) if angle.size else 0
    valid = int((np.isfinite(angle) & ~measured.invalid[:layers]).sum()) if angle.size else 0
    spent = float(np.nansum(measured.overhead) + np.nansum(predicted.overhead))
    loss = _loss(measured, predicted)
    some = len(steps) > 0
    boxes = [
        (
            "Steps",
            f"{steps[-1] + 1:,}" if some else "none",
            f"{steps[0]:,} to {steps[-1]:,} in the record" if some else "the record has no rows yet",
        ),
        ("Time", since(seconds), "from the start to the last row"),
        ("Measured", f"{len(measured.steps):,} steps", f"and {len(predicted.steps):,} predicted from the formula"),
        (
            "Angles valid",
            f"{100 * valid / present:.3g} %" if present else "-",
            f"{valid:,} of {present:,} (layers x steps)" if present else "no angle was measured",
        ),
        ("In the monitor", since(spent) if some else "-", _in_monitor(measured, predicted)),
        ("Alerts", f"{alerts:,}", f"{skipped:,} optimizer steps skipped" if skipped else "no optimizer step skipped"),
        (
            "Loss",
            number(loss[1]),
            f"from {number(loss[0])} at the start" if math.isfinite(loss[0]) else "not recorded",
        ),
    ]
    boxes += _step_time(header)
    boxes += ranks.card(header, measured, predicted)
    return [{"label": label, "value": value, "note": note} for label, value, note in boxes]


def _in_monitor(measured: Grid, predicted: Grid) -> str:
    """The host time of a step in the monitor: medians."""
    kinds = (("measured", measured.overhead), ("predicted", predicted.overhead))
    said = [f"{1e3 * np.nanmedian(s):.3g} ms per {kind} step" for kind, s in kinds if np.isfinite(s).any()]
    return f"host time: {', '.join(said)}" if said else "nothing measured yet"


def _step_time(header: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The box of a run beside the same training without the monitor: the step time ratio."""
    metadata = header.get("metadata")
    ratio = metadata.get(STEP_TIME_RATIO) if isinstance(metadata, Mapping) else None
    if not isinstance(ratio, Mapping):
        return []
    names = ("measured_step", "other_step", "at_this_every", "at_every_100")
    values = [ratio.get(name) for name in names]
    if not all(isinstance(value, int | float) for value in values):
        return []
    measured, other, here, hundred = (f"{value:.2f}" for value in values)
    note = f"of a measured step; {other} of others, {here} on average here, {hundred} at every=100"
    return [("Step time ratio", measured, note)]


def findings(names: Sequence[str], layers: int, measured: Grid, judged: Predictions) -> list[str]:
    """Describes in sentences what stands out.

    Args:
        names: of layers and groups.
        layers: number of layers.
        measured: grid of the measured rows.
        judged: the predictions.

    Returns:
        The sentences.
    """
    if not len(measured.steps):
        only = "No step was measured, so nothing tells how far predicted speeds can be trusted: they are withheld."
        return [only] if judged.given.shape[1] else []
    said: list[str] = []
    recent = max(1, round(_RECENT * len(measured.steps)))
    when = "at the end of the run" if recent < len(measured.steps) else "in the run"
    angle = _layer_medians(measured, "angle", layers, recent)
    if len(angle):
        first, last, top = min(angle), max(angle), max(angle, key=lambda i: angle[i])
        highest = f"; highest in {names[top]}, {_rad(angle[top])}" if top not in (first, last) else ""
        ends = f"{_rad(angle[first])} in {names[first]}" + (
            f", {_rad(angle[last])} in {names[last]}" if last != first else ""
        )
        said.append(
            f"Angle {when} (median per layer): {ends}{highest}. Near 90° a layer moves without lowering the loss."
        )
    relative = _layer_medians(measured, "relative_update", layers, recent)
    if len(relative) > 1:
        fast, slow = max(relative, key=lambda i: relative[i]), min(relative, key=lambda i: relative[i])
        said.append(
            f"Fastest relative to its features {when}: {names[fast]}, {number(relative[fast], 2)} per step; "
            f"slowest: {names[slow]}, {number(relative[slow], 2)}."
        )
    said += _residual(names, layers, measured)
    said += confidence_in_words(judged)
    said += _scale(measured)
    said += _invalid(names, layers, measured)
    return said


def _residual(names: Sequence[str], layers: int, measured: Grid) -> list[str]:
    if "residual" not in measured.columns:
        return []
    clean = np.where(measured.invalid, np.nan, measured.columns["residual"])[:layers]
    size = np.abs(clean)
    if not np.isfinite(size).any():
        return []
    layer, column = divmod(int(np.nanargmax(size)), size.shape[1])
    return [
        f"Residual: half of the valid cells are within {number(float(np.nanmedian(size)), 2)} of 0, "
        f"95 % within {number(float(np.nanpercentile(size, 95)), 2)} (0: the formula holds exactly); the largest is "
        f"{number(float(clean[layer, column]))}, in {names[layer]} at step {measured.steps[column]:,}."
    ]


def confidence_in_words(judged: Predictions) -> list[str]:
    """Says in sentences how far predicted speeds can be trusted, and how many are withheld."""
    within, count = overall_factor(judged.ratios)
    said = []
    if count:
        said.append(
            f"Formula: {100 * SHARE:.0f} % of {count:,} measured speeds are within a factor {number(within)} of what "
            "it predicts for the same step with the angle measured before."
        )
    given, withheld = int(judged.given.sum()), int(judged.withheld.sum())
    if given:
        rest = "each is shown with the factor of its layer"
        if withheld:
            which = "all" if withheld == given else f"{withheld:,}"
            rest = f"{which} are withheld, because their factor is above {LARGEST_FACTOR:g} or not known yet"
        said.append(f"Predicted speeds: {given:,}; {rest}.")
    return said


def predicted_text(speed: float, factor: float) -> str:
    """Formats a predicted speed with its factor; it is withheld if the factor is too large or not known."""
    if not math.isfinite(speed):
        return "-"
    return f"{speed:.2e} x/÷{factor:.2f}" if factor <= LARGEST_FACTOR else WITHHELD


def _scale(measured: Grid) -> list[str]:
    """Says whether gradients are scaled as declared, if the record has that."""
    scale = np.array([]) if measured.scale is None else measured.scale[np.isfinite(measured.scale)]
    if not scale.size:
        return []
    low, mid, high = (float(x) for x in np.percentile(scale, (5, 50, 95)))
    said = f"Gradient scale {mid:#.4g} (90 % between {low:#.4g} and {high:#.4g})"
    if abs(mid - 1.0) <= _AS_DECLARED:
        return [f"{said}: as declared."]
    if low > 0 and high / low - 1.0 <= _AS_DECLARED:
        return [f"{said}: gradients are {mid:.3g} times as large as declared."]
    return [f"{said}: it varies, by clipping or by steps that are too large for first order."]


def _invalid(names: Sequence[str], layers: int, measured: Grid) -> list[str]:
    bad = measured.invalid[:layers]
    if not bad.any():
        return []
    reasons = Counter(measured.reasons[code] for code in measured.why[:layers][bad].tolist())
    reason, count = reasons.most_common(1)[0]
    said = f"Not valid: {int(bad.sum()):,} of {bad.size:,} cells; most often ({count:,}): {reason}."
    if bad.all():
        return [f"No angle of this run is valid. Reason given most often ({count:,} of {bad.size:,}): {reason}."]
    never = [names[i] for i in np.flatnonzero(bad.all(axis=1)).tolist()]
    if never:
        said += f" Never valid: {', '.join(never[:5])}{f' and {len(never) - 5} more' if len(never) > 5 else ''}."
    return [said]


def _layer_medians(grid: Grid, column: str, layers: int, recent: int) -> dict[int, float]:
    """Median per layer over the valid cells of the last ``recent`` measured steps; layers without any are missing."""
    values = grid.columns.get(column)
    if values is None:
        return {}
    values = np.where(grid.invalid, np.nan, values)[:layers, -recent:]
    some = np.flatnonzero(np.isfinite(values).any(axis=1))
    return {int(i): float(np.nanmedian(values[i])) for i in some}


def _loss(measured: Grid, predicted: Grid) -> tuple[float, float]:
    steps = np.concatenate([measured.steps, predicted.steps])
    loss = np.concatenate([measured.loss, predicted.loss])[np.argsort(steps, kind="stable")]
    loss = loss[np.isfinite(loss)]
    return (float(loss[0]), float(loss[-1])) if len(loss) else (math.nan, math.nan)


def _rad(value: float) -> str:
    return f"{value:.2f} rad ({math.degrees(value):.0f}°)"
