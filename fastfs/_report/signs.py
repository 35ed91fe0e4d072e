"""Signs: what stands out in the numbers of a run, with a severity and the paragraph of the guide about it.

The bounds separate the trainings of ``examples/diagnosis.py`` from healthy ones with a wide margin;
``benchmarks/results/explain-cpu.json`` counts false alarms and missed signs over seeds, models and optimizers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastfs._report.guide import Guide, Paragraph
from fastfs._report.run_numbers import RunNumbers
from fastfs._report.summary import number

__all__ = ["CHANGE", "WRONG", "Sign", "signs"]

WRONG, CHANGE = 80.0, 40.0
"""From these severities on, numbers or training are wrong, and something is to be changed."""

Array = np.ndarray[Any, Any]

_LARGE = 0.5  # relative update, and residual, of a step that is not first order
_RISE = 1.2  # of the loss over its first value
_LITTLE = 0.1  # share of the loss
_LINEAR = 0.02  # residual of a step of which ten times as much would still be first order
_AS_DECLARED = 0.1  # relative distance of the gradient scale from 1, and its variation
_GROWTH = 30.0  # factor over all layers
_PAST = 1.2  # overshoot: 1 is the lowest loss along the step
_STRAIGHT = 0.8  # square of the correlation of a course with a straight line
_IDLE = 0.05  # of the median of its family
_COLLAPSED = 0.01  # cosine
_LATE = 0.5  # share of the measured steps that are the end of a run
_FEW = 3  # measured steps
_NOT_FINITE = "values that are not finite"  # the reason of a row
_MOSTLY = 0.7  # share of the measured steps
_DECAYED = 0.1  # norm of the parameters, relative to the first one
_SIZES = (("feature_rms", "growth", "Features"), ("backward_rms", "vanishing", "Backward vectors"))


@dataclass(frozen=True)
class Sign:
    """What stands out.

    Attributes:
        severity: at least :data:`WRONG`, :data:`CHANGE`, or below 10 if nothing is wrong.
        text: a sentence with the numbers.
        paragraph: of the guide; None for the alert of a user's rule.
        numbers: by name, for JSON.
    """

    severity: float
    text: str
    paragraph: Paragraph | None
    numbers: dict[str, Any] = field(default_factory=dict)


def signs(run: RunNumbers, guide: Guide) -> list[Sign]:
    """Returns everything that stands out in a run, the most severe first."""
    # Of a probe, the update follows other batches.
    looks = [look for look in _LOOKS if not (run.header.get("mode") == "probe" and look in (_uphill, _collapse))]
    found = [sign for look in looks for sign in look(run, guide)]
    return sorted(found, key=lambda sign: -sign.severity)


def _nonfinite(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    found = _nonfinite_alerts(run)
    if found:
        first = found[0]
        where = f" in {first['layer']}" if first.get("layer") else ""
        count = "1 alert" if len(found) == 1 else f"{len(found):,} alerts, the first"
        text = f"Numbers that are not finite: {count} at step {first['step']:,}{where}."
        yield Sign(95, text, guide.about("alerts", "nonfinite"), {"alerts": len(found), "step": first["step"]})


def _nonfinite_alerts(run: RunNumbers) -> list[Mapping[str, Any]]:
    return [alert for alert in run.alerts if str(alert["rule"]).startswith("nonfinite")]


def _invalid(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    share = float(run.invalid.mean())
    if share <= _LARGE:
        return
    reason, count = run.reasons().most_common(1)[0]
    if reason == _NOT_FINITE and _nonfinite_alerts(run):
        return  # the alerts say it
    numbers = {"share": share, "reason": reason}
    text = f"{100 * share:.3g} % of the rows are not valid; most often ({count:,}): {reason}."
    floor, update = (_median(run.column(name, valid=False)) for name in ("noise_floor", "relative_update"))
    if math.isfinite(floor) and math.isfinite(update):
        text += f" Noise floor {number(floor, 2)}, relative update {number(update, 2)} (medians)."
        numbers |= {"noise_floor": floor, "relative_update": update}
    yield Sign(70 + 15 * share, text, guide.about("reasons", reason), numbers)


def _scale(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    scale = np.array([]) if run.grid.scale is None else run.grid.scale[np.isfinite(run.grid.scale)]
    if len(scale) < 3:
        return
    low, mid, high = (float(x) for x in np.percentile(scale, (5, 50, 95)))
    if low > 0 and high / low - 1 <= _AS_DECLARED < abs(mid - 1):
        text = f"Gradients are {number(mid)} times as large as declared, at all {len(scale):,} measured steps."
        yield Sign(88, text, guide.about("columns", "gradient_scale"), {"gradient_scale": mid})


def _frozen(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    names = run.header.get("untrained") or []
    paragraph = guide.about("signs", "frozen")
    if names:
        text = f"{_some(names)} require a gradient, and no optimizer has them: they do not train."
        yield Sign(86, text, paragraph, {"untrained": names})
    update = run.column("parameter_update_norm", valid=False)
    still = (update == 0).all(axis=1) & (run.column("gradient_norm", valid=False) > 0).any(axis=1)
    # All parameters stay at the first step of a warm-up that begins at 0.
    if still.any() and not (still.all() and update.shape[1] < _FEW):
        which = [run.names[i] for i in np.flatnonzero(still)]
        text = f"The parameters of {_some(which)} do not move at any measured step, although they get a gradient."
        yield Sign(86 if still.all() else 84, text, paragraph, {"layers": which})


def _without_gradient(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    gradient = run.column("gradient_norm", valid=False)
    if gradient.shape[1] < _FEW or not (gradient > 0).any():
        return
    trained = (run.column("parameter_norm", valid=False) > 0).any(axis=1)  # of a frozen layer, the norm is 0, too
    none = trained & ((gradient == 0).mean(axis=1) > _MOSTLY)
    if none.any():
        which = [run.names[i] for i in np.flatnonzero(none)]
        text = f"The gradient of the parameters of {_some(which)} is exactly 0 at most measured steps."
        yield Sign(82, text, guide.about("signs", "dead"), {"layers": which})


def _rising(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    loss = run.grid.loss[np.isfinite(run.grid.loss)]
    if len(loss) < 2 * _FEW:
        return
    first, late = _median(loss[:_FEW]), _median(loss[len(loss) // 2 :])
    if 0 < _RISE * first < late:
        text = f"The loss rises from {number(first)} (first {_FEW} steps) to {number(late)} (second half; medians)."
        yield Sign(78, text, guide.about("signs", "rising"), {"first": first, "late": late})


def _decayed(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    norm = run.column("parameter_norm", valid=False)
    first = norm[:, 0]
    with np.errstate(all="ignore"):
        left = _median(np.where(first > 0, _medians(_late(norm).T) / first, np.nan))
    if left < _DECAYED:
        text = f"The norm of the parameters falls to {100 * left:.2g} % of its first value (median over layers)."
        yield Sign(64, text, guide.about("signs", "decayed"), {"left": left})


def _too_high(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    residuals = np.abs(run.column("residual"))
    columns = run.column("relative_update"), residuals, residuals * _share_of_usual_decrease(run)
    update, residual, counted = (np.nan_to_num(_medians(each)) for each in columns)
    high = (update > _LARGE) | (counted > _LARGE)
    often = 2 * high[len(high) // 2 :].mean() >= 1
    # Large first steps are usual without a warm-up, and harmless unless the loss rises.
    loss = run.grid.loss[np.isfinite(run.grid.loss)]
    harm = len(loss) > 1 and loss[1:].max() > _RISE * loss[0]
    if (often and high.sum() > 1) or (harm and high.any()):
        steps = run.grid.steps[high]
        numbers = {"steps": int(high.sum()), "relative_update": update[high].max(), "residual": residual[high].max()}
        text = (
            f"{high.sum():,} of {len(high):,} measured steps are too large for first order, the last one at "
            f"{steps[-1]:,}: relative update up to {number(numbers['relative_update'], 2)}, residual up to "
            f"{number(numbers['residual'], 2)} (medians over layers)."
        )
        yield Sign(70 + 10 * float(high.mean()), text, guide.about("signs", "high"), numbers)


def _share_of_usual_decrease(run: RunNumbers) -> Array:
    """Returns |<b, df>| relative to its median over the steps, at most 1: (L, steps).

    The residual divides by it. Where the decrease is near 0 by chance, as for a batch whose loss is at its lowest, the
    residual is large without the step being larger than others.
    """
    aligned = np.abs(run.column("cos_angle") * run.column("update_rms") * run.column("backward_rms"))
    with np.errstate(all="ignore"):
        share: Array = np.minimum(1.0, aligned / _medians(aligned.T)[:, None])
    return share


def _overshoot(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    values = np.array([]) if run.grid.overshoot is None else _late(run.grid.overshoot[None])
    middle = _median(values)
    if np.isfinite(values).sum() >= 3 and middle > _PAST:
        text = (
            f"Half of the steps end beyond the lowest loss along them: the overshoot is {number(middle, 2)} (median)."
        )
        yield Sign(66, text, guide.about("signs", "overshoot"), {"overshoot": middle})


def _inside(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    """Columns of ``details=True`` whose size alone says something."""
    for column, name, most, what in (
        ("attention_logit_max", "logits", 50.0, "The largest attention logit"),
        ("expert_load_max", "experts", 3.0, "The load of the busiest expert, relative to the mean,"),
        ("dead_share", "off", 0.5, "The share of dead units"),
    ):
        values = _medians(_late(run.column(column, valid=False)).T)
        if np.isfinite(values).any() and np.nanmax(values) > most:
            layer = int(np.nanargmax(values))
            text = f"{what} is {number(float(values[layer]))} in {run.names[layer]} in the second half."
            yield Sign(58, text, guide.about("signs", name), {column: float(values[layer])})


def _too_low(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    decrease, loss = _decrease(run), run.grid.loss
    known = np.isfinite(decrease) & np.isfinite(loss)
    if known.sum() < 5 or run.last_cut is None:
        return
    steps, first = run.grid.steps[known], float(loss[known][0])
    gaps = np.diff(steps, append=2 * steps[-1] - steps[-2])
    total = float((decrease[known] * gaps).sum())
    residual = _median(np.abs(run.column("residual")))
    if first > 0 and 0 < total < _LITTLE * first and residual < _LINEAR:
        text = (
            f"The first-order decreases of all {steps[-1] + 1:,} steps add up to {number(total, 2)}, "
            f"{100 * total / first:.2g} % of the loss ({number(first)}), and the residual is {number(residual, 1)}: "
            "larger steps would still be first order."
        )
        yield Sign(60, text, guide.about("signs", "low"), {"total": total, "loss": first, "residual": residual})


def _uphill(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    decrease = _decrease(run)
    decrease = decrease[np.isfinite(decrease)]
    share = float((decrease < 0).mean()) if len(decrease) >= 5 else 0.0
    if share > 0.3:
        text = f"The update raises the loss to first order at {100 * share:.0f} % of the measured steps."
        yield Sign(62, text, guide.about("signs", "uphill"), {"share": share})


def _growth(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    for (column, name, what), family in itertools.product(_SIZES, run.families()):
        sizes = _medians(_logs(run.column(column, valid=False)[family]).T)
        if len(family) < 4 or not np.isfinite(sizes).all():
            continue
        slope, _ = np.polyfit(np.arange(len(family)), sizes, 1)
        total = float(np.exp(slope * (len(family) - 1)))
        if max(total, 1 / total) > _GROWTH and np.corrcoef(np.arange(len(family)), sizes)[0, 1] ** 2 > _STRAIGHT:
            verb = "grow" if total > 1 else "shrink"
            text = (
                f"{what} {verb} by a factor {number(float(np.exp(slope)))} from block to block, {number(total)} from "
                f"{run.names[family[0]]} to {run.names[family[-1]]}."
            )
            yield Sign(72, text, guide.about("signs", name), {"factor": float(np.exp(slope)), "total": total})


def _dead(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    gradient = run.column("gradient_norm", valid=False)
    decrease = run.column("aligned_decrease", valid=False)
    own = np.diff(np.where(run.cut[:, None], decrease, np.nan), axis=0, prepend=0.0)
    still = (run.column("parameter_update_norm", valid=False) == 0).all(axis=1)
    for family in run.families():
        usual = _medians(np.abs(own[family]))
        usual[usual == 0] = np.nan
        for place, layer in enumerate(family):
            near = [gradient[family[i]] for i in (place - 1, place + 1) if 0 <= i < len(family)]
            small = gradient[layer] < 0.3 * np.minimum.reduce(near)
            idle = small & (np.abs(own[layer]) < _IDLE * usual)
            if not still[layer] and idle.mean() > _MOSTLY:
                share = _median(np.abs(own[layer]) / usual)
                text = (
                    f"{run.names[layer]} is idle: its parameters contribute {number(share, 2)} of the decrease that a "
                    f"block like it contributes, with a gradient norm of {number(_median(gradient[layer]), 2)} beside "
                    f"{number(_median(np.array(near)), 2)} of its neighbours."
                )
                yield Sign(74, text, guide.about("signs", "dead"), {"layer": run.names[layer], "share": share})


def _collapse(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    cosine = run.column("cos_angle")
    of_layers = _medians(_late(cosine).T)
    low = of_layers < _COLLAPSED
    if low.any() and 2 * low.sum() >= np.isfinite(of_layers).sum():
        text = f"The cosine of {int(low.sum()):,} of {len(low):,} layers is below {_COLLAPSED:g} in the second half."
        yield Sign(50, text, guide.about("columns", "angle"), {"cos_angle": float(np.nanmin(of_layers))})


def _alerts(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    """Alerts of rules that no other sign is about."""
    seen = ("nonfinite", "gradient scale", "large update", "large residual", "angle collapse")
    rules = dict.fromkeys(str(alert["rule"]) for alert in run.alerts)
    for rule in rules:
        if not rule.startswith(seen):
            own = [alert for alert in run.alerts if alert["rule"] == rule]
            where = f" in {own[0]['layer']}" if own[0].get("layer") else ""
            text = (
                f"Alert {rule}: {len(own):,} times, the first at step {own[0]['step']:,}{where}: {own[0]['message']}."
            )
            yield Sign(55, text, guide.about("alerts", rule), {"rule": rule, "alerts": len(own)})


def _skipped(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    share = len(run.skipped) / (len(run.skipped) + len(run.grid.steps))
    if share > 0.2:
        text = f"{len(run.skipped):,} steps were skipped; the last one because {run.skipped[-1]['reason']}."
        yield Sign(57, text, guide.about("signs", "skipped"), {"skipped": len(run.skipped)})


def _facts(run: RunNumbers, guide: Guide) -> Iterator[Sign]:
    """What is always worth knowing, for a run in which nothing stands out."""
    for rank, (name, said) in enumerate(
        (("relative_update", "Relative update per step"), ("angle", "Angle (rad)"), ("residual", "Residual"))
    ):
        values = run.column(name)
        if np.isfinite(values).any():
            low, mid, high = (float(x) for x in np.nanpercentile(values, (5, 50, 95)))
            text = f"{said}: {number(mid, 2)} (90 % of the rows between {number(low, 2)} and {number(high, 2)})."
            yield Sign(3 - rank, text, guide.about("columns", name), {name: mid, "low": low, "high": high})


_LOOKS: tuple[Callable[[RunNumbers, Guide], Iterator[Sign]], ...] = (
    _nonfinite,
    _invalid,
    _scale,
    _frozen,
    _without_gradient,
    _rising,
    _decayed,
    _too_high,
    _overshoot,
    _inside,
    _too_low,
    _uphill,
    _growth,
    _dead,
    _collapse,
    _alerts,
    _skipped,
    _facts,
)


def _late(values: Array) -> Array:
    """Returns the second half of the steps, at least one: (N, steps) to (N, late steps)."""
    late: Array = values[:, -max(1, round(_LATE * values.shape[1])) :]
    return late


def _decrease(run: RunNumbers) -> Array:
    """Returns the aligned decrease of the last cut, (steps,)."""
    if run.last_cut is None:
        return np.full(len(run.grid.steps), np.nan)
    values: Array = run.column("aligned_decrease", valid=False)[run.last_cut]
    return values


def _medians(values: Array) -> Array:
    """Returns the median of each column, NaN where it has no number: (N, M) to (M,)."""
    result = np.full(values.shape[1], np.nan)
    some = np.isfinite(values).any(axis=0)
    result[some] = np.nanmedian(values[:, some], axis=0)
    return result


def _median(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _logs(values: Array) -> Array:
    return np.log(np.where(values > 0, values, np.nan))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
