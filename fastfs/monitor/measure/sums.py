"""Kept rows in, sums per layer out: pure, and without waiting for the device.

Sums are estimates for all rows from those that were kept, each with its standard error (the linearised error of a ratio
of totals, rows drawn without replacement). Where all rows were kept the sums are exact and the errors zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastfs.functional import feature_stats, first_order_stats
from fastfs.stats import FeatureStats

__all__ = ["LayerSums", "RowSums", "Rows", "Triple", "from_direction", "from_replay", "totals"]

_NAMES = FeatureStats.names
DOT, UPDATE, BACKWARD = (_NAMES.index(n) for n in ("update_dot_backward", "update_sq", "backward_sq"))
NONFINITE = _NAMES.index("nonfinite")


@dataclass(frozen=True)
class Triple:
    """One visit of a layer: kept rows (k, width) of features before, what came after, and the backward vector."""

    before: Tensor
    after: Tensor
    backward: Tensor
    total: int  # rows that there were


@dataclass(frozen=True)
class Rows:
    """Sums of the kept rows of one visit: float64 (k, 9), k of ``total`` rows."""

    sums: Tensor
    total: int

    @property
    def kept(self) -> int:
        return self.sums.shape[0]


RowSums = Sequence[Sequence[Rows]]
"""Per layer, its visits."""


@dataclass(frozen=True)
class LayerSums:
    """Sums of L layers, with their standard errors.

    Attributes:
        stats: shape (L,).
        angle_se: standard error of the angle in radians, float64 (L,).
        update_se: relative standard error of the norm of df, float64 (L,).
        dot_se: relative standard error of <b, df>, float64 (L,).
        rows: rows kept of each layer, and how many there were.
        quantiles: float64 (L, 2, Q): of the rows' cosines, and of their speeds (rms of a row's df).
    """

    stats: FeatureStats
    angle_se: Tensor
    update_se: Tensor
    dot_se: Tensor
    rows: list[tuple[int, int]]
    quantiles: Tensor

    def in_place_of(self, other: LayerSums, factor: Tensor) -> LayerSums:
        """The sums of another look at the same rows, with the errors and quantiles of this one.

        Args:
            other: where the sums are from.
            factor: between the speeds of this look and of the other; relative errors and cosines need none.
        """
        quantiles = torch.stack([self.quantiles[:, 0], self.quantiles[:, 1] * factor], dim=1)
        return replace(self, stats=other.stats, quantiles=quantiles)


def from_replay(layers: Sequence[Sequence[Triple]]) -> RowSums:
    """Sums of every row, with df = after - before: one call for all layers and visits."""
    return _per_visit(layers, lambda flat: _rows([t.before for t in flat], [t.after for t in flat], flat))


def from_direction(layers: Sequence[Sequence[Triple]]) -> RowSums:
    """The same where ``after`` holds df itself: nothing is subtracted, so there is no rounding noise."""

    def sums(flat: Sequence[Triple]) -> list[Tensor]:
        before, changes, backward = ([getattr(t, name) for t in flat] for name in ("before", "after", "backward"))
        return [stats.sums for stats in first_order_stats(before, changes, backward, per_row=True)]

    return _per_visit(layers, sums)


def _rows(before: list[Tensor], after: list[Tensor], flat: Sequence[Triple]) -> list[Tensor]:
    return [stats.sums for stats in feature_stats(before, after, [t.backward for t in flat], per_row=True)]


def _per_visit(layers: Sequence[Sequence[Triple]], sums: Callable[[Sequence[Triple]], list[Tensor]]) -> RowSums:
    flat = [visit for visits in layers for visit in visits]
    found = iter(zip(sums(flat) if flat else [], flat, strict=True))
    return [[Rows(*_next(found)) for _ in visits] for visits in layers]


def _next(found: Any) -> tuple[Tensor, int]:
    sums, triple = next(found)
    return sums, triple.total


def totals(passes: Sequence[RowSums], quantiles: Sequence[float], device: torch.device) -> LayerSums:
    """Everything of a step: the passes' rows are strata of one sample.

    Args:
        passes: of each micro-batch, per layer its visits.
        quantiles: which quantiles of the rows to take; none for none.
        device: of the result, where a layer has no visit.
    """
    layers = [[rows for layer in strata for rows in layer] for strata in zip(*passes, strict=True)]
    zero = torch.zeros(len(_NAMES), dtype=torch.float64, device=device)
    sums = torch.stack([_add([_estimate(rows) for rows in visits], zero) for visits in layers])
    cosine_se, update_se, dot_se = _standard_errors(layers, sums)
    stats = FeatureStats(sums)
    cosine = stats.cos_angle
    sine = (1.0 - cosine.square()).clamp_min(0.0).sqrt()
    return LayerSums(
        stats=stats,
        angle_se=cosine_se * cosine.abs() / sine,
        update_se=update_se,
        dot_se=dot_se,
        rows=[(sum(r.kept for r in visits), sum(r.total for r in visits)) for visits in layers],
        quantiles=_quantiles(layers, quantiles, device),
    )


def _add(parts: list[Tensor], zero: Tensor) -> Tensor:
    total = zero
    for part in parts:
        total = total + part
    return total


def _estimate(rows: Rows) -> Tensor:
    """(9,) for all rows. Non-finite entries are counted, not estimated."""
    sums = rows.sums.sum(dim=0)
    if rows.kept == rows.total:
        return sums
    scale = torch.full_like(sums, rows.total / rows.kept)
    scale[NONFINITE] = 1.0
    return sums * scale


def _standard_errors(layers: Sequence[Sequence[Rows]], sums: Tensor) -> list[Tensor]:
    """Relative standard errors of the cosine, of |df| and of <b, df>, float64 (L,) each."""
    if all(rows.kept == rows.total for visits in layers for rows in visits):
        return [torch.zeros_like(sums[:, 0])] * 3
    # Rows: d log cos, d log |df|, d log <b, df>, by the sums that they come from.
    halves = torch.zeros((3, len(_NAMES)), dtype=torch.float64, device=sums.device)
    halves[0, DOT], halves[0, UPDATE], halves[0, BACKWARD] = 1.0, -0.5, -0.5
    halves[1, UPDATE] = 0.5
    halves[2, DOT] = 1.0
    variances = []
    for index, visits in enumerate(layers):
        weights = (halves / sums[index]).T  # what a row adds to each, (9, 3)
        weights = torch.where(weights.isfinite(), weights, 0.0)
        variance = torch.zeros(3, dtype=torch.float64, device=sums.device)
        for rows in visits:
            if 1 < rows.kept < rows.total:
                factor = (rows.total / rows.kept) ** 2 * rows.kept * (1.0 - rows.kept / rows.total)
                variance = variance + factor * (rows.sums @ weights).var(dim=0)
            elif rows.kept < rows.total:
                variance = variance + torch.nan  # one row tells no error
        variances.append(variance)
    return list(torch.stack(variances).sqrt().unbind(dim=1))


def _quantiles(layers: Sequence[Sequence[Rows]], wanted: Sequence[float], device: torch.device) -> Tensor:
    if not wanted:
        return torch.empty((len(layers), 2, 0), dtype=torch.float64, device=device)
    at = torch.tensor(list(wanted), dtype=torch.float64).to(device, non_blocking=True)
    result = []
    for visits in layers:
        if not visits:
            result.append(torch.full((2, len(wanted)), torch.nan, dtype=torch.float64, device=device))
            continue
        rows = FeatureStats(torch.cat([r.sums for r in visits]))
        result.append(torch.stack([torch.nanquantile(rows.cos_angle, at), torch.nanquantile(rows.update_rms, at)]))
    return torch.stack(result)
