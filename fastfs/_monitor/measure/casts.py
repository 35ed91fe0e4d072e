"""What a cast of the parameters before the forward takes of a step.

The optimizer moves a parameter by dw; the forward uses a copy c(w) in fewer bits, which moves by dc = c(w + dw) - c(w).
The cast's loss is the share of |dw|^2 that dc does not explain, and likewise the share of |dc|^2 that is rounding:

    loss = 1 - cos^2 = 1 - <dc, dw>^2 / (|dc|^2 |dw|^2),    1 if dc = 0 or <dc, dw> < 0.

The part of dc along dw has the length of dw on average, since an element of which the step is a tenth of the spacing
moves by a whole spacing in one case out of ten; 1 - <dc, dw> / |dw|^2 is therefore near 0 for any cast, and does not
show that nine elements stand still and the tenth goes ten times too far. The loss is then 0.9.

The casts:
    bfloat16: rounding to nearest, as autocast does.
    float8_e4m3fn: with one scale for the tensor, 448 / max |w|, before and after the step (dynamic tensorwise scaling).
    mxfp8: in blocks of 32 along the last dimension with a scale that is a power of two, and elements in e4m3 (OCP
        Microscaling Formats v1.0, section 6.3).

Sums over a parameter are estimates from random blocks, drawn once and without replacement: N / n times the sum over n
of N blocks, with the covariance N^2 / n (1 - n / N) times that of the blocks (Cochran, Sampling Techniques, chapter 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastfs._monitor.measure.incidence import Incidence
from fastfs._monitor.measure.segment_sums import SegmentSums, on_device
from fastfs._network.placements import local
from fastfs._record.parameter_columns import CASTS

__all__ = ["BLOCK", "BLOCKS", "SUMS", "CastSamples", "cast"]

BLOCK = 32
"""Elements of a block: those that share a scale in a microscaling format."""

BLOCKS = 256
"""The most blocks that are read of a parameter."""

SUMS = 9
"""Of each cast: <dc, dw>, |dc|^2, |dw|^2, and the covariances 00, 01, 02, 11, 12, 22 of these three."""

_PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_EXPONENT = 8  # of the largest power of two in e4m3
_LEAST_SCALE = 1e-12  # of what torchao divides by


def cast(name: str, blocks: Tensor, largest: Tensor) -> Tensor:
    """Returns numbers after a cast to fewer bits and back, in float64.

    Args:
        name: One of ``CASTS``.
        blocks: float32 or float64 (N, 32).
        largest: max |w| of the parameter that each block is from, float32 (N, 1).
    """
    if name == "bfloat16":
        return blocks.to(torch.bfloat16).to(torch.float64)
    single = blocks.to(torch.float32)
    if name == "mxfp8":
        exponent = torch.frexp(single.abs().amax(dim=1, keepdim=True)).exponent - 1 - _EXPONENT
        scale = torch.ldexp(torch.ones_like(single[:, :1]), -exponent.clamp(-126, 127))
    else:
        scale = (_LARGEST / largest.to(torch.float64).clamp_min(_LEAST_SCALE)).to(torch.float32)
    rounded = (single * scale).clamp(-_LARGEST, _LARGEST).to(_E4M3).to(torch.float64)
    return rounded / scale.to(torch.float64)


class CastSamples:
    """Samples the parameters before a step, and compares them with those after it.

    Args:
        names: The casts, of ``CASTS``; none for no work.
        device: Of the sums.

    Attributes:
        names: The casts.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self._device = device
        self._key: list[tuple[torch.Size, torch.Size]] | None = None
        self._before: tuple[Tensor, Tensor] | None = None

    def take(self, parameters: Sequence[Tensor]) -> None:
        """Copies the samples. To be called right before the step."""
        if not self.names:
            return
        nothing = torch.Size((0,))  # of complex numbers, which no cast takes
        key = [(p.shape, local(p).shape) if p.is_floating_point() else (nothing, nothing) for p in parameters]
        if key != self._key:
            self._plan(key)
        self._before = self._read(parameters)

    def forget(self) -> None:
        """Forgets the samples of the step."""
        self._before = None

    def sums(
        self, parameters: Sequence[Tensor], incidence: Incidence | None, kinds: Tensor | None, like: Tensor
    ) -> Tensor:
        """Returns the sums of every layer's own parameters: float64 (C, L, 9 for each cast).

        Args:
            parameters: As in :meth:`take`, after the step.
            incidence: Of the layers and parameters; None if that is not known.
            kinds: Which parameters are of each kind, bool (P, C); None if all are of one.
            like: Other sums, float64 (C, L, ...).
        """
        if incidence is None:
            return like.new_full((*like.shape[:2], SUMS * len(self.names)), torch.nan)
        after = self._read(parameters)
        values = torch.cat([self._of_cast(name, after) for name in self.names], dim=1)
        width = values.shape[1]
        if kinds is not None:
            values = torch.where(kinds[:, :, None], values[:, None, :], 0.0).flatten(1)
        values = torch.nn.functional.pad(values, (0, 0, 0, incidence.columns - len(values)))
        sums: Tensor = incidence.own(values).unflatten(1, (-1, width))
        return sums.transpose(0, 1)

    def _plan(self, key: list[tuple[torch.Size, torch.Size]]) -> None:
        """Draws the blocks of every parameter: where their elements are, and which of these are padding."""
        self._key = key
        self._places: list[tuple[int, Tensor]] = []  # of the elements, by the number of the parameter
        counts, factors, padding = [], [], []
        unknown = np.zeros((len(CASTS), len(key), 1), dtype=np.bool_)
        for number, (whole, shape) in enumerate(key):
            columns = shape[-1] if len(shape) > 1 else 0
            rows = shape.numel() // columns if columns else 0
            across = -(-columns // BLOCK)
            total = rows * across
            kept = min(total, BLOCKS)
            # A generator of its own: the random streams of NumPy, Python and torch stay as they are.
            random = np.random.Generator(np.random.PCG64([number, *whole]))
            chosen = np.sort(random.choice(total, size=kept, replace=False)) if kept else np.zeros(0, dtype=np.int64)
            row, column = np.divmod(chosen[:, None], max(across, 1))
            column = column * BLOCK + np.arange(BLOCK)
            padding.append(column >= columns)
            if kept:
                places = row * columns + np.minimum(column, columns - 1)
                self._places.append((number, torch.from_numpy(places)))
            counts.append(kept)
            error = total**2 / kept * (1 - kept / total) / max(kept - 1, 1) if kept else 0.0
            factors.append([total / kept if kept else 0.0] * 3 + [error] * 6)
            # The scale of the tensor, and blocks across the last dimension, are those of the whole parameter.
            if len(whole) > 1:
                unknown[CASTS.index("float8_e4m3fn"), number] = shape != whole
                unknown[CASTS.index("mxfp8"), number] = shape[-1:] != whole[-1:]
        owner = np.repeat(np.arange(len(key)), counts)
        self._sum = SegmentSums(np.asarray(counts, dtype=np.int64), self._device)
        self._owner = on_device(owner, self._device)
        self._mean = on_device(1.0 / np.maximum(np.asarray(counts, dtype=np.float64), 1.0)[:, None], self._device)
        self._factors = on_device(np.asarray(factors, dtype=np.float64).reshape(-1, SUMS), self._device)
        self._padding = on_device(np.concatenate(padding), self._device)
        self._unknown = on_device(unknown, self._device)

    def _read(self, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the blocks, and max |w| of the parameter of each: (N, 32), (N, 1)."""
        tensors = [local(parameters[number]).detach() for number, _ in self._places]
        wide = any(p.dtype == torch.float64 for p in tensors)
        dtype = torch.float64 if wide else torch.float32
        found = []
        for place, (p, (number, indices)) in enumerate(zip(tensors, self._places, strict=True)):
            if indices.device != p.device:
                indices = on_device(indices.numpy(), p.device)
                self._places[place] = number, indices
            found.append(torch.take(p, indices).to(self._device, dtype, non_blocking=True))
        if not found:
            return torch.zeros((0, BLOCK), device=self._device), torch.zeros((0, 1), device=self._device)
        blocks = torch.cat(found).masked_fill(self._padding, 0.0)
        largest = torch.ones((len(parameters), 1), device=self._device)
        if "float8_e4m3fn" in self.names:
            norms = torch._foreach_norm(tensors, float("inf"))
            read = on_device(np.asarray([number for number, _ in self._places]), self._device)
            each = torch.stack([norm.to(self._device, torch.float32, non_blocking=True) for norm in norms])
            largest[read] = each[:, None]
        return blocks, largest[self._owner]

    def _of_cast(self, name: str, after: tuple[Tensor, Tensor]) -> Tensor:
        """Returns the sums of every parameter: float64 (P, 9)."""
        assert self._before is not None
        moved = cast(name, *after) - cast(name, *self._before)
        update = after[0].to(torch.float64) - self._before[0].to(torch.float64)
        products = torch.stack([(moved * update).sum(1), moved.square().sum(1), update.square().sum(1)], dim=1)
        totals = self._sum(products)
        away = products - (totals * self._mean)[self._owner]
        covariances = self._sum(torch.stack([away[:, i] * away[:, j] for i, j in _PAIRS], dim=1))
        sums = torch.cat([totals, covariances], dim=1) * self._factors
        return torch.where(self._unknown[CASTS.index(name)], torch.nan, sums)
