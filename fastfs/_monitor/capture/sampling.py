"""Chooses and copies rows of feature tensors.

A row is one vector of features: one token of (batch, tokens, width), one image of (batch, channels, height, width).
Rows are drawn from all rows of a tensor, or in two stages: a few samples of the batch, then rows of each of them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from fastfs._network.input_copies import UnknownArgumentError, tensors_in

__all__ = ["BudgetError", "KeptRows", "RowChoice", "RowSampler", "SampleSubset", "row_dims"]

_SUBSETS = 32  # cached subsets; batches of varying size need several


class BudgetError(RuntimeError):
    """Raised if a copy does not fit into the memory budget."""


def row_dims(x: Tensor) -> int:
    """Returns how many leading dimensions index rows: all but the last of up to 3 dimensions, else the first one."""
    dims = x.dim()
    return dims - 1 if 1 < dims <= 3 else min(dims, 1)


class SampleSubset(NamedTuple):
    """A fixed random subset of the samples of a batch, which the first dimension counts.

    Attributes:
        kept: Number of samples in the subset.
        batch: Number of samples in the batch.
    """

    kept: int
    batch: int

    def splits(self, x: Tensor) -> bool:
        """Returns whether the first dimension of an input of the model counts the samples."""
        return x.dim() > 0 and x.shape[0] == self.batch

    def shape(self, shape: torch.Size) -> torch.Size | None:
        """Returns the shape of features of the subset, given that of the batch; None if these are not of samples."""
        if not shape or shape[0] % self.batch:
            return None
        return torch.Size((shape[0] // self.batch * self.kept, *shape[1:]))


class RowChoice(NamedTuple):
    """Which rows of a tensor are kept; with the sampler's seed, the numbers of the rows follow.

    Attributes:
        total: Number of rows of the tensor.
        kept: Number of rows that are kept.
        samples: Samples from which they are drawn, equally many from each; None for all rows as one.
    """

    total: int
    kept: int
    samples: SampleSubset | None = None


@dataclass(slots=True)
class KeptRows:
    """Rows kept of one tensor.

    Attributes:
        values: The rows, shape (k, width).
        choice: Which rows they are.
    """

    values: Tensor
    choice: RowChoice


class RowSampler:
    """Selects fixed random subsets of rows, with a generator of its own.

    A subset depends only on the seed and the :class:`RowChoice`. Features before, backward vector and features after
    therefore have the same rows, and so have all layers with equally many.

    Args:
        rows: The most rows that are kept of a tensor; None for all.
        samples: Samples of a batch that second forwards run on, which rows are drawn from; None for all.
        seed: Seed of the subsets.
    """

    def __init__(self, rows: int | None, samples: int | None = None, seed: int = 0) -> None:
        self.rows = rows
        self.samples = samples
        self._seed = seed
        self._subsets: OrderedDict[tuple[RowChoice | SampleSubset, bool, torch.device], Tensor] = OrderedDict()

    def subset_of(self, arguments: Any) -> SampleSubset | None:
        """Returns the samples of a batch that second forwards run on, or None for all.

        Args:
            arguments: The arguments of the model. The first dimension of the first tensor that has one counts the
                samples.

        Returns:
            The subset; None if the batch has no more samples than wanted.

        Raises:
            UnknownArgumentError: No argument has a first dimension.
        """
        if self.samples is None:
            return None
        for x in tensors_in(arguments):
            if x.dim() > 0:
                return SampleSubset(self.samples, x.shape[0]) if x.shape[0] > self.samples else None
        raise UnknownArgumentError("no tensor whose first dimension counts the samples of the batch, for samples=")

    def choose(self, total: int, most: int, samples: SampleSubset | None = None) -> RowChoice:
        """Returns which of ``total`` rows to keep if there is room for ``most``: of ``samples``, equally many each."""
        if samples is None:
            return RowChoice(total, min(self.wanted(total), most))
        wanted = min(self.wanted(total // samples.batch * samples.kept), most)
        return RowChoice(total, wanted // samples.kept * samples.kept, samples)

    def wanted(self, total: int) -> int:
        """Returns how many of ``total`` rows are kept if memory allows."""
        return total if self.rows is None else min(total, self.rows)

    def rows_of(self, choice: RowChoice, device: torch.device, *, within: bool = False) -> Tensor:
        """Returns the numbers of the chosen rows, ascending, on the device: int64 (kept,).

        Args:
            choice: The choice.
            device: Of the result.
            within: Whether to number the rows of a tensor that has the chosen samples only.
        """
        return self._cached(choice, within, device)

    def samples_of(self, samples: SampleSubset, device: torch.device) -> Tensor:
        """Returns the numbers of the samples in the subset, ascending, on the device: int64 (kept,)."""
        return self._cached(samples, False, device)

    def _cached(self, choice: RowChoice | SampleSubset, within: bool, device: torch.device) -> Tensor:
        key = choice, within, device
        if key in self._subsets:
            self._subsets.move_to_end(key)
            return self._subsets[key]
        if isinstance(choice, RowChoice):
            numbers = self._row_numbers(choice, within)
        else:
            numbers = self._draw(choice.batch, choice.kept)
        host = torch.from_numpy(numbers)
        index = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
        self._subsets[key] = index
        if len(self._subsets) > _SUBSETS:
            self._subsets.popitem(last=False)
        return index

    def _row_numbers(self, choice: RowChoice, within: bool) -> npt.NDArray[np.int64]:
        samples = choice.samples
        if samples is None:
            return self._draw(choice.total, choice.kept)
        of_sample, kept = choice.total // samples.batch, choice.kept // samples.kept
        rows = np.stack([self._draw(of_sample, kept, number) for number in range(samples.kept)])
        first = np.arange(samples.kept) if within else self._draw(samples.batch, samples.kept)
        return (first[:, None] * of_sample + rows).reshape(-1)

    def _draw(self, total: int, kept: int, *stream: int) -> npt.NDArray[np.int64]:
        """Draws ``kept`` of the integers below ``total`` without replacement, ascending."""
        if kept >= total:
            return np.arange(total)
        generator = np.random.default_rng((self._seed, total, kept, *stream))
        return np.sort(generator.choice(total, kept, replace=False, shuffle=False))

    def keep(self, x: Tensor, choice: RowChoice, *, within: bool = False) -> KeptRows:
        """Returns a contiguous copy of the chosen rows of ``x``, shape (kept, width).

        Args:
            x: The features.
            choice: The rows.
            within: Whether ``x`` has the chosen samples only.
        """
        dims = row_dims(x)
        rows = math.prod(x.shape[:dims])
        if choice.kept == rows and _plain(x):  # for thousands of small features, a clone is faster
            copy = x.detach().clone(memory_format=torch.contiguous_format)
            return KeptRows(copy.view(rows, math.prod(x.shape[dims:])), choice)
        values, _ = torch.ops.fastfs.gather_rows(x, self.rows_of(choice, x.device, within=within), dims)
        return KeptRows(values, choice)

    def squares(self, x: Tensor, most: int) -> tuple[Tensor, float]:
        """Returns squared norms of at most ``most`` rows, float64 (k,), and the factor from their sum to all rows.

        If these are all rows, it returns the norm of the whole tensor instead, float64 (), in one operation.
        """
        dims = row_dims(x)
        total = math.prod(x.shape[:dims])
        kept = min(self.wanted(total), most)
        if kept == total and _plain(x):
            return torch.linalg.vector_norm(x.detach(), dtype=torch.float64), 1.0
        sums: Tensor = torch.ops.fastfs.row_squares(x, self.rows_of(RowChoice(total, kept), x.device), dims)
        return sums, total / kept if kept else 1.0


def _plain(x: Tensor) -> bool:
    """Returns whether a tensor is plain memory: no subclass, no functorch wrapper, no negative or conjugate bit."""
    if type(x) is not Tensor or x.layout is not torch.strided:
        return False
    return not (is_functorch_wrapped_tensor(x) or x.is_neg() or x.is_conj())
