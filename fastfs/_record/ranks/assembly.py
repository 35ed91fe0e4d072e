"""Makes the records of a step from the parts of its ranks: derived columns, verdicts of the run, predicted speeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastfs._record import decrease_reasons, row_reasons
from fastfs._record.columns import FROM_STATS, quantile_name
from fastfs._record.ranks import between
from fastfs._record.ranks.angles import LastAngles
from fastfs._record.ranks.cast_losses import cast_columns
from fastfs._record.ranks.details import details_of
from fastfs._record.ranks.merging import MergedParameters, MergedRows
from fastfs._record.ranks.nonlinear import nonlinear_columns
from fastfs._record.ranks.overshoot import overshoot
from fastfs._record.ranks.parameter_steps import step_columns
from fastfs._record.ranks.part import Array, RankPart
from fastfs._record.ranks.residual_check import RESIDUAL, SINGLE_SPACING, residual_is_large, rms_residual
from fastfs._record.ranks.stages import MergedStep, expanded, merge
from fastfs._record.record import Record
from fastfs._stats import FeatureStats
from fastfs.formula import _relations

__all__ = ["Assembler", "relative_errors"]

_CERTAIN = 2.0  # standard errors that a sampled decrease has to be above zero for a prediction
_LINEAR = 0.1  # residual, or curvature, up to which first order describes a step
_DOT, _BACKWARD = map(FeatureStats.names.index, ("update_dot_backward", "backward_sq"))
_ALIGNED = ("parameter_norm", "parameter_update_norm", "gradient_norm")


class Assembler:
    """Makes records from parts, in the order of the steps.

    Args:
        header: Of the run: its layers and groups.
        quantiles: Quantiles of the rows' cosines and speeds that are recorded.
    """

    def __init__(self, header: Mapping[str, Any], quantiles: Sequence[float] = ()) -> None:
        layers = list(header["layers"])
        self._layers = len(layers)
        places = {name: index for index, name in enumerate(layers)}
        self._groups = [[places[name] for name in members] for members in (header.get("groups") or {}).values()]
        self.quantiles = tuple(quantiles)
        self.angles = LastAngles(self._layers)
        self._leaders: dict[int, int] = {}  # of every rank, the first one of its batch
        self._between = between.Comparison()
        self._known: dict[str, list[Any]] = {}  # the last structure
        self._details: dict[str, list[Any]] | None = None  # entries of the step
        self._other_models = np.zeros(self._layers, dtype=bool)  # layers, at the last measurement

    def records(self, parts: Sequence[RankPart]) -> list[Record]:
        """Returns the records of one step.

        Args:
            parts: Of the ranks that have sent one, in the order of their numbers; at least one.
        """
        structure = self._structure(parts)
        parts = [expanded(part, self._layers) for part in parts]
        found = [part for part in parts if part.kind != "skipped"]
        if not found:
            return [_skipped(parts[0], parts)]
        kind = "measured" if any(part.kind == "measured" for part in found) else "predicted"
        found = [part for part in found if part.kind == kind]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # NaN is what is not known
            columns, scalars = self._measured(found) if kind == "measured" else self._predicted(found)
        first = found[0]
        result = [Record(kind, first.step, first.time, scalars, columns)]
        if kind == "measured" and self._details is not None:
            result.append(Record("details", first.step, first.time, {}, self._details))
        if structure is not None:
            result.insert(0, Record("structure", first.step, first.time, {}, structure))
        left_out = [part for part in parts if part.kind == "skipped"]
        if left_out:
            result.append(_skipped(first, left_out))
        return result

    def _structure(self, parts: Sequence[RankPart]) -> dict[str, list[Any]] | None:
        """Returns the columns of a structure that differs from the last one, of all stages; None if none does."""
        new = False
        for part in parts:
            found = part.facts.get("structure")
            if found is None:
                continue
            new = True
            for name, column in found.items():
                known = self._known.setdefault(name, [None] * self._layers)
                for place, value in zip(part.place.layers or range(self._layers), column, strict=True):
                    known[place] = value
        return {name: self._padded(column) for name, column in self._known.items()} if new else None

    # Kinds of records

    def _measured(self, parts: Sequence[RankPart]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        step = merge(parts, self._leaders)
        rows, parameters = step.rows, step.parameters
        assert rows is not None
        reason = rows.reason
        if not step.whole:
            reason = np.where(reason == 0, row_reasons.MISSING_RANKS, reason)
        self._other_models = other_models = parameters.reason == decrease_reasons.RANKS_DIFFER
        reason = np.where((reason == 0) & other_models, row_reasons.RANKS_DIFFER, reason)
        cut = _cut(parts, self._layers)
        reason = self._without_jacobian(reason, step, parts, np.where(cut, parameters.decrease, np.nan))
        stats = FeatureStats(torch.from_numpy(self._with_groups(rows.sums)))
        codes = self._worst(reason)
        columns: dict[str, list[Any]] = {name: getattr(stats, name).tolist() for name in FROM_STATS}
        why = [row_reasons.REASONS[int(code)] for code in codes]
        columns["valid"] = [each is None for each in why]
        columns["why"] = why
        amplified = self._worst(np.max([part.arrays["amplified"] for part in parts], axis=0))
        columns["method"] = ["amplified" if taken else parts[0].facts["method"] for taken in amplified.tolist()]
        columns["nonfinite"] = stats.nonfinite.tolist()
        columns["count"] = stats.count.tolist()
        columns["rows"] = self._padded(rows.rows[:, 0].tolist())
        decrease, dot = map(torch.from_numpy, (parameters.decrease, rows.sums[:, _DOT]))
        residual = np.where(cut, _relations.residual(decrease, dot).numpy(), np.nan)
        self._errors(columns, rows, stats, residual)
        linear = _linear(residual, rows, _curvature(parts))
        if all("nonlinear" in part.arrays for part in parts):  # each rank has a batch of its own
            rest = self._with_groups(np.sum([part.arrays["nonlinear"] for part in parts], axis=0))
            columns |= {name: values.tolist() for name, values in nonlinear_columns(rest).items()}
        columns["residual"] = self._padded(residual.tolist())
        columns["linear"] = self._padded([None if x != x else bool(x) for x in linear.tolist()])
        columns |= self._aligned(parameters, parts[0].facts.get("casts", ()))
        self._add_quantiles(columns, parts)
        self._details = None
        if all("details" in part.facts for part in parts):
            inside, self._details = details_of(parts, reason.tolist())
            columns |= {name: self._padded(values) for name, values in inside.items()}
        scalars = _scalars(parts, step)
        if len(parts[0].place.ranks) > 1:
            scalars["ranks"] = len(parts)
            columns |= {name: self._padded(column) for name, column in self._between.columns(rows).items()}
        scalars.pop("gradient_factor", None)
        # The schedule of a pipeline may scale gradients after the backward.
        factor = between.common_factor(parts) if parts[0].place.stages == 1 else 1.0
        scale = between.gradient_scale(residual, rows.sums, reason == 0)
        scalars["gradient_scale"] = None if scale is None or factor is None else scale * factor
        scalars["overshoot"] = overshoot(step, reason, scale)
        where = (reason == 0) & cut & (linear == 1)
        self.angles.keep(_key(parts), stats.cos_angle[: self._layers].numpy(), where)
        return columns, scalars

    def _predicted(self, parts: Sequence[RankPart]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        step = merge(parts, self._leaders)
        parameters = step.parameters
        if parameters.variance is not None:  # sums over a sample do not tell replicas apart
            parameters.reason[self._other_models & (parameters.reason == 0)] = decrease_reasons.RANKS_DIFFER
            parameters.decrease[self._other_models] = np.nan
        assert step.backward is not None
        norm, root = step.backward[0], np.sqrt(step.backward[1])
        speed = np.full(self._layers, np.nan)
        cosine = self.angles.find(_key(parts))
        if cosine is not None and step.whole:
            # Section 2, the feature speed formula, with the last measured angle.
            values = map(torch.from_numpy, (parameters.decrease, cosine, norm))
            speed = _relations.predicted_update_norm(*values).numpy()
        usable = _cut(parts, self._layers) & (speed > 0)
        if any(float(part.arrays.get("accumulated", 1.0)) == 0 for part in parts):
            usable = np.zeros_like(usable)
        if parameters.variance is not None:  # the sample does not show that the decrease is positive
            usable &= parameters.decrease > _CERTAIN * np.sqrt(parameters.variance)
        columns = self._aligned(parameters)
        columns["backward_rms"] = self._padded((norm / np.where(root > 0, root, np.nan)).tolist())
        columns["update_rms"] = self._padded(np.where(usable, speed / root, np.nan).tolist())
        scalars = _scalars(parts, step)
        scalars.pop("gradient_factor", None)
        if len(parts[0].place.ranks) > 1:
            scalars["ranks"] = len(parts)
        return columns, scalars

    @staticmethod
    def _without_jacobian(reason: Any, step: MergedStep, parts: Sequence[RankPart], decrease: Array) -> Any:
        """Refuses layers if the residual of the run shows that rounding has changed the Jacobian, as one rank does."""
        rows = step.rows
        if rows is None or not all("odd" in part.arrays for part in parts):
            return reason
        weights = np.array(step.weights)[:, None]
        odd = np.stack([_of_batch(peers) for peers in step.together])  # (B, 3, L)
        dot, update_sq = (weights * odd[:, 0]).sum(axis=0), odd[:, 1].sum(axis=0)
        margin = rows.margin * np.sqrt(rows.spread[:, 0])
        moved_sq, backward_sq = odd[:, 2].mean(axis=0), rows.sums[:, _BACKWARD]
        values = tuple(map(torch.from_numpy, (dot, update_sq, backward_sq, decrease, margin, moved_sq)))
        if parts[0].facts["method"] == "jvp":
            large = bool(rms_residual(*values[:5])[0] > RESIDUAL)
            coarse = np.ones_like(reason, dtype=bool)
        else:
            large = bool(residual_is_large(*values))
            coarse = np.max([part.arrays["eps"] for part in parts], axis=0) > SINGLE_SPACING
        weaker = np.isin(reason, (row_reasons.OK, row_reasons.BIASED, row_reasons.SMALL_ANGLE))
        return np.where(large & coarse & weaker, row_reasons.JACOBIAN, reason)

    # Columns

    def _aligned(self, parameters: MergedParameters, names: Sequence[str] = ()) -> dict[str, list[Any]]:
        columns = {"aligned_decrease": self._padded(parameters.decrease.tolist())}
        for name, values in zip(_ALIGNED, parameters.norms.T, strict=True):
            columns[name] = self._padded(values.tolist())
        differ = parameters.reason[:, None] == decrease_reasons.RANKS_DIFFER  # of several models there is no one step
        dots, casts = (np.where(differ, np.nan, each) for each in (parameters.dots, parameters.casts))
        found = step_columns(parameters.norms, dots) | cast_columns(names, casts)
        for name, values in found.items():
            columns[name] = self._padded(values.tolist())
        errors: list[Any] = [None] * self._layers
        if parameters.variance is not None:
            errors = np.where(np.isnan(parameters.decrease), np.nan, np.sqrt(parameters.variance)).tolist()
        columns["decrease_se"] = self._padded(errors)
        columns["decrease_why"] = self._padded([decrease_reasons.REASONS[int(x)] or None for x in parameters.reason])
        return columns

    def _errors(self, columns: dict[str, list[Any]], rows: MergedRows, stats: FeatureStats, residual: Array) -> None:
        """Adds the standard errors that come from the sample of rows."""
        cosine_se, update_se, dot_se = relative_errors(rows.spread)
        cosine = stats.cos_angle[: self._layers].numpy()
        errors = {
            "angle_se": cosine_se * np.abs(cosine) / np.sqrt(np.maximum(1.0 - cosine**2, 0.0)),
            "update_rms_se": update_se * stats.update_rms[: self._layers].numpy(),
            "residual_se": dot_se * np.abs(1.0 - residual),
        }
        sampled = [0 < kept < total for kept, total in rows.rows.tolist()]
        for name, values in errors.items():
            found = zip(sampled, values.tolist(), strict=True)
            columns[name] = self._padded([value if part else None for part, value in found])

    def _add_quantiles(self, columns: dict[str, list[Any]], parts: Sequence[RankPart]) -> None:
        """Adds quantiles of the rows; those of several ranks do not follow from those of each."""
        values = parts[0].arrays["quantiles"]
        if len(parts) > 1:
            values = np.full_like(values, np.nan)
        for place, quantile in enumerate(self.quantiles):
            columns[quantile_name("cos_angle", quantile)] = self._padded(values[:, 0, place].tolist())
            columns[quantile_name("update_rms", quantile)] = self._padded(values[:, 1, place].tolist())

    # Groups, whose entries follow those of the layers

    def _with_groups(self, sums: Array) -> Array:
        """Appends each group's sums, which are those of its layers added up: (L, ...) -> (L + G, ...)."""
        return np.concatenate([sums, *(sums[members].sum(axis=0, keepdims=True) for members in self._groups)])

    def _worst(self, codes: Any) -> Any:
        """Appends each group's code, the largest of its layers, 0 if all are valid: (L,) -> (L + G,)."""
        return np.concatenate([codes, *(codes[members].max(keepdims=True) for members in self._groups)])

    def _padded(self, values: Sequence[Any]) -> list[Any]:
        """Appends None for every group, in a column that has entries for layers only."""
        return [*values, *[None] * len(self._groups)]


