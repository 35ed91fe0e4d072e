"""Sums per layer from kept rows, without waiting for the device.

Sums are estimates for all rows from those that were kept, each with its standard error: the linearised error of a ratio
of totals, with rows drawn without replacement, or in two stages, samples of the batch and then rows of each of them
(Cochran, Sampling Techniques, section 10.3). If all rows were kept, the sums are exact and the errors zero.

Rows of all layers are one matrix, so that the number of operations does not grow with the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfs._functional import feature_stats
from fastfs._monitor.capture.sampling import RowChoice
from fastfs._monitor.measure.segment_sums import SegmentSums, on_device
from fastfs._record.ranks.part import SPREAD
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
        choice: Which rows they are.
    """

    before: Tensor
    after: Tensor
    backward: Tensor
    choice: RowChoice


@dataclass(frozen=True)
class RowSums:
    """Sums of each kept row, for all visits of L layers one after the other.

    Attributes:
        sums: float64 (N, 9), or None without any visit.
        layer: Index of each visit's layer, ascending.
        choices: Which rows of each visit were kept.
        layers: L.
    """

    sums: Tensor | None
    layer: list[int]
    choices: list[RowChoice]
    layers: int


@dataclass(frozen=True)
class LayerSums:
    """Sums of L layers, with their standard errors.

    Attributes:
        stats: FeatureStats of shape (L,).
        spread: Covariances of the estimates of <b, df>, |df|^2 and |b|^2 that come from the sample of rows, each
            divided by the two estimates, float64 (L, 6) in the order of `SPREAD`. Those of strata add, times the
            estimates, and they do not change if all rows are scaled.
        margin: How many standard errors <b, df> may be off by the choice of rows: two; with ``samples=`` the bound of
            Student's t that is exceeded as often as three sigma. One number per layer, on the host.
        rows: Numbers of kept rows and of all rows of each layer.
        visits: Number of visits of each layer, in all passes.
        quantiles: Quantiles of the rows' cosines, and of their speeds (rms of a row's df), float64 (L, 2, Q).
    """

    stats: FeatureStats
    spread: Tensor
    margin: list[float]
    rows: list[tuple[int, int]]
    visits: list[int]
    quantiles: Tensor

    @property
    def dot_margin(self) -> Tensor:
        """How far <b, df> may be off by the choice of rows, relative: float64 (L,)."""
        return self.spread[:, 0].clamp_min(0.0).sqrt() * on_device(np.asarray(self.margin), self.stats.device)

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
        choices=[visit.choice for visit in flat],
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
    layer = np.asarray([number for each in passes for number in each.layer], dtype=np.int64)
    choices = [choice for each in passes for choice in each.choices]
    kept, total = np.asarray([(choice.kept, choice.total) for choice in choices], dtype=np.int64).reshape(-1, 2).T
    rows = tuple(np.bincount(layer, weights=each, minlength=count).astype(np.int64).tolist() for each in (kept, total))
    parts = [each.sums for each in passes if each.sums is not None]
    if parts:
        sample = _Sample(torch.cat(parts) if len(parts) > 1 else parts[0], layer, choices, count)
        sums = sample.totals()
        spread = sample.spread(sums)
        found = sample.quantiles(quantiles)
        margin = sample.margin_factors()
    else:
        sums = torch.zeros((count, len(_NAMES)), dtype=torch.float64, device=device)
        spread = torch.zeros((count, len(SPREAD)), dtype=torch.float64, device=device)
        found = torch.full((count, 2, len(quantiles)), torch.nan, dtype=torch.float64, device=device)
        margin = [2.0] * count
    return LayerSums(
        stats=FeatureStats(sums),
        spread=spread,
        margin=margin,
        rows=list(zip(*rows, strict=True)),
        visits=np.bincount(layer, minlength=count).tolist(),
        quantiles=found,
    )


