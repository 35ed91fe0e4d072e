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
from fastfs._record.ranks.merging import MergedParameters, MergedRows, batches, merge_parameters, merge_rows
from fastfs._record.ranks.part import Array, RankPart
from fastfs._record.record import Record
from fastfs._stats import FeatureStats

__all__ = ["Assembler", "relative_errors"]

_CERTAIN = 2.0  # standard errors that a sampled decrease has to be above zero for a prediction
_LINEAR = 0.1  # residual, or curvature, up to which first order describes a step
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
        self._quantiles = tuple(quantiles)
        self.angles = LastAngles(self._layers)

    def records(self, parts: Sequence[RankPart]) -> list[Record]:
        """Returns the records of one step.

        Args:
            parts: Of the ranks that have sent one, in the order of their numbers; at least one.
        """
        found = [part for part in parts if part.kind != "skipped"]
        if not found:
            return [_skipped(parts[0], parts)]
        kind = "measured" if any(part.kind == "measured" for part in found) else "predicted"
        found = [part for part in found if part.kind == kind]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # NaN is what is not known
            columns, scalars = self._measured(found) if kind == "measured" else self._predicted(found)
        first = found[0]
        result = [Record(kind, first.step, first.time, scalars, columns)]
        structure = next((part.facts["structure"] for part in found if part.facts.get("structure")), None)
        if structure is not None:
            padded = {name: self._padded(column) for name, column in structure.items()}
            result.insert(0, Record("structure", first.step, first.time, {}, padded))
        left_out = [part for part in parts if part.kind == "skipped"]
        if left_out:
            result.append(_skipped(first, left_out))
        return result

    # Kinds of records

    def _measured(self, parts: Sequence[RankPart]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        together = batches(parts)
        whole = sum(map(len, together)) == len(parts[0].place.ranks)
        together = together or [[parts[0]]]
        weights = _weights(together, parts)
        rows, parameters = merge_rows(together, weights), merge_parameters(parts)
        reason = rows.reason
        if not whole:
            reason = np.where(reason == 0, row_reasons.MISSING_RANKS, reason)
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
        cut = _cut(parts, self._layers)
        residual = np.where(cut, 1.0 - parameters.decrease / -rows.sums[:, 0], np.nan)
        self._errors(columns, rows, stats, residual)
        linear = _linear(residual, rows, _curvature(parts))
        columns["residual"] = self._padded(residual.tolist())
        columns["linear"] = self._padded([None if x != x else bool(x) for x in linear.tolist()])
        columns |= self._aligned(parameters)
        self._add_quantiles(columns, parts)
        scalars = _scalars(together, weights)
        if len(parts[0].place.ranks) > 1:
            scalars["ranks"] = len(parts)
            columns |= {name: self._padded(column) for name, column in between.columns(rows).items()}
        scalars.pop("gradient_factor", None)
        factor, scale = between.common_factor(parts), between.gradient_scale(residual, rows.sums, reason == 0)
        scalars["gradient_scale"] = None if scale is None or factor is None else scale * factor
        where = (reason == 0) & cut & (linear == 1)
        self.angles.keep(_key(parts), stats.cos_angle[: self._layers].numpy(), where)
        return columns, scalars

    def _predicted(self, parts: Sequence[RankPart]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        together = batches(parts)
        whole = sum(map(len, together)) == len(parts[0].place.ranks)
        together = together or [[parts[0]]]
        weights = _weights(together, parts)
        parameters = merge_parameters(parts)
        squares, counts = np.zeros(self._layers), np.zeros(self._layers)
        for peers, weight in zip(together, weights, strict=True):
            norms = np.stack([part.arrays["backward_norm"] for part in peers])
            sizes = np.stack([np.asarray(part.facts["counts"], dtype=np.float64) for part in peers])
            same = (np.abs(norms - norms[0]) <= 1e-9 * norms[0]).all(axis=0) & (sizes == sizes[0]).all(axis=0)
            squares += weight**2 * np.where(same, norms[0] ** 2, (norms**2).sum(axis=0))
            counts += np.where(same, sizes[0], sizes.sum(axis=0))
        norm, root = np.sqrt(squares), np.sqrt(counts)
        speed = np.full(self._layers, np.nan)
        cosine = self.angles.find(_key(parts))
        if cosine is not None and whole:
            # Section 2, the feature speed formula, with the last measured angle.
            speed = parameters.decrease / (cosine * norm)
        usable = _cut(parts, self._layers) & (speed > 0)
        if any(float(part.arrays.get("accumulated", 1.0)) == 0 for part in parts):
            usable = np.zeros_like(usable)
        if parameters.variance is not None:  # the sample does not show that the decrease is positive
            usable &= parameters.decrease > _CERTAIN * np.sqrt(parameters.variance)
        columns = self._aligned(parameters)
        columns["backward_rms"] = self._padded((norm / np.where(root > 0, root, np.nan)).tolist())
        columns["update_rms"] = self._padded(np.where(usable, speed / root, np.nan).tolist())
        scalars = _scalars(together, weights)
        scalars.pop("gradient_factor", None)
        if len(parts[0].place.ranks) > 1:
            scalars["ranks"] = len(parts)
        return columns, scalars

    # Columns

    def _aligned(self, parameters: MergedParameters) -> dict[str, list[Any]]:
        columns = {"aligned_decrease": self._padded(parameters.decrease.tolist())}
        for name, values in zip(_ALIGNED, parameters.norms.T, strict=True):
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
        for place, quantile in enumerate(self._quantiles):
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
    """Returns which parameters received a gradient on any rank, and which layers ran on any."""
    touched = [part.facts["touched"] for part in parts]
    ran = [part.facts["ran"] for part in parts]
    if len({*map(len, touched)}) > 1:
        return bytes(touched[0]), tuple(ran[0])
    return bytes(map(max, zip(*touched, strict=True))), tuple(map(any, zip(*ran, strict=True)))


def _weights(together: Sequence[Sequence[RankPart]], parts: Sequence[RankPart]) -> list[float]:
    """Returns w of every batch: as its ranks say, or one by the number of batches."""
    place = parts[0].place
    missing = len(place.ranks) - len(parts)
    shared = max(map(len, together))
    every = len(together) + -(-missing // shared)
    return [1.0 / every if peers[0].place.weight is None else peers[0].place.weight for peers in together]


def _scalars(together: Sequence[Sequence[RankPart]], weights: Sequence[float]) -> dict[str, Any]:
    """Returns the values per step: sums over the batches for what counts, the weighted sum of the losses."""
    firsts = [peers[0].scalars for peers in together]
    scalars = dict(firsts[0])
    losses = [each["loss"] for each in firsts]
    if len(firsts) > 1:
        known = all(loss is not None for loss in losses)
        scalars["loss"] = sum(w * x for w, x in zip(weights, losses, strict=True)) if known else None
    for name in ("micro_batches", "choices", "choices_changed"):
        if name in scalars:
            scalars[name] = sum(each.get(name, 0) for each in firsts)
    scalars["overhead_seconds"] = max(part.scalars["overhead_seconds"] for peers in together for part in peers)
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