def _of_batch(peers: Sequence[RankPart]) -> Array:
    """Returns the odd part of the ranks that share a batch: that of the first if all have the same, else their sum."""
    every = np.stack([part.arrays["odd"] for part in peers])
    same = bool(np.allclose(every, every[0], rtol=1e-9, equal_nan=True))
    found: Array = every[0] if same else every.sum(axis=0)
    return found


def relative_errors(spread: Array) -> tuple[Array, Array, Array]:
    """Returns relative standard errors of the cosine, of |df| and of <b, df>, (L,) each.

    Args:
        spread: Relative covariances, (L, 6) in the order of :data:`fastfs._record.ranks.part.SPREAD`.
    """
    dot, with_update, with_backward, update, between_norms, backward = spread.T
    cosine = dot + (update + backward) / 4 - with_update - with_backward + between_norms / 2
    return np.sqrt(np.maximum(cosine, 0.0)), np.sqrt(update) / 2, np.sqrt(dot)


def _linear(residual: Array, rows: MergedRows, curvature: Array | None) -> Array:
    """Returns whether first order describes the step: (L,), 1 or 0, nan if that is unknown."""
    margin = np.nan_to_num(rows.margin * np.sqrt(rows.spread[:, 0]) * np.abs(1.0 - residual))
    by_residual = (np.abs(residual) <= _LINEAR + margin).astype(np.float64)
    other = np.full_like(residual, np.nan)
    if curvature is not None:
        other = np.where(np.isnan(curvature), np.nan, curvature <= _LINEAR)
    return np.where(np.isnan(residual), other, by_residual)


