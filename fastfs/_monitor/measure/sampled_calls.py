"""Decides from step to step what is read of the parameters of a call: everything, or a sample prepared by a census."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfs._monitor.measure.parameter_sample import CHUNK, Bools, ParameterChunks, Reading, coverage, standing_out
from fastfs._stats import ParameterStats

__all__ = ["CENSUS_PERIOD", "SampledCall", "SampledCalls"]

CENSUS_PERIOD = 64
"""A census is taken at the 1st, 2nd, 4th, ... step and, from this one on, at every so many-th."""

_COVERAGE = 0.9  # of two standard errors, that a sample has to have had in a census
_KEPT = 8  # calls: kinds of steps, by which parameters receive a gradient
_DOT = ParameterStats.names.index("dot")


class _Arriving:
    """A vector on a device whose values the host gets later, without waiting."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host: Tensor | None = values if values.is_cpu else None  # never known on devices other than CUDA
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def known(self) -> Tensor | None:
        """Returns the values, None as long as they have not arrived."""
        return None if self._event is not None and not self._event.query() else self._host


class SampledCall:
    """The readings of one call. Until the first census has arrived, everything is read.

    Args:
        chunks: Of all parameters of the optimizer.
        indices: The parameters of the call.
        cut: Which of these are sampled.
        device: Of the sums.
    """

    def __init__(
        self, chunks: ParameterChunks, indices: Sequence[int], cut: Sequence[bool], device: torch.device
    ) -> None:
        self._chunks = chunks
        self._indices = list(indices)
        self._cut = list(cut)
        self._device = device
        self._steps = 0
        everything = [
            np.ones(chunks.counts[i], dtype=np.bool_) if each else None for i, each in zip(indices, cut, strict=True)
        ]
        self._census = Reading(chunks, indices, everything, device, census=True)
        self._due = False
        self._arriving: _Arriving | None = None
        self._sample: Reading | None = None
        self._standing: list[Bools] = []  # which chunks of each parameter stood out in the last census

    def next(self) -> Reading:
        """Returns what the coming step reads."""
        self._steps += 1
        step = self._steps
        self._due = step % CENSUS_PERIOD == 0 or (step < CENSUS_PERIOD and step & (step - 1) == 0)
        found = None if self._arriving is None else self._arriving.known()
        if found is not None:
            self._arriving = None
            self._evaluate(found.numpy())
        return self._census if self._due or self._sample is None else self._sample

    def _evaluate(self, sums: npt.NDArray[np.float64]) -> None:
        """Chooses the sample, from <g, dw> of every chunk in a census.

        A parameter is sampled only if what stood out in the census before would have given good estimates in this one:
        contributions may be too uneven, as of rare tokens, or change too fast.
        """
        every, before, chosen = self._chunks.every, self._standing, list[Bools | None]()
        self._standing = []
        for each, (first, count) in zip(self._cut, self._census.places, strict=True):
            own = sums[first : first + count]
            self._standing.append(standing_out(own, every) if each else np.zeros(0, dtype=np.bool_))
            if not each:
                chosen.append(None)
                continue
            last = before[len(chosen)] if before else None
            good = last is not None and np.isfinite(own).all() and coverage(own, last, every) >= _COVERAGE
            chosen.append(self._standing[-1] if good else np.ones_like(self._standing[-1]))
        self._sample = Reading(self._chunks, self._indices, chosen, self._device)

    def estimate(self, reading: Reading, sums: Tensor) -> Tensor:
        """Returns :meth:`Reading.estimate` of the sums of every piece, and keeps those of a census that is due.

        Args:
            reading: From :meth:`next`.
            sums: float64 (Q, C).
        """
        if self._due and self._arriving is None:
            self._arriving = _Arriving(sums[:, _DOT].contiguous())
        return reading.estimate(sums)


class SampledCalls:
    """The sampled calls of one optimizer.

    Args:
        every: One of so many chunks is read; 1 for all, always.
        number: Of the optimizer.
        least: The least elements of a chunk.
    """

    def __init__(self, every: int = 1, number: int = 0, least: int = CHUNK) -> None:
        self.every = every
        self._number = number
        self._least = least
        self._chunks: ParameterChunks | None = None
        self._known: dict[object, SampledCall | None] = {}

    def find(
        self, sizes: list[int], indices: Sequence[int], tensors: Sequence[Sequence[Tensor]], device: torch.device
    ) -> SampledCall | None:
        """Returns how the parameters of a call are read, None for completely.

        Args:
            sizes: Elements of every parameter of the optimizer.
            indices: The parameters of the call.
            tensors: The lists of tensors that the call reads. A parameter is cut only if all its tensors are
                contiguous, because pieces are counted in the order of memory.
            device: Of the sums.
        """
        if self.every == 1:
            return None
        if self._chunks is None or self._chunks.sizes != sizes:
            self._chunks = ParameterChunks(sizes, self.every, self._number, self._least)
            self._known.clear()
        counts = self._chunks.counts
        if not any(counts):
            return None
        ordered = [all(each.is_contiguous() for each in lists) for lists in zip(*tensors, strict=True)]
        cut = tuple(counts[i] > 0 and each for i, each in zip(indices, ordered, strict=True))
        key = (tuple(indices), cut, device)
        if key not in self._known:
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[key] = SampledCall(self._chunks, indices, cut, device) if any(cut) else None
        return self._known[key]
