"""The alert rule that audits how a training loop scales its gradients.

At a cut of the network, D = -sum of <g, dw> over the parameters upstream equals -w sum of <b_m, df_m> to first order,
where g is w times the sum of the gradients of all ranks and micro-batches m. The quotient of both sides, times what the
loop did to gradients after the backward, is how much larger gradients are than declared. A step that is too large for
first order also makes it differ from 1. So the rule doubts a quotient by how much it varies over steps and cuts, by
how far features and parameters move, and by the sample of rows, and raises only what is far beyond this doubt.

Source: section 2 of "The Feature Speed Formula", arXiv 2311.18718, the identity for D.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastfs._record.record import Record
from fastfs._record.schema import row_names
from fastfs._record.writing.alert_rule import Finding, Findings
from fastfs._record.writing.gradient_scale_causes import explanation

__all__ = ["GradientScale"]

Array = npt.NDArray[np.float64]

_BEYOND = 2.0  # the logarithm of the scale has to be so many times its doubt
_STANDARD_ERRORS = 4.0  # of the sample of rows, which are in the doubt
_LEAST_COSINE = 0.02  # below which <b, df> is mostly what cancels
_RUNS = 8  # of which one rule keeps steps
_CONSTANT = {True: 2e-3, False: 1e-5}  # relative variation of a constant factor, of 16-bit gradients and of others
_INDEPENDENT = 0.02  # largest variation of a factor relative to that of gradients, if it does not follow from these
_WHOLE = 0.03  # relative distance of a ratio from the number of ranks that explains it


class _Step(NamedTuple):
    """What the rule keeps of a measured step, for L layers; NaN where a layer is no valid cut.

    Attributes:
        scale: D / -<b, df>, (L,).
        decrease: D, (L,).
        doubt: Of the logarithm of `scale`, by first order and by sampling, (L,).
        norms: |g| of the parameters between layers, (L,).
        factor: By what gradients were multiplied after the backward.
    """

    scale: Array
    decrease: Array
    doubt: Array
    norms: Array
    factor: float


@dataclass(eq=False)
class GradientScale:
    """Gradients are not scaled as declared: ``gradient_scale`` is constant over steps and cuts, but it is not 1.

    Declared is the average of DistributedDataParallel or FSDP2, or ``Monitor(loss_weight=)``. The rule keeps the last
    ``window`` measured steps of a run, and says nothing until it has as many. It compares how far the scale is from 1
    with what first order, the sample of rows, and clipping can explain: large steps never raise it.

    Args:
        tolerance: Largest relative distance of the scale from 1 that is healthy.
        window: Number of measured steps over which the scale has to be constant.
        name: Name of the rule in alerts.
    """

    tolerance: float = 0.1
    window: int = 5
    name: str = "gradient scale"
    steps: int = field(default=1, init=False)  # a finding is one of `window` steps
    _kept: dict[str, deque[_Step]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 2:
            raise ValueError(f"window: expected an integer >= 2, got {self.window!r}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance: expected a number between 0 and 1, got {self.tolerance!r}")

    def check(self, record: Record, header: Mapping[str, Any]) -> Findings:
        step = _read(record, header)
        if step is None:
            return {}
        run = str(header.get("run"))
        kept = self._kept.pop(run, None) or deque(maxlen=self.window)
        self._kept[run] = kept
        while len(self._kept) > _RUNS:
            del self._kept[next(iter(self._kept))]
        if kept and len(kept[-1].scale) != len(step.scale):
            kept.clear()
        kept.append(step)
        if len(kept) < self.window:
            return {}
        factor, sure = _constant_factor(kept, 2 in _sizes(header))
        scale = np.stack([each.scale for each in kept])
        doubt = np.stack([each.doubt for each in kept])
        cuts = np.isfinite(scale).all(axis=0)
        if not cuts.any() or (scale[:, cuts] <= 0).any():
            return {}
        logs = np.log(scale[:, cuts])
        middle = float(np.median(logs))
        ratio = math.exp(middle) * factor
        # If the scale is the same at all cuts, curvature would have to be so even where the features move least.
        unsure = float(np.ptp(np.quantile(logs, (0.05, 0.95)))) + float(doubt[:, cuts].min(axis=1).max())
        if abs(ratio - 1.0) <= self.tolerance and unsure <= self.tolerance and sure:
            return {None: None}
        if _BEYOND * unsure <= abs(math.log(ratio)) and abs(ratio - 1.0) > self.tolerance:
            if sure:
                return {None: Finding(ratio, explanation(ratio, factor, record, header, self.window))}
            if ratio > 1:  # clipping only makes gradients smaller
                return {None: Finding(ratio, explanation(ratio, 1.0, record, header, self.window, least=True))}
        return self._in_parts(kept, record, header) if sure and abs(factor - 1.0) < self.tolerance else {}

    def _in_parts(self, kept: Sequence[_Step], record: Record, header: Mapping[str, Any]) -> Findings:
        """Looks for layers between two cuts whose parameters alone are scaled by a number of ranks."""
        ranks = header.get("ranks") or 1
        names, _ = row_names(header)
        scale, decrease = (np.stack([getattr(each, name) for each in kept]) for name in ("scale", "decrease"))
        doubt = np.stack([each.doubt for each in kept])
        cuts = np.flatnonzero((np.isfinite(scale) & np.isfinite(decrease)).all(axis=0))
        before = truth_before = doubt_before = np.zeros(len(kept))
        for place, cut in enumerate(cuts.tolist()):
            truth = decrease[:, cut] / scale[:, cut]
            own, own_truth = decrease[:, cut] - before, truth - truth_before
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = own / own_truth
                error = (np.abs(truth * doubt[:, cut]) + np.abs(truth_before * doubt_before)) / np.abs(own_truth)
            before, truth_before, doubt_before = decrease[:, cut], truth, doubt[:, cut]
            if not (ratios > 0).all() or not np.isfinite(error).all():
                continue
            ratio = float(np.median(ratios))
            times = round(max(ratio, 1.0 / ratio))
            explained = times > 1 and ranks % times == 0 and abs(max(ratio, 1 / ratio) / times - 1.0) <= _WHOLE
            unsure = float(np.ptp(np.log(ratios)) + error.max())
            if explained and _BEYOND * unsure <= abs(math.log(ratio)):
                since = f"after {names[cuts[place - 1]]!r} " if place else ""
                where = f"{since}up to {names[cut]!r}"
                return {None: Finding(ratio, explanation(ratio, 1.0, record, header, self.window, where=where))}
        return {}


def _read(record: Record, header: Mapping[str, Any]) -> _Step | None:
    total = record.scalars.get("gradient_scale")
    columns = ("residual", "cos_angle", "relative_update", "valid")
    if record.kind != "measured" or total is None or any(name not in record.columns for name in columns):
        return None
    _, layers = row_names(header)

    def column(name: str, missing: float = math.nan) -> Array:
        values = record.columns.get(name) or [None] * layers
        return np.array([missing if x is None else float(x) for x in values[:layers]])

    cosine = np.abs(column("cos_angle"))
    valid = (column("valid", 0.0) == 1) & (cosine >= _LEAST_COSINE)
    scale = np.where(valid, 1.0 - column("residual"), np.nan)
    known = scale[np.isfinite(scale)]
    if not len(known) or not math.isfinite(float(total)):
        return None
    middle = float(np.median(known))
    with np.errstate(divide="ignore", invalid="ignore"):
        # Of what is of second order: relative movements of features, and of parameters up to the layer.
        moved = column("parameter_update_norm", 0.0) / column("parameter_norm", 0.0)
        moved = np.fmax.accumulate(np.nan_to_num(moved, nan=0.0, posinf=math.inf))
        doubt = np.maximum(column("relative_update") / cosine, moved)
        doubt += _STANDARD_ERRORS * column("residual_se", 0.0) / np.abs(scale)
    if middle == 0:
        return None
    return _Step(scale, column("aligned_decrease"), doubt, column("gradient_norm"), float(total) / middle)


def _constant_factor(kept: Sequence[_Step], coarse: bool) -> tuple[float, bool]:
    """Returns the largest factor after the backward, and whether it is the constant one of steps without clipping."""
    factors = np.array([each.factor for each in kept])
    largest, allowed = float(factors.max()), _CONSTANT[coarse]
    if abs(largest - 1.0) <= allowed:
        return 1.0, True
    same = factors >= largest * (1.0 - allowed)
    if same.sum() < max(3, len(kept) - 2):
        return largest, False
    norms = np.stack([each.norms for each in kept])[same]
    with np.errstate(divide="ignore", invalid="ignore"):
        changes = np.ptp(norms, axis=0) / norms.max(axis=0)
    known = changes[np.isfinite(changes)]
    # Clipping by norm gives a constant factor only if the norm is as constant.
    varied = float(known.min()) if len(known) else 0.0
    return largest, float(np.ptp(factors[same])) <= _INDEPENDENT * varied * largest


def _sizes(header: Mapping[str, Any]) -> set[int]:
    """Returns the bytes per element of the dtypes of the parameters."""
    names = [name.strip() for name in str(header.get("dtype", "")).split(",")]
    return {2 if name.endswith("16") else 8 if name.endswith("64") else 4 for name in names}