def _curvature(parts: Sequence[RankPart]) -> Array | None:
    found = [part.arrays["curvature"] for part in parts if "curvature" in part.arrays]
    return np.max(found, axis=0) if found else None


def _cut(parts: Sequence[RankPart], layers: int) -> Any:
    """Returns which layers are cuts on all ranks, bool (L,)."""
    flags = [part.facts.get("cut") or [False] * layers for part in parts]
    return np.all(flags, axis=0)


def _key(parts: Sequence[RankPart]) -> tuple[bytes, tuple[bool, ...]]:
    """Returns which parameters received a gradient on any rank, stage by stage, and which layers ran on any."""
    touched: list[bytes] = []
    for stage in sorted({part.place.stage for part in parts}):
        own = [part.facts["touched"] for part in parts if part.place.stage == stage]
        same = [each for each in own if len(each) == len(own[0])]
        touched.append(bytes(map(max, zip(*same, strict=True))) if own[0] else b"")
    return b"".join(touched), tuple(map(any, zip(*(part.facts["ran"] for part in parts), strict=True)))


def _scalars(parts: Sequence[RankPart], step: MergedStep) -> dict[str, Any]:
    """Returns the values per step: sums over the batches for what counts, the weighted sum of the losses."""
    firsts = [peers[0].scalars for peers in step.together]
    scalars = dict(firsts[0])
    losses = [each["loss"] for each in firsts]
    if len(firsts) > 1:
        known = all(loss is not None for loss in losses)
        scalars["loss"] = sum(w * x for w, x in zip(step.weights, losses, strict=True)) if known else None
    for name in ("micro_batches", "choices", "choices_changed"):
        if name in scalars:
            scalars[name] = sum(each.get(name, 0) for each in firsts)
    scalars["overhead_seconds"] = max(part.scalars["overhead_seconds"] for part in parts)
    return scalars


def _skipped(first: RankPart, parts: Sequence[RankPart]) -> Record:
    """Returns the record of a step that some ranks have left out, with the reason of each."""
    reasons: dict[str, list[int]] = {}
    for part in parts:
        reasons.setdefault(part.scalars["reason"], []).append(part.place.rank)
    text = "; ".join(reasons)
    if len(first.place.ranks) > 1 and sum(map(len, reasons.values())) < len(first.place.ranks):
        said = [f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {why}" for why, ranks in reasons.items()]
        text = "; ".join(said)
    return Record("skipped", first.step, first.time, {"reason": text})
