"""Sums per layer from kept rows, without waiting for the device.

Sums are estimates for all rows from those that were kept, each with its standard error (the linearised error of a ratio
of totals, with rows drawn without replacement). If all rows were kept, the sums are exact and the errors zero.

Rows of all layers are one matrix, so that the number of operations does not grow with the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfs._functional import feature_stats
from fastfs._monitor.measure.segment_sums import SegmentSums, on_device
from fastfs._stats import FeatureStats

__all__ = ["LayerSums", "RowSums", "Triple", "from_direction", "from_replay", "totals"]

_NAMES = FeatureStats.names
DOT, UPDATE, BACKWARD = (_NAMES.index(n) for n in ("update_dot_backward", "update_sq", "backward_sq"))
BEFORE, RADIAL, ROUNDING = (_NAMES.index(n) for n in ("before_sq", "before_dot_update", "rounding_sq"))
NONFINITE = _NAMES.index("nonfinite")
_SORTED = 1 << 24  # torch.nanquantile takes no more numbers

_Ints = npt.NDArray[np.int64]


class Triple(NamedTuple):
    """The kept rows (k, width) of one visit of a layer.

    Attributes:
        before, after, backward: Features before and after the step, and the backward vector.
        total: Number of rows that there were.
    """

    before: Tensor
    after: Tensor
    backward: Tensor
    total: int


@dataclass(frozen=True)
class RowSums:
    """Sums of each kept row, for all visits of L layers one after the other.

    Attributes:
        sums: float64 (N, 9), or None without any visit.
        layer: Index of each visit's layer, ascending.
        kept: Number of kept rows of each visit.
        total: Number of rows of each visit.
        layers: L.
    """

    sums: Tensor | None
    layer: list[int]
    kept: list[int]
    total: list[int]
    layers: int


@dataclass(frozen=True)
class LayerSums:
    """Sums of L layers, with their standard errors.

    Attributes:
        stats: FeatureStats of shape (L,).
        angle_se: Standard error of the angle in radians, float64 (L,).
        update_se: Relative standard error of the norm of df, float64 (L,).
        dot_se: Relative standard error of <b, df>, float64 (L,).
        rows: Numbers of kept rows and of all rows of each layer.
        visits: Number of visits of each layer, in all passes.
        quantiles: Quantiles of the rows' cosines, and of their speeds (rms of a row's df), float64 (L, 2, Q).
    """

    stats: FeatureStats
    angle_se: Tensor
    update_se: Tensor
    dot_se: Tensor
    rows: list[tuple[int, int]]
    visits: list[int]
    quantiles: Tensor

    def one_visit(self) -> tuple[Tensor, Tensor]:
        """Returns the average number of kept rows of a visit, and their width: float64 (L,) each."""
        kept, total = np.asarray(self.rows, dtype=np.float64).reshape(-1, 2).T
        rows = on_device(kept / np.maximum(self.visits, 1), self.stats.device)
        return rows, self.stats.count / on_device(np.maximum(total, 1.0), self.stats.device)

    def in_place_of(self, other: LayerSums, factor: Tensor) -> LayerSums:
        """Returns the sums of another measurement of the same rows, with the errors and quantiles of this one.

        Args:
            other: The other measurement.
            factor: Between the speeds of this one and of the other; relative errors and cosines need none.
        """
        quantiles = torch.stack([self.quantiles[:, 0], self.quantiles[:, 1] * factor], dim=1)
        return replace(self, stats=other.stats, quantiles=quantiles)


def from_replay(layers: Sequence[Sequence[Triple]]) -> RowSums:
    """Returns the sums of every row, with df = after - before, by one call for all layers and visits."""
    flat = [visit for visits in layers for visit in visits]
    before, after, backward = _columns(flat)
    return _of_visits(layers, flat, _per_row(before, after, backward) if flat else None)


def from_direction(layers: Sequence[Sequence[Triple]]) -> RowSums:
    """Returns the same if ``after`` is df itself: nothing is subtracted, so there is no rounding noise."""
    flat = [visit for visits in layers for visit in visits]
    if not flat:
        return _of_visits(layers, flat, None)
    before, changes, backward = _columns(flat)
    zeros = [torch.zeros_like(change) for change in changes]
    sums = _per_row(zeros, changes, backward)
    # <f, df> and |f|^2, for which the call above was given zeros.
    same = [f.to(change.dtype) for f, change in zip(before, changes, strict=True)]
    radial = _per_row(zeros, same, changes)
    sums.select(1, BEFORE).copy_(radial.select(1, UPDATE))
    sums.select(1, RADIAL).copy_(radial.select(1, DOT))
    sums.select(1, ROUNDING).zero_()
    return _of_visits(layers, flat, sums)


def _columns(flat: Sequence[Triple]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return [t.before for t in flat], [t.after for t in flat], [t.backward for t in flat]


def _per_row(before: list[Tensor], after: list[Tensor], backward: list[Tensor]) -> Tensor:
    return torch.cat([stats.sums for stats in feature_stats(before, after, backward, per_row=True)])


def _of_visits(layers: Sequence[Sequence[Triple]], flat: Sequence[Triple], sums: Tensor | None) -> RowSums:
    return RowSums(
        sums=sums,
        layer=[layer for layer, visits in enumerate(layers) for _ in visits],
        kept=[visit.before.shape[0] for visit in flat],
        total=[visit.total for visit in flat],
        layers=len(layers),
    )


def totals(passes: Sequence[RowSums], quantiles: Sequence[float], device: torch.device) -> LayerSums:
    """Returns the sums of a step. The rows of its passes are strata of one sample.

    Args:
        passes: Row sums of each micro-batch.
        quantiles: Which quantiles of the rows to compute.
        device: Of the result, if there is no visit at all.
    """
    count = passes[0].layers
    layer, kept, total = (
        np.asarray([number for each in passes for number in getattr(each, name)], dtype=np.int64)
        for name in ("layer", "kept", "total")
    )
    rows = tuple(np.bincount(layer, weights=each, minlength=count).astype(np.int64).tolist() for each in (kept, total))
    parts = [each.sums for each in passes if each.sums is not None]
    if parts:
        sample = _Sample(torch.cat(parts) if len(parts) > 1 else parts[0], layer, kept, total, count)
        sums = sample.totals()
        errors = sample.standard_errors(sums)
        found = sample.quantiles(quantiles)
    else:
        sums = torch.zeros((count, len(_NAMES)), dtype=torch.float64, device=device)
        errors = torch.zeros((count, 3), dtype=torch.float64, device=device)
        found = torch.full((count, 2, len(quantiles)), torch.nan, dtype=torch.float64, device=device)
    stats = FeatureStats(sums)
    cosine_se, update_se, dot_se = errors.unbind(dim=1)
    cosine = stats.cos_angle
    sine = (1.0 - cosine.square()).clamp_min(0.0).sqrt()
    return LayerSums(
        stats=stats,
        angle_se=cosine_se * cosine.abs() / sine,
        update_se=update_se,
        dot_se=dot_se,
        rows=list(zip(*rows, strict=True)),
        visits=np.bincount(layer, minlength=count).tolist(),
        quantiles=found,
    )


class _Sample:
    """The rows of all visits.

    Args:
        rows: float64 (N, 9).
        layer, kept, total: Layer, number of kept rows and number of all rows of each visit, (V,).
        layers: Number of layers.
    """

    def __init__(self, rows: Tensor, layer: _Ints, kept: _Ints, total: _Ints, layers: int) -> None:
        self.rows = rows
        self.device = rows.device
        self._layer, self._kept, self._total, self._layers = layer, kept, total, layers
        self._per_visit = SegmentSums(kept, self.device)
        order = np.argsort(layer, kind="stable")
        in_order = np.array_equal(order, np.arange(len(order)))
        visits = np.bincount(layer, minlength=layers)
        self._per_layer = SegmentSums(visits, self.device, None if in_order else order)

    def totals(self) -> Tensor:
        """Returns estimates for all rows, (L, 9). Non-finite entries are counted, not estimated."""
        sums = self._per_visit(self.rows)
        if (self._kept < self._total).any():
            scale = np.repeat((self._total / np.maximum(self._kept, 1))[:, None], len(_NAMES), axis=1)
            scale[self._kept == self._total] = 1.0
            scale[:, NONFINITE] = 1.0
            sums = sums * on_device(scale, self.device)
        return self._per_layer(sums)

    def standard_errors(self, sums: Tensor) -> Tensor:
        """Returns relative standard errors of the cosine, of |df| and of <b, df>: float64 (L, 3)."""
        sampled = self._kept < self._total
        if not sampled.any():
            return torch.zeros_like(sums[:, :3])
        inverse = torch.stack([1.0 / sums[:, column] for column in (DOT, UPDATE, BACKWARD)], dim=1)
        inverse = torch.where(inverse.isfinite(), inverse, 0.0)
        of_row = on_device(np.repeat(self._layer, self._kept), self.device)
        dot, update, backward = (
            self.rows[:, column] * inverse[:, index][of_row] for index, column in enumerate((DOT, UPDATE, BACKWARD))
        )
        # The contributions of a row to log cos, log |df| and log <b, df>.
        adds = torch.stack([dot - 0.5 * update - 0.5 * backward, 0.5 * update, dot], dim=1)
        kept = np.maximum(self._kept, 1)
        mean = self._per_visit(adds) / on_device(kept[:, None].astype(np.float64), self.device)
        visit = on_device(np.repeat(np.arange(len(kept)), self._kept), self.device)
        squares = self._per_visit((adds - mean[visit]).square())
        ratio = self._total / kept
        factor = ratio**2 * kept * (1.0 - 1.0 / np.maximum(ratio, 1.0)) / np.maximum(kept - 1, 1)
        factor[kept == 1] = np.nan  # of one row the error is not known
        unknown = torch.where(on_device(sampled[:, None], self.device), squares, 0.0)  # also if they are not finite
        factor[~sampled] = 0.0
        return self._per_layer(unknown * on_device(factor[:, None], self.device)).sqrt()

    def quantiles(self, wanted: Sequence[float]) -> Tensor:
        """Returns quantiles of the rows' cosines and speeds, (L, 2, Q)."""
        result = torch.full((self._layers, 2, len(wanted)), torch.nan, dtype=torch.float64, device=self.device)
        if not wanted:
            return result
        at = on_device(np.asarray(list(wanted), dtype=np.float64), self.device)
        of_rows = FeatureStats(self.rows)
        values = torch.stack([of_rows.cos_angle, of_rows.update_rms])
        values = torch.nn.functional.pad(values, (1, 0), value=torch.nan)
        owner = np.repeat(self._layer, self._kept)
        order = np.argsort(owner, kind="stable")
        lengths = np.bincount(owner, minlength=self._layers)
        starts = np.cumsum(lengths) - lengths
        # Layers with similar numbers of rows are sorted together.
        sizes = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
        for size in np.unique(sizes[lengths > 0]).tolist():
            every = np.flatnonzero((sizes == size) & (lengths > 0))
            width = int(lengths[every].max())
            together = max(_SORTED // width, 1)
            for group in (every[first : first + together] for first in range(0, len(every), together)):
                place = np.arange(width)[None, :]
                row = order[np.minimum(starts[group][:, None] + place, len(order) - 1)]
                table = on_device(np.where(place < lengths[group][:, None], row + 1, 0), self.device)
                found = [torch.nanquantile(each[table], at, dim=1) for each in values]
                result.index_copy_(0, on_device(group, self.device), torch.stack(found).permute(2, 0, 1))
        return result
