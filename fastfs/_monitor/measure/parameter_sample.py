"""Estimates of sums over parameters from a random sample of their elements, with the variance of the estimate.

A parameter is cut into N chunks of one length, a multiple of 64 elements, and a short rest. The rest is always read,
and so are chunks that stand out: those that contributed several times the average of |<g, dw>| over the chunks in an
earlier step, the census. In a matrix of embeddings these hold the rows of frequent tokens. The other chunks form S
strata of k neighbours. Of every stratum one chunk is read, drawn independently and uniformly. With y_h the sum over the
chunk that was read,

    estimate = sum over h of k y_h + the sums over what is read completely,

which is unbiased over the draws: what stands out was decided by an earlier step, and training knows of no draw. Strata
keep the sample spread over the parameter.

With one chunk per stratum no variance within a stratum can be estimated. The variance of the estimate is taken from
differences of neighbouring strata, in a circle:

    v = 1/2 sum over h of (k y_h - k y_(h+1))^2,    y_(S+1) = y_1.

y_h and y_(h+1) are independent, with means Y_h / k and Y_(h+1) / k (Y_h: the sum over stratum h), so that

    E[(k y_h - k y_(h+1))^2] = V_h + V_(h+1) + (Y_h - Y_(h+1))^2    with V_h = Var[k y_h].

Every stratum is in two of the S differences, so E[v] = sum of V_h + 1/2 sum of (Y_h - Y_(h+1))^2: never below the
variance of the estimate. If the last difference were left out, the first and last stratum would count half.

Source: W. G. Cochran, Sampling Techniques, 3rd ed., section 5A.12 (collapsed strata; the argument above is his);
K. M. Wolter, Introduction to Variance Estimation, 2nd ed., section 8.2 (successive differences).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfs._monitor.measure.segment_sums import SegmentSums, on_device
from fastfs._stats import ParameterStats

__all__ = ["CHUNK", "SAMPLING", "Bools", "ParameterChunks", "Reading", "coverage", "standing_out"]

CHUNK = 2**14
"""The least elements of a chunk: about what one block of a GPU reads at a time."""

SAMPLING = ("dot_variance", "sampled")
"""The columns after those of ParameterStats: variance of the sum <g, dw>, and whether it was sampled (1 or 0)."""

_PIECES = 2**11  # to which the pieces of all parameters are limited, roughly, by larger chunks
_STRATA = 4  # a parameter with fewer is read completely: too few differences for a variance
_PROBABLE = 0.5  # probability of inclusion, in proportion to size, from which on a chunk stands out
_DRAWS = 256  # that a sample is tried with
_MULTIPLE = 64  # of which the elements of a chunk are one, so that vectors of 16 bytes stay aligned
_DOT = ParameterStats.names.index("dot")

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class ParameterChunks:
    """The chunks of the parameters of an optimizer, and the draws. A function of the arguments alone.

    Args:
        sizes: Elements of every parameter.
        every: k: one of so many chunks is read; at least 2.
        number: Of the optimizer. The draws for the parameters of several optimizers are independent.
        least: The least elements of a chunk.

    Attributes:
        sizes, every: The arguments.
        lengths: Elements of every parameter's chunks.
        counts: Number of every parameter's chunks; 0 for one that is always read completely.
        draws: For every parameter which chunk of each stratum is read, int64 (counts / k,) of 0 to k - 1.
    """

    def __init__(self, sizes: Sequence[int], every: int, number: int = 0, least: int = CHUNK) -> None:
        # A generator of its own: the random streams of NumPy, Python and torch stay as they are.
        random = np.random.Generator(np.random.PCG64([number, every, least, *sizes]))
        least = max(least, -(-sum(sizes) // (every * _PIECES)))
        self.sizes = list(sizes)
        self.every = every
        self.lengths: list[int] = []
        self.counts: list[int] = []
        self.draws: list[Ints] = []
        for size in sizes:
            strata = size // (every * least)
            if strata < _STRATA:
                strata = 0
            length = size // (every * strata) if strata else 0
            length -= length % _MULTIPLE if length >= _MULTIPLE else 0
            self.lengths.append(length)
            self.counts.append(every * strata)
            self.draws.append(random.integers(every, size=strata))


def standing_out(sums: npt.NDArray[np.float64], every: int) -> Bools:
    """Returns which chunks of a parameter are to be read in any case, because they contribute most of the sum.

    n = N / k chunks are to be read, of which c stand out already. With probabilities of inclusion in proportion to size
    (Cochran, section 9A.3) a chunk of size a would be read with the probability a (n - c) / (the sum of the sizes of
    all chunks that do not stand out). It stands out from 1/2 on. This is repeated until no chunk is added.

    Args:
        sums: <g, dw> of the N chunks in an earlier step.
        every: k.

    Returns:
        Bool (N,). All chunks, if a sum is not finite, or none is left over.
    """
    sizes = np.abs(sums)
    found: Bools = ~np.isfinite(sizes)
    if found.any():
        return np.ones_like(found)
    while not found.all():
        left = len(sizes) / every - np.count_nonzero(found)
        more = ~found & (sizes * left >= _PROBABLE * sizes[~found].sum())
        if left <= 0:
            return np.ones_like(found)
        if not more.any():
            break
        found |= more
    return found


def coverage(sums: npt.NDArray[np.float64], standing: Bools, every: int) -> float:
    """Returns how often the sum over a parameter is within two standard errors of its estimate, over random draws.

    Args:
        sums: <g, dw> of the N chunks in one step.
        standing: Which chunks stood out in an earlier one.
        every: k.

    Returns:
        A share of the draws; 1 if too few chunks are left to be sampled.
    """
    left = sums[~standing]
    strata = len(left) // every
    if strata < _STRATA:
        return 1.0
    table = left[: strata * every].reshape(strata, every)
    draws = np.random.Generator(np.random.PCG64(strata)).integers(every, size=(_DRAWS, strata))
    found = every * table[np.arange(strata), draws]
    variance = 0.5 * np.square(found - np.roll(found, -1, axis=1)).sum(axis=1)
    return float((np.square(found.sum(axis=1) - table.sum()) <= 4.0 * variance).mean())


class Reading:
    """What is read of the parameters of one call, and the estimates of their sums.

    Args:
        chunks: Of all parameters of the optimizer.
        indices: The parameters of the call.
        known: For each parameter of the call which chunks stand out, as :func:`standing_out` returns them. None if the
            parameter is read by one piece.
        device: Of the sums.
        census: Read all chunks of the parameters that are not read by one piece, each as a piece.

    Attributes:
        pieces: The argument of `optimizer_stats`, int64 (Q, 3).
        elements: How many elements of every tensor are read.
        places: Of a census, where the chunks of each parameter are among the pieces: the first, and their number.
    """

    def __init__(
        self,
        chunks: ParameterChunks,
        indices: Sequence[int],
        known: Sequence[Bools | None],
        device: torch.device,
        *,
        census: bool = False,
    ) -> None:
        pieces: list[Ints] = []
        following: list[Ints] = []
        strata: list[Ints] = []
        self.places: list[tuple[int, int]] = []
        first = 0
        for place, (index, standing) in enumerate(zip(indices, known, strict=True)):
            size, length = chunks.sizes[index], chunks.lengths[index]
            drawn, others = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
            if standing is not None:
                drawn, others = (drawn, np.arange(len(standing))) if census else _choose(chunks, index, standing)
            numbers = np.concatenate([drawn, others])
            begins, counts = numbers * length, np.full(len(numbers), length)
            rest = 0 if standing is None or not len(numbers) else len(standing) * length
            if rest < size or not len(numbers):
                begins, counts = np.append(begins, rest), np.append(counts, size - rest)
            pieces.append(np.stack([np.full(len(begins), place), begins, counts], axis=1))
            own = np.arange(len(begins))
            own[: len(drawn)] = (own[: len(drawn)] + 1) % max(len(drawn), 1)
            following.append(first + own)
            strata.append(np.where(np.arange(len(begins)) < len(drawn), np.arange(len(begins)), -1))
            self.places.append((first, len(numbers)))
            first += len(begins)
        self._build(chunks.every, pieces, following, strata, device)

    def _build(
        self, every: int, pieces: list[Ints], following: list[Ints], strata: list[Ints], device: torch.device
    ) -> None:
        table = np.concatenate(pieces)
        stratum = np.concatenate(strata)  # number within the parameter, -1 for what is read completely
        self.pieces = torch.from_numpy(table)
        self.elements = int(table[:, 2].sum())
        self._owners = torch.from_numpy(np.ascontiguousarray(table[:, 0]))
        self._owners_there = on_device(table[:, 0], device)
        self._following = on_device(np.concatenate(following), device)
        weights = np.empty((len(table), len(ParameterStats.names) + len(SAMPLING)))
        weights[:] = np.where(stratum >= 0, float(every), 1.0)[:, None]
        weights[:, -2] = np.where(stratum >= 0, 0.5 * every**2, 0.0)
        weights[:, -1] = stratum == 0
        self._weights = on_device(weights, device)
        self._sum = SegmentSums(np.array([len(each) for each in pieces], dtype=np.int64), device)
        self._ones = torch.ones((len(table), 1), dtype=torch.float64, device=device)

    def coefficients(self, table: Tensor) -> Tensor:
        """Returns the coefficients of every piece, (Q, C), from those of every parameter."""
        return table.index_select(0, self._owners if table.is_cpu else self._owners_there)

    def estimate(self, sums: Tensor) -> Tensor:
        """Returns the sums of every parameter, and the columns `SAMPLING`, from the sums of every piece.

        Args:
            sums: float64 (Q, C).

        Returns:
            float64 (P, C + 2).
        """
        dot = sums[:, _DOT]
        difference = (dot - dot.index_select(0, self._following)).square()
        return self._sum(torch.cat([sums, difference[:, None], self._ones], dim=1) * self._weights)


def _choose(chunks: ParameterChunks, index: int, standing: Bools) -> tuple[Ints, Ints]:
    """Returns the chunks of a parameter that are drawn, and those that are read in any case; nothing for all of it."""
    every = chunks.every
    left = np.flatnonzero(~standing)
    strata = len(left) // every
    draws = chunks.draws[index][:strata]
    drawn = left[np.arange(strata) * every + draws]
    others = np.concatenate([left[strata * every :], np.flatnonzero(standing)])
    half_saved = (len(standing) + len(standing) / every) / 2  # if less is saved, the parameter is read completely
    if strata < _STRATA or len(drawn) + len(others) > half_saved:
        nothing = np.zeros(0, dtype=np.int64)
        return nothing, nothing
    return drawn, others
