"""The sums of `fastfs.feature_stats` in float64, to check implementations before they are timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfs import reference
from fastfs._bench.baselines import COLUMNS
from fastfs._bench.inputs import Inputs

__all__ = ["ALLOWED", "ExpectedSums", "expected_sums", "sums_and_scale"]

ALLOWED = 2e-6
"""Permitted error of a sum of fastfs, relative to the sum of its absolute terms."""

_CHECKED = 2**28  # largest number of elements summed in float64, unless a single layer has more


@dataclass(frozen=True)
class ExpectedSums:
    """Sums in float64 and sums of the absolute terms, for some of the layers (or rows)."""

    which: list[int]
    sums: Tensor
    scale: Tensor

    def error(self, sums: Tensor) -> float:
        """Return the largest relative error of (n, 8) sums, or of (n, 7) without the rounding variance."""
        columns = [0, 1, 2, 3, 4, 5, 7] if sums.shape[1] == 7 else list(range(8))
        found = sums[self.which][:, : len(columns)].to(torch.float64)
        return float(((found - self.sums[:, columns]).abs() / self.scale[:, columns]).max())


def expected_sums(inputs: Inputs, *, per_row: bool = False) -> ExpectedSums:
    """Return the sums of the reference for up to 20 layers, or for 200 rows of each."""
    layers = len(inputs[0])
    chosen = list(range(0, layers, max(1, layers // 20)))
    which, tables, at, elements = [], [], 0, 0
    for i in range(layers):
        f, g, b = (x[i] for x in inputs)
        rows = math.prod(f.shape[:-1])
        if i in chosen and (elements == 0 or elements + f.numel() <= _CHECKED):
            elements += f.numel()
            if per_row:
                some = list(range(0, rows, max(1, rows // 200)))
                tables.append(_sums_and_scale(*(x.reshape(rows, -1)[some] for x in (f, g, b))))
                which += [at + row for row in some]
            else:
                tables.append(torch.cat(sums_and_scale(f, g, b))[None])
                which.append(i)
        at += rows if per_row else 1
    sums, scale = torch.cat(tables).split(COLUMNS, dim=1)
    return ExpectedSums(which, sums, scale.clamp_min(torch.finfo(torch.float64).tiny))


def sums_and_scale(before: Tensor, after: Tensor, backward: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eight sums of one layer, and those of the absolute terms: (8,) each."""
    length = 2**18 if before.device.type == "cpu" else 2**24
    parts = zip(*(x.reshape(-1).split(length) for x in (before, after, backward)), strict=True)
    sums, scale = torch.stack([_sums_and_scale(*part) for part in parts]).sum(dim=0).split(COLUMNS)
    return sums, scale.clamp_min(torch.finfo(torch.float64).tiny)


def _sums_and_scale(f: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """Return sums over the last dimension, followed by those of the absolute terms: (..., 16)."""
    sums = reference._feature_sums(f, g, b)[..., :COLUMNS]
    scale = sums.abs()
    scale[..., 0] = sums[..., 5]
    x = f.to(torch.float64)
    scale[..., 4] = (x * (g.to(torch.float64) - x)).abs().sum(dim=-1)
    return torch.cat([sums, scale], dim=-1)
