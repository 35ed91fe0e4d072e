"""Ranks that do not have the same layers: stages of a pipeline, experts of one rank alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastfs._record import decrease_reasons, row_reasons
from fastfs._record.ranks.merging import (
    MergedParameters,
    MergedRows,
    batches,
    merge_norms,
    merge_parameters,
    merge_rows,
    weights_of,
)
from fastfs._record.ranks.part import Array, RankPart

__all__ = ["MergedStep", "expanded", "merge"]

# What a rank says of a layer that it does not have, by the axis of layers.
_ABSENT: dict[str, tuple[int, float]] = {
    "sums": (0, 0.0),
    "spread": (0, 0.0),
    "reason": (0, float(row_reasons.NOT_RUN)),
    "amplified": (0, 0.0),
    "quantiles": (0, np.nan),
    "curvature": (0, np.nan),
    "nonlinear": (0, 0.0),
    "odd": (1, 0.0),
    "eps": (0, 0.0),
    "backward_norm": (0, np.nan),
    "aligned": (1, np.nan),
    "dots": (1, np.nan),
    "casts": (1, np.nan),
    "variance": (1, 0.0),
    "decrease_reason": (0, float(decrease_reasons.NOTHING)),
}
_FACTS = {"rows": [0, 0], "margin": 2.0, "counts": 0, "ran": False, "cut": True}


@dataclass
class MergedStep:
    """The sums of a step over all ranks.

    Attributes:
        together: The parts of the ranks that work on one batch, for every batch of the last stage.
        weights: w of each batch.
        whole: Whether no rank is missing.
        parameters: Sums over parameters.
        rows: Sums over the rows of features; None for a step that was not measured.
        backward: Norms and numbers of elements of the backward vectors, (L,) each; None for a measured step.
    """

    together: list[list[RankPart]]
    weights: list[float]
    whole: bool
    parameters: MergedParameters
    rows: MergedRows | None
    backward: tuple[Array, Array] | None


def expanded(part: RankPart, layers: int) -> RankPart:
    """Returns a part with entries for all layers of the record."""
    places = part.place.layers
    if places is None:
        return part
    index = list(places)
    arrays = dict(part.arrays)
    for name, (axis, absent) in _ABSENT.items():
        if name in arrays:
            shape = list(arrays[name].shape)
            shape[axis] = layers
            full = np.full(shape, absent)
            full[(slice(None),) * axis + (index,)] = arrays[name]
            arrays[name] = full
    facts = dict(part.facts)
    for name, missing in _FACTS.items():
        if facts.get(name) is not None:
            values = [missing] * layers
            for place, value in zip(index, facts[name], strict=True):
                values[place] = value
            facts[name] = values
    if facts.get("placed"):
        facts["placed"] = {str(index[int(layer)]): where for layer, where in facts["placed"].items()}
    return replace(part, arrays=arrays, facts=facts)


def merge(parts: Sequence[RankPart], known: dict[int, int]) -> MergedStep:
    """Returns the sums of a step over all ranks, stage by stage.

    The decrease of a layer is that of its own stage upstream of it, and all of the stages before.

    Args:
        parts: Of the ranks that have sent one.
        known: For each rank the first one of its batch; a measured step tells it, for the predicted steps after it.
    """
    numbers = sorted({part.place.stage for part in parts})
    found = [_one_stage([part for part in parts if part.place.stage == number], known) for number in numbers]
    last = found[-1]
    if len(found) == 1 and parts[0].place.stages == 1:
        return last
    layers = found[0].parameters.decrease.shape[0]
    owner, before = np.zeros(layers, dtype=np.int64), np.full(layers, numbers != list(range(parts[0].place.stages)))
    for order, number in enumerate(numbers):
        own = {place for part in parts if part.place.stage == number for place in part.place.layers or ()}
        owner[sorted(own)] = order
    chosen = np.arange(layers)
    decrease, reason = _picked([m.parameters for m in found], owner, chosen, before)
    variances = [m.parameters.variance for m in found]
    variance = None
    if any(each is not None for each in variances):
        filled = np.stack([np.zeros(layers) if each is None else each for each in variances])
        variance = np.array([filled[: owner[i] + 1, i].sum() for i in chosen])
    norms, dots, casts = (
        np.stack([getattr(m.parameters, name) for m in found])[owner, chosen] for name in ("norms", "dots", "casts")
    )
    parameters = MergedParameters(decrease, variance, norms, dots, casts, reason, 0.0)
    rows = None
    if last.rows is not None:
        every = [m.rows for m in found if m.rows is not None]
        values = {name: np.stack([getattr(r, name) for r in every])[owner, chosen] for name in _OF_ROWS}
        few = min(len(r.by_batch) for r in every)
        by_batch = np.stack([r.by_batch[:few] for r in every])[owner, :, chosen].swapaxes(0, 1)
        rows = MergedRows(**values, by_batch=by_batch, first=every[-1].first[:few])
    backward = None
    if last.backward is not None:
        pairs = [m.backward for m in found if m.backward is not None]
        norm, count = (np.stack(each)[owner, chosen] for each in zip(*pairs, strict=True))
        backward = norm, count
    whole = all(m.whole for m in found) and not before.any()
    return MergedStep(last.together, last.weights, whole, parameters, rows, backward)


_OF_ROWS = ("sums", "spread", "rows", "margin", "reason")


def _one_stage(parts: Sequence[RankPart], known: dict[int, int]) -> MergedStep:
    place = parts[0].place
    together = batches(parts, known)
    if parts[0].kind == "measured":
        known.update({part.place.rank: peers[0].place.rank for peers in together for part in peers})
    expected = len(place.ranks) // place.stages
    whole = sum(map(len, together)) == expected
    together = together or [[parts[0]]]
    weights = weights_of(together, expected - len(parts))
    parameters = merge_parameters(parts)
    if parts[0].kind == "measured":
        return MergedStep(together, weights, whole, parameters, merge_rows(together, weights), None)
    return MergedStep(together, weights, whole, parameters, None, merge_norms(together, weights))


def _picked(stages: Sequence[MergedParameters], owner: Any, chosen: Any, missing: Any) -> tuple[Array, Any]:
    """Returns decrease and reason of every layer, with those of the stages before its own."""
    decrease = np.stack([stage.decrease for stage in stages])[owner, chosen]
    reason = np.stack([stage.reason for stage in stages])[owner, chosen]
    totals = np.concatenate([[0.0], np.cumsum([stage.total for stage in stages])])[owner]
    unknown = (np.isnan(totals) | missing) & (reason == 0)
    # A layer without parameters of its own stage upstream has those of the stages before.
    first = (reason == decrease_reasons.NOTHING) & (owner > 0) & ~np.isnan(totals) & ~missing
    decrease, reason = np.where(first, 0.0, decrease), np.where(first, 0, reason)
    return np.where(unknown, np.nan, decrease + totals), np.where(unknown, decrease_reasons.MISSING_RANKS, reason)