class _Sample:
    """The rows of all visits.

    Args:
        rows: float64 (N, 9).
        layer: Layer of each visit, (V,).
        choices: Which rows of each visit were kept.
        layers: Number of layers.
    """

    def __init__(self, rows: Tensor, layer: _Ints, choices: Sequence[RowChoice], layers: int) -> None:
        self.rows = rows
        self.device = rows.device
        self._layer, self._layers = layer, layers
        # The units of the first stage are samples; where there is one stage only, each row is a unit of its own.
        numbers = [(c.kept, c.total, *(c.samples or (c.kept, c.total))) for c in choices]
        self._kept, self._total, self._kept_units, self._units = np.asarray(numbers, dtype=np.int64).T
        self._of_samples = np.asarray([choice.samples is not None for choice in choices])
        self._per_visit = SegmentSums(self._kept, self.device)
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

    def spread(self, sums: Tensor) -> Tensor:
        """Returns :attr:`LayerSums.spread`."""
        sampled = self._kept < self._total
        if not sampled.any():
            return sums.new_zeros((sums.shape[0], len(SPREAD)))
        inverse = torch.stack([1.0 / sums[:, column] for column in (DOT, UPDATE, BACKWARD)], dim=1)
        inverse = torch.where(inverse.isfinite(), inverse, 0.0)
        of_row = on_device(np.repeat(self._layer, self._kept), self.device)
        columns = [self.rows[:, column] * inverse[:, i][of_row] for i, column in enumerate((DOT, UPDATE, BACKWARD))]
        adds = torch.stack(columns, dim=1)  # what each row adds to the three estimates, relative to them
        units, kept_units = np.maximum(self._units, 1), np.maximum(self._kept_units, 1)
        of_unit, kept_of_unit = np.maximum(self._total, 1) / units, np.maximum(self._kept, 1) / kept_units
        complete = kept_of_unit >= of_unit
        first = units**2 * of_unit**2 / kept_of_unit**2 / kept_units / np.maximum(kept_units - 1, 1)
        # From one row of a sample the variance within samples is not known. The one between samples contains it if the
        # fraction of samples that were drawn does not reduce it; by that fraction the error is then too large.
        seen = complete | (kept_of_unit > 1)
        first = first * np.where(seen, 1.0 - kept_units / units, 1.0)
        first[(kept_units == 1) & ((units > 1) | ~seen)] = np.nan  # of one unit the error is not known
        first[~sampled] = 0.0
        found = self._covariances(self._per_unit(adds), self._kept_units, first)
        if not complete.all():
            second = units / kept_units * of_unit**2 * (1.0 - kept_of_unit / of_unit) / kept_of_unit
            second = np.where(complete, 0.0, second / np.maximum(kept_of_unit - 1, 1))
            rows_of_units = np.repeat(kept_of_unit.astype(np.int64), self._kept_units)
            within = self._covariances(adds, rows_of_units, np.repeat(second, self._kept_units))
            found = found + SegmentSums(self._kept_units, self.device)(within)
        return self._per_layer(found)

    def margin_factors(self) -> list[float]:
        """Returns :attr:`LayerSums.margin`."""
        freedom = np.bincount(self._layer, np.where(self._of_samples, self._kept_units - 1, 0), self._layers)
        factors: list[float] = np.where(freedom > 0, _three_sigma(np.maximum(freedom, 1.0)), 2.0).tolist()
        return factors

    def _per_unit(self, adds: Tensor) -> Tensor:
        """Sums rows to units of the first stage."""
        if np.array_equal(self._kept, self._kept_units):
            return adds
        lengths = np.repeat(self._kept // np.maximum(self._kept_units, 1), self._kept_units)
        return SegmentSums(lengths, self.device)(adds)

    def _covariances(self, values: Tensor, lengths: _Ints, factors: npt.NDArray[np.float64]) -> Tensor:
        """Returns sums of products of deviations from the mean of each segment of rows, times a factor: (S, 6)."""
        sums = SegmentSums(lengths, self.device)
        mean = sums(values) / on_device(np.maximum(lengths, 1)[:, None].astype(np.float64), self.device)
        segment = on_device(np.repeat(np.arange(len(lengths)), lengths), self.device)
        away = (values - mean[segment]).unbind(dim=1)
        products = sums(torch.stack([away[i] * away[j] for i, j in SPREAD], dim=1))
        # Where the factor is zero the sum is, too, also if the values are not finite.
        products = torch.where(on_device((factors != 0.0)[:, None], self.device), products, 0.0)
        return products * on_device(factors[:, None], self.device)

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


def _three_sigma(freedom: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the bound that Student's t exceeds as often as a normal variable exceeds three sigma.

    The closed forms for one and two degrees of freedom, and else the expansion in their inverse number (Abramowitz and
    Stegun, 26.7.5), which is off by 2 % for three and less for more.
    """
    inside, inverse = math.erf(3.0 / math.sqrt(2.0)), 1.0 / freedom
    series = np.polynomial.polynomial.polyval(inverse, [3.0, 7.5, 17.25, 30.1875, 38.6016])
    one, two = math.tan(math.pi * inside / 2.0), inside * math.sqrt(2.0 / (1.0 - inside**2))
    return np.select([freedom < 1.5, freedom < 2.5], [one, two], series)
