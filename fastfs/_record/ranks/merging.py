"""Merges what the ranks of a run have sent of one step.

The gradient that the optimizer uses is w times the sum of the ranks' gradients, and the backward vectors b_m of rank m
are those of its own loss. In sums over all ranks, so that angle, speed and residual are those of the global batch:

    <b, df> = sum of w <b_m, df_m>      |b|^2 = sum of w^2 |b_m|^2      |df|^2, |f|^2, counts: plain sums

Ranks that hold the same numbers count once. For parameters the mesh says which ranks do: each kind of parameters has a
number of shards, and one rank per shard is taken. For features it follows from the numbers: of ranks that work on one
batch together (tensor parallel), those whose sums agree hold replicas, and the others hold parts of the features.

Source: section 2 of "The Feature Speed Formula", arXiv 2311.18718; the sum over ranks is that of its dot products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastfs._record import decrease_reasons, row_reasons
from fastfs._record.ranks.part import SPREAD, Array, RankPart
from fastfs._stats import FeatureStats

__all__ = [
    "MergedParameters",
    "MergedRows",
    "batches",
    "merge_norms",
    "merge_parameters",
    "merge_rows",
    "weights_of",
]

_SAME = 1e-9  # relative difference up to which two ranks report the same sums
_NAMES = FeatureStats.names
_DOT, _ABS, _UPDATE, _BACKWARD, _BEFORE, _COUNT = (
    _NAMES.index(name)
    for name in (
        "update_dot_backward",
        "abs_update_dot_backward",
        "update_sq",
        "backward_sq",
        "before_sq",
        "count",
    )
)
_TOTALS = (_DOT, _UPDATE, _BACKWARD)
# Nothing is wrong with such rows: the rank has nothing to add, or its samples do not reach the loss.
_EMPTY = (row_reasons.NO_BACKWARD, row_reasons.NO_UPDATE, row_reasons.NOT_RUN)


@dataclass
class MergedParameters:
    """Sums over the parameters upstream of L layers, and over those between layers.

    Attributes:
        decrease: D in units of the loss, NaN where it is not known, (L,).
        variance: Of D by sampling, (L,); None if every rank has read everything.
        norms: |w|, |dw| and |g|, (L, 3).
        dots: <g, dw> and <w, dw>, w after the step, NaN where they are not known, (L, 2).
        casts: Sums of the casts, see ``cast_losses``, NaN where they are not known, (L, 9 for each).
        reason: Why D is not known: codes of :mod:`fastfs._record.decrease_reasons`, (L,).
        total: In a pipeline, D over all parameters of the stage.
    """

    decrease: Array
    variance: Array | None
    norms: Array
    dots: Array
    casts: Array
    reason: Any
    total: float


@dataclass
class MergedRows:
    """Sums over the rows of L layers.

    Attributes:
        sums: (L, 9), as in ``FeatureStats.names``.
        spread: Covariances of <b, df>, |df|^2, |b|^2 by the choice of rows, relative to these, (L, 6).
        rows: Numbers of kept and of all rows, (L, 2).
        margin: How many standard errors <b, df> may be off, at most, (L,).
        reason: Why a row is not valid: codes of :mod:`fastfs._record.row_reasons`, (L,).
        by_batch: Sums of every batch alone, without weights, (B, L, 9).
        first: The first rank of every batch.
    """

    sums: Array
    spread: Array
    rows: Any
    margin: Array
    reason: Any
    by_batch: Array
    first: list[int] = field(default_factory=list)


def batches(parts: Sequence[RankPart], known: Mapping[int, int]) -> list[list[RankPart]]:
    """Returns the parts of the ranks that work on one batch together. Batches of which a rank is missing are left out.

    Peers are the ranks of a mesh over which parameters are sharded. Those that were given the same inputs share a batch
    (tensor parallel), and the others have batches of their own (experts).

    Args:
        parts: Of one step.
        known: For a step whose parts do not tell the inputs: for each rank the first one of its batch, from a step
            whose parts did.
    """
    by_rank = {part.place.rank: part for part in parts}
    found: list[list[RankPart]] = []
    taken: set[int] = set()
    for part in parts:
        if part.place.rank in taken:
            continue
        present = [by_rank[rank] for rank in part.place.peers if rank in by_rank]
        shared = [other for other in present if _same_batch(part, other, known)]
        taken.update(other.place.rank for other in shared)
        if len(present) == len(part.place.peers):
            found.append(shared)
    return found


def _same_batch(a: RankPart, b: RankPart, known: Mapping[int, int]) -> bool:
    first, second = a.arrays.get("inputs"), b.arrays.get("inputs")
    if first is None or second is None:
        own = a.place.peers[0]
        return known.get(a.place.rank, own) == known.get(b.place.rank, own)
    return first.shape == second.shape and bool(np.array_equal(first, second, equal_nan=True))


def merge_rows(found: Sequence[Sequence[RankPart]], weights: Sequence[float]) -> MergedRows:
    """Returns the sums over the rows of all batches.

    Args:
        found: From :func:`batches`, at least one.
        weights: w of each.
    """
    each = [_one_batch(peers) for peers in found]
    by_batch = np.stack([sums for sums, *_ in each])
    weighted = by_batch.copy()
    for own, weight in zip(weighted, weights, strict=True):
        own[:, [_DOT, _ABS]] *= weight
        own[:, _BACKWARD] *= weight**2
    sums = weighted.sum(axis=0)
    covariances = np.sum([s * _products(own) for own, (_, s, *_) in zip(weighted, each, strict=True)], axis=0)
    rows = np.sum([rows for _, _, rows, _ in each], axis=0)
    reasons = [reason for *_, reason in each]
    margin = np.max([part.facts["margin"] for peers in found for part in peers], axis=0)
    first = [peers[0].place.rank for peers in found]
    return MergedRows(sums, _divided(covariances, sums), rows, margin, _worst(reasons), by_batch, first)


def _one_batch(peers: Sequence[RankPart]) -> tuple[Array, Array, Any, Any]:
    """Returns sums, relative covariances, rows, and reasons of the ranks that share a batch."""
    sums = np.stack([part.arrays["sums"] for part in peers])
    spread = np.stack([part.arrays["spread"] for part in peers])
    rows = np.stack([np.asarray(part.facts["rows"], dtype=np.int64).reshape(-1, 2) for part in peers])
    reasons = [part.arrays["reason"].astype(np.int64) for part in peers]
    if len(peers) == 1:
        return sums[0], spread[0], rows[0], reasons[0]
    replicas = _same(sums, (_DOT, _UPDATE, _BACKWARD, _BEFORE, _COUNT))
    placed = [_declared(peers, layer) for layer in range(sums.shape[1])]
    differ = np.array([want == "replicate" for want in placed]) & ~replicas
    columns = np.array([want == "columns" for want in placed])
    apart = columns | np.array([want == "rows" for want in placed])
    once = (replicas & ~apart)[:, None]
    # The same features with other gradients: each rank has a summand of the backward vector.
    summands = _same(sums, (_UPDATE, _BEFORE, _COUNT)) & ~replicas & ~apart & (sums[0, :, _BEFORE] > 0)
    total = np.where(once, sums[0], sums.sum(axis=0))
    # Parts of the same rows are not independent: at most, their standard errors add up.
    parts = np.sqrt(np.abs(spread) * np.abs(np.stack([_products(each) for each in sums])))
    joint = np.where(once, spread[0], _divided(parts.sum(axis=0) ** 2 * np.sign(spread[0]), total))
    counted = np.where(once | columns[:, None], rows[0], rows.sum(axis=0))
    reason = _worst(reasons)
    uneven = (rows != rows[0]).any(axis=(0, 2)) & (rows[:, :, 0] < rows[:, :, 1]).any(axis=0)
    reason = np.where((reason == 0) & uneven & ~once[:, 0], row_reasons.OTHER_ROWS, reason)
    reason = np.where((reason == 0) & summands, row_reasons.PARTIAL, reason)
    return total, joint, counted, np.where((reason == 0) & differ, row_reasons.RANKS_DIFFER, reason)


def _declared(peers: Sequence[RankPart], layer: int) -> str | None:
    """Returns how the features of a layer are placed, where DTensors say so."""
    found = {(part.facts.get("placed") or {}).get(str(layer)) for part in peers}
    return found.pop() if len(found) == 1 else None


def _same(sums: Array, columns: Sequence[int]) -> Any:
    """Returns for each layer whether all ranks report the same sums, (L,): (R, L, 9)."""
    compared, scale = sums[:, :, columns], np.abs(sums).max(axis=0)
    scale[:, _DOT] = np.sqrt(scale[:, _UPDATE] * scale[:, _BACKWARD])  # a dot product may cancel
    same = np.abs(compared - compared[0]) <= _SAME * scale[:, columns]
    return (same | np.isnan(compared) & np.isnan(compared[0])).all(axis=(0, 2))


def merge_parameters(parts: Sequence[RankPart]) -> MergedParameters:
    """Returns the sums over the parameters of all ranks. A shard that no rank has sent makes D unknown."""
    arrays = [part.arrays for part in parts]
    layers = arrays[0]["aligned"].shape[1]
    keys = list(dict.fromkeys(share.key for part in parts for share in part.place.shares))
    alike = len({each["casts"].shape[2:] if "casts" in each else () for each in arrays}) == 1
    sums = np.zeros(_own(parts[0], 0, alike).shape)
    sampled = any("variance" in each for each in arrays)
    variance = np.zeros(layers)
    reason, missing = np.zeros(layers, dtype=np.int64), decrease_reasons.MISSING_RANKS
    total = 0.0
    for key in keys:
        held: dict[int, list[tuple[int, RankPart]]] = {}
        shards = 1
        for part in parts:
            for number, share in enumerate(part.place.shares):
                if share.key == key:
                    held.setdefault(share.shard, []).append((number, part))
                    shards = share.shards
        if len(held) < shards:
            reason = np.where(reason == 0, missing, reason)
        for copies in held.values():
            number, part = copies[0]
            own, codes = _own(part, number, alike), part.arrays["decrease_reason"].astype(np.int64)
            for other, replica in copies[1:]:
                theirs = _own(replica, other, alike)
                differ = _differ(own[:, :4], theirs[:, :4], part, replica)
                reason = np.where(differ & (reason != missing), decrease_reasons.RANKS_DIFFER, reason)
                unknown = np.isnan(own[:, 0]) & ~np.isnan(theirs[:, 0])  # a layer that only some ranks have
                own = np.where(unknown[:, None], theirs, own)
            whole = part.place.shares[number].summands  # all of which have the whole w and dw
            sums += own / [1.0, *[whole] * 3, 1.0, *[whole] * (own.shape[1] - 5)]
            if "variance" in part.arrays:
                variance += part.arrays["variance"][number]
            total += float(part.arrays["total"][number]) if "total" in part.arrays else 0.0
            reason = np.where((reason == 0) & np.isnan(own[:, 0]), codes, reason)
    decrease = np.where(reason == 0, sums[:, 0], np.nan)
    complete = not (reason == missing).any()
    rest = np.where(reason[:, None] == missing, np.nan, sums[:, 4:])
    return MergedParameters(
        decrease=decrease,
        variance=variance if sampled else None,
        norms=np.sqrt(sums[:, 1:4]),
        dots=rest[:, :2],
        casts=rest[:, 2:],
        reason=reason,
        total=total if complete else np.nan,
    )


def _own(part: RankPart, kind: int, casts: bool) -> Array:
    """Returns the sums over a kind of parameters: decrease, |w|^2, |dw|^2, |g|^2, <g, dw>, <w, dw>, casts, (L, K)."""
    sums = part.arrays["aligned"][kind]
    dots = part.arrays["dots"][kind] if "dots" in part.arrays else np.full((len(sums), 2), np.nan)
    more = [part.arrays["casts"][kind]] if casts and "casts" in part.arrays else []
    return np.concatenate([sums, dots, *more], axis=1)


def merge_norms(found: Sequence[Sequence[RankPart]], weights: Sequence[float]) -> tuple[Array, Array]:
    """Returns norms and numbers of elements of the backward vectors of all batches, (L,) each.

    Args:
        found: From :func:`batches`, at least one.
        weights: w of each.
    """
    squares: Any = 0.0
    counts: Any = 0.0
    for peers, weight in zip(found, weights, strict=True):
        norms = np.stack([part.arrays["backward_norm"] for part in peers])
        sizes = np.stack([np.asarray(part.facts["counts"], dtype=np.float64) for part in peers])
        norms = np.where(sizes == 0, 0.0, norms)  # the layer did not run here, or only some ranks have it
        same = (np.abs(norms - norms[0]) <= _SAME * norms[0]).all(axis=0) & (sizes == sizes[0]).all(axis=0)
        squares = squares + weight**2 * np.where(same, norms[0] ** 2, (norms**2).sum(axis=0))
        counts = counts + np.where(same, sizes[0], sizes.sum(axis=0))
    return np.sqrt(np.where(counts > 0, squares, np.nan)), counts


def weights_of(found: Sequence[Sequence[RankPart]], missing: int) -> list[float]:
    """Returns w of every batch: as its ranks say, or one by the number of batches.

    Args:
        found: From :func:`batches`, at least one.
        missing: Number of ranks that have sent nothing.
    """
    shared = max(map(len, found))
    every = len(found) + -(-missing // shared)
    return [1.0 / every if peers[0].place.weight is None else peers[0].place.weight for peers in found]


def _differ(own: Array, theirs: Array, a: RankPart, b: RankPart) -> Any:
    """Returns for each layer whether two ranks report different sums over the same parameters, (L,).

    Sums over a sample of the elements are not compared. Where the decrease is not known, |w| and |dw| of any layer tell
    the models apart.

    Args:
        own: Decrease, |w|^2, |dw|^2 and |g|^2 of one rank, (L, 4).
        theirs: Those of the other.
        a: The part of the one rank.
        b: The part of the other.
    """
    if "variance" in a.arrays or "variance" in b.arrays:
        return np.zeros(len(own), dtype=bool)
    scale = np.maximum(np.abs(own), np.abs(theirs))
    scale[:, 0] = np.sqrt(scale[:, 2] * scale[:, 3]) + scale[:, 0]  # |<g, dw>| <= |g| |dw|, and may cancel
    # Each rank has divided D and |g|^2 by the factor of the gradients as its own samples tell it, up to their rounding.
    ratio = _ratio(b.scalars.get("gradient_factor", 1.0), a.scalars.get("gradient_factor", 1.0))
    given = theirs * [ratio, 1.0, 1.0, ratio**2]
    apart = (np.abs(own - theirs) > _SAME * scale) & (np.abs(own - given) > _SAME * scale)
    codes, others = a.arrays["decrease_reason"], b.arrays["decrease_reason"]
    hidden = np.isin(codes, (decrease_reasons.STRUCTURE, decrease_reasons.NOTHING))  # which parameters are a layer's
    moved = (apart[:, 1:3].any(axis=1) & ~hidden & (codes == others)).any()
    return (codes == others) & np.where(codes == 0, apart.any(axis=1), moved & ~hidden)


def _ratio(a: float, b: float) -> float:
    """Returns the quotient of two factors, 1 if one of them is not known."""
    return a / b if np.isfinite(a) and np.isfinite(b) and a * b > 0 else 1.0


def _products(sums: Array) -> Array:
    """Returns the products of totals by which relative covariances are multiplied: (L, 9) -> (L, 6)."""
    totals = sums[:, _TOTALS]
    return np.stack([totals[:, i] * totals[:, j] for i, j in SPREAD], axis=1)


def _divided(covariances: Array, sums: Array) -> Array:
    """Returns covariances relative to the totals; 0 where there is none."""
    return np.where(covariances == 0, 0.0, covariances / _products(sums))


def _worst(reasons: Sequence[Any]) -> Any:
    """Returns the reason of each layer: that of any rank, except of one that has nothing to add where another has."""
    codes = np.stack(reasons)
    empty = np.isin(codes, _EMPTY)
    serious = np.where(empty, 0, codes).max(axis=0)
    idle = np.where(empty.all(axis=0), codes[0], 0)
    return np.where(serious > 0, serious, idle)
