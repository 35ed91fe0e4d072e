"""Whether training transfers over width and depth, from the records of runs that were monitored."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastfs._compare.runs import RecordedRun, read_runs
from fastfs._report.quantities import QUANTITIES
from fastfs.scaling._fit import Status, fit_exponent, judge, stats
from fastfs.scaling._transfer_report import TransferReport
from fastfs.scaling._verdicts import AXES, Verdict

__all__ = ["transfer"]

Array = np.ndarray[Any, Any]
Size = tuple[float, float]

_LEAST_SIZES = 3


@dataclass(frozen=True)
class _Judged:
    """A quantity that should not depend on the size: its desideratum, its name, and how it follows from a run."""

    desideratum: str
    name: str
    advice: str


_SIZE = _Judged("SP", "feature size", "scale residual branches, and matrices by their fan-in")
_MEAN_SIZE = _Judged("SP", "feature size, mean of layers", _SIZE.advice)
_SPEED = _Judged("FL", "feature speed", "scale learning rates of hidden layers, and residual branches")
_MEAN_SPEED = _Judged("FL", "feature speed, mean of layers", _SPEED.advice)
_SENSITIVITY = _Judged("FL", "sensitivity", "scale the output layer, and learning rates by its inverse")
_DECREASE = _Judged("LD", "aligned decrease", "scale learning rates by the inverse")
_BALANCE = _Judged("BC", "|g| |dw|, later / earlier layers", "gradients grow or shrink along the network")


def transfer(
    records: Sequence[str | os.PathLike[str]],
    *,
    sizes: Sequence[tuple[float | None, float | None] | None] | None = None,
    steps: int | None = None,
    tolerance: float = 0.15,
    confidence: float = 0.95,
) -> TransferReport:
    """Judge from records of runs of different width and depth whether training transfers over these.

    Of every run, the geometric mean over its first measured steps is taken. Judged are the rms of features (SP) and of
    their update (FL), both of the last watched layer and as geometric mean over layers, the sensitivity, which is the
    update's rms per aligned decrease (FL), the aligned decrease at the last layer (LD), and the median of |g| |dw| over
    the later half of layers against that over the earlier half, without the first layer (BC). Each should scale as
    size^0. An exponent over width has a constant for each depth, and conversely. It passes if its confidence interval
    lies within the tolerance, fails if it lies outside at a twentieth of the error probability, too, and is unclear
    otherwise. The geometric mean over layers of every other quantity of the report is fitted for information.

    Args:
        records: one run each, as for :func:`fastfs.compare`, with the same layers up to their number.
        sizes: (width, depth) of each run, positive; None, also in place of one number, takes the entries ``width``
            and ``depth`` of the run's metadata. An axis with fewer than three different sizes is not judged.
        steps: number of measured steps, from the first one; None means all that the runs have in common.
        tolerance: permitted deviation of an exponent from 0.
        confidence: level of the intervals.

    Returns:
        Exponents and verdicts.

    Raises:
        ImportError: pandas or scipy is not installed.
        OSError: a record cannot be read.
        ValueError: a size is missing or not positive, there are fewer than three different widths and depths, a run has
            no measured rows, or the runs have no measured step in common.

    Source: "The Feature Speed Formula" (arXiv 2311.18718), the desiderata SP, FL, LD and BC.
    """
    for name, number in (("tolerance", tolerance), ("confidence", confidence)):
        if not 0 < number < 1:
            raise ValueError(f"{name}: expected a number between 0 and 1, got {number}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    stats()  # report a missing scipy before reading
    runs = read_runs(records)
    if sizes is not None and len(sizes) != len(runs):
        raise ValueError(f"sizes: expected one for every run, got {len(sizes)} for {len(runs)} runs")
    given = [None] * len(runs) if sizes is None else list(sizes)
    found = [_size(run, size) for run, size in zip(runs, given, strict=True)]
    shared = _common_steps(runs)[:steps]
    axes = [axis for i, axis in enumerate(AXES) if len({size[i] for size in found}) >= _LEAST_SIZES]
    if not axes:
        widths, depths = (sorted({size[i] for size in found}) for i in (0, 1))
        raise ValueError(
            f"an exponent with an interval requires at least 3 different sizes, got the widths {_few(widths)} and the "
            f"depths {_few(depths)}"
        )
    judged = [_judged_values(run, shared) for run in runs]
    informed = [_other_values(run, shared) for run in runs]
    verdicts = []
    for axis in axes:
        for quantity in judged[0]:
            values = [one[quantity] for one in judged]
            verdicts.append(_verdict(quantity, axis, found, values, tolerance, confidence))
        for label in informed[0]:
            values = [one.get(label, math.nan) for one in informed]
            if all(math.isfinite(value) for value in values):
                fit = fit_exponent(*_along(axis, found, values), confidence=confidence, blocks=_blocks(axis, found))
                verdicts.append(Verdict("", label, axis, fit, None))
    return TransferReport(
        labels=tuple(run.label for run in runs),
        sizes=tuple(found),
        steps=tuple(int(step) for step in shared),
        axes=tuple(axes),
        tolerance=tolerance,
        confidence=confidence,
        verdicts=tuple(verdicts),
        values=tuple({quantity.name: value for quantity, value in one.items()} for one in judged),
    )


def _size(run: RecordedRun, given: tuple[float | None, float | None] | None) -> Size:
    metadata = run.header.get("metadata")
    noted = metadata if isinstance(metadata, Mapping) else {}
    numbers = []
    for axis, number in zip(AXES, given or (None, None), strict=True):
        value = noted.get(axis) if number is None else number
        if value is None:
            raise ValueError(f"{run.label}: no {axis} was given, and the record's metadata has none")
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{run.label}: expected a positive {axis}, got {value!r}")
        numbers.append(float(value))
    return numbers[0], numbers[1]


def _few(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers[:8]) + (", ..." if len(numbers) > 8 else "")


def _common_steps(runs: Sequence[RecordedRun]) -> Array:
    for run in runs:
        if not len(run.grid.steps):
            raise ValueError(f"{run.label}: the run has no measured rows yet")
    steps = runs[0].grid.steps
    for run in runs[1:]:
        steps = np.intersect1d(steps, run.grid.steps)
    if not len(steps):
        first = ", ".join(f"{run.label} from {run.grid.steps[0]}" for run in runs[:8])
        raise ValueError(f"the runs have no measured step in common: {first}")
    return steps


def _logs(run: RecordedRun, column: str, steps: Array, *, guarded: bool) -> Array:
    """Logarithms (layers, steps), NaN where a value is missing, not valid or not positive."""
    places = np.searchsorted(run.grid.steps, steps)
    values = run.grid.columns.get(column, np.full(run.grid.invalid.shape, np.nan))[:, places].astype(np.float64)
    values[~(values > 0)] = np.nan
    if guarded:
        values[run.grid.invalid[:, places]] = np.nan
    return np.log(values)


def _judged_values(run: RecordedRun, steps: Array) -> dict[_Judged, float]:
    size = _logs(run, "feature_rms", steps, guarded=False)
    speed = _logs(run, "update_rms", steps, guarded=True)
    decrease = _logs(run, "aligned_decrease", steps, guarded=False)[-1]
    sizes = [_logs(run, f"{what}_norm", steps, guarded=False) for what in ("gradient", "parameter_update")]
    contribution = (sizes[0] + sizes[1])[1:]  # without the first layer, whose parameters include the input layer
    half = len(contribution) // 2
    logs = {
        _SIZE: size[-1],
        _MEAN_SIZE: _over_layers(size),
        _SPEED: speed[-1],
        _MEAN_SPEED: _over_layers(speed),
        _SENSITIVITY: speed[-1] - decrease,
        _DECREASE: decrease,
    }
    if half:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a layer without own parameters at any step
            logs[_BALANCE] = np.nanmedian(contribution[-half:], axis=0) - np.nanmedian(contribution[:half], axis=0)
    return {quantity: _over_steps(values) for quantity, values in logs.items()}


def _other_values(run: RecordedRun, steps: Array) -> dict[str, float]:
    used = ("feature_rms", "update_rms", "aligned_decrease", "noise_floor")
    keys = [q for q in QUANTITIES if q.key not in used and (q.log or q.key in ("angle", "cos_angle"))]
    return {q.label.lower(): _over_steps(_over_layers(_logs(run, q.key, steps, guarded=q.guarded))) for q in keys}


def _over_layers(logs: Array) -> Array:
    """Mean over layers, (steps,); NaN if one of those that have values at other steps has none."""
    present = np.isfinite(logs).any(axis=1)
    return logs[present].mean(axis=0) if present.any() else np.full(logs.shape[1], np.nan)


def _over_steps(logs: Array) -> float:
    return float(np.exp(logs.mean())) if np.isfinite(logs).all() else math.nan


def _along(axis: str, sizes: Sequence[Size], values: Sequence[float]) -> tuple[list[float], list[float]]:
    return [size[AXES.index(axis)] for size in sizes], list(values)


def _blocks(axis: str, sizes: Sequence[Size]) -> list[float]:
    """The other size, which has a constant of its own."""
    return [size[1 - AXES.index(axis)] for size in sizes]


def _verdict(
    quantity: _Judged, axis: str, sizes: Sequence[Size], values: Sequence[float], tolerance: float, confidence: float
) -> Verdict:
    missing = sum(not math.isfinite(value) for value in values)
    if missing:
        text = f"{quantity.name} is missing, not valid or not positive in {missing} of {len(values)} runs"
        return Verdict(quantity.desideratum, quantity.name, axis, None, Status.UNCLEAR, None, text)
    fit = fit_exponent(*_along(axis, sizes, values), confidence=confidence, blocks=_blocks(axis, sizes))
    status, factor = judge(fit, 0.0, tolerance)
    verb = "grows" if fit.exponent > 0 else "falls"
    text = f"{quantity.name} {verb} like {axis}^{fit.exponent:+.2f}: {quantity.advice}"
    seeds = None if factor is None else factor * len(values)
    return Verdict(quantity.desideratum, quantity.name, axis, fit, status, seeds, text if status is Status.FAIL else "")
