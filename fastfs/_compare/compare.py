"""Compares runs: :func:`compare` reads their records, tests every difference, and keeps the first of each quantity."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastfs._compare.measures import MEASURES, Measure
from fastfs._compare.noise import Differences, level_of, of_pair, of_replicates, same_state, with_median
from fastfs._compare.result import ALL_LAYERS, Parting, RunComparison
from fastfs._compare.runs import AlignedRuns, RecordedRun, align, read_runs

__all__ = ["compare", "compare_runs"]

Array = np.ndarray[Any, Any]
Paths = Sequence[str | os.PathLike[str]]


def compare(runs: Paths, *, against: Paths = (), confidence: float = 0.95) -> RunComparison:
    """Find out which layer and which quantity of runs of the same schedule part first.

    Compared are the numbers of measured steps that are valid: every quantity of the report page, and the ratios of a
    layer's parameter update to its gradient and to its parameters. Runs with the same seed and data part at the first
    step at which anything differs by more than rounding. Two runs with different seeds differ in every number, so that
    only the sizes of parameter updates are compared: a layer parts if it differs from the other ones by more than
    these scatter, beyond their common factor. Several runs on a side show how much runs of one setting differ; then
    every quantity is tested, and its median over layers. ``docs/compare.md`` explains the statistics.

    Args:
        runs: records or folders, as for :func:`fastfs.load`; ``PATH::ID`` names one of the runs of a record, otherwise
            it is the last one. A single record stands for all of its runs. Without ``against``, every run is compared
            with the first one.
        against: records of a second side.
        confidence: probability that no quantity of any layer at any step parts for runs that differ by chance only.

    Returns:
        What parts, and where first.

    Raises:
        ImportError: pandas or scipy is not installed.
        OSError: a record cannot be read.
        ValueError: fewer than two runs, one of them twice, runs without a common layer or measured step, or without a
            number that all of them have; or the confidence is not in (0, 1).

    Source: Student's t with Satterthwaite's degrees of freedom, Bonferroni's bound.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
    if against and not runs:
        raise ValueError("runs: expected at least one to compare those of the other side with, got none")
    found = read_runs([*runs, *against])
    return compare_runs(found, len(against), confidence)


def compare_runs(runs: Sequence[RecordedRun], against: int = 0, confidence: float = 0.95) -> RunComparison:
    """Does what :func:`compare` does, with runs that were read.

    Args:
        runs: of the first side, followed by those of the second one.
        against: number of runs of the second side.
        confidence: see there.

    Returns:
        What parts.

    Raises:
        ValueError: see there.
    """
    aligned = align(runs)
    labels = tuple(run.label for run in runs)
    split = len(runs) - against
    equal, same_at_first, untested = [], [], []
    partings: list[Parting] = []
    if against and split + against > 2:
        sides = np.arange(len(runs)) >= split
        found = [_Tested(measure, of_replicates(aligned, measure, sides), sides, aligned) for measure in MEASURES]
        names = ", ".join(labels[split:]), ", ".join(labels[:split])
        partings = list(_first_partings(found, aligned, *names, ["replicates"] * len(aligned.steps), confidence))
    else:
        level = 1 - (1 - confidence) / (len(runs) - 1)
        for run in runs[1:]:
            pair = AlignedRuns((runs[0], run), aligned.layers, aligned.steps, ())
            sides = np.array([False, True])
            state = same_state(pair)
            found = [_Tested(measure, of_pair(pair, measure, state), sides, pair) for measure in MEASURES]
            noises = ["rounding" if same else "layers" for same in state[0]]
            partings += _first_partings(found, pair, run.label, runs[0].label, noises, level)
            same_at_first += [run.label] if state[0][0] else []
            equal += [run.label] if _equal(pair) else []
            untested += [] if any(np.isfinite(one.found.p).any() for one in found) else [run.label]
    return RunComparison(
        labels=labels[:split],
        against=labels[split:],
        layers=aligned.layers,
        steps=tuple(int(step) for step in aligned.steps),
        equal=tuple(equal),
        same_state=tuple(same_at_first),
        untested=tuple(untested),
        confidence=confidence,
        partings=tuple(partings),
        missing=tuple(_missing(aligned)),
        notes=aligned.notes,
    )


def _missing(aligned: AlignedRuns) -> Iterator[str]:
    """Says from which step on one of two runs has no numbers where the other one has, as after it diverged."""
    given = np.isfinite(np.stack([measure.raw(aligned, valid=False) for measure in MEASURES])).any(axis=(0, 2))
    first, *others = aligned.runs
    for run, own in zip(others, given[1:], strict=True):
        for lacking, has, lost in ((run, first, given[0] & ~own), (first, run, own & ~given[0])):
            if lost.any():
                step = aligned.steps[int(np.argmax(lost))]
                yield f"{lacking.label}: numbers are missing from step {step:,} on that {has.label} has"


def _equal(pair: AlignedRuns) -> bool:
    values = [measure.raw(pair) for measure in MEASURES]
    return all(np.array_equal(first, second, equal_nan=True) for first, second in values)


@dataclass(frozen=True)
class _Tested:
    measure: Measure
    found: Differences
    sides: Array
    aligned: AlignedRuns

    def values(self, layer: int, step: int) -> tuple[float, float]:
        """The values of both sides: of a group, what belongs to the mean of its scaled values."""
        cells = with_median(self.measure.raw(self.aligned))[:, layer, step]

        def middle(side: Array) -> float:
            given = side[np.isfinite(side)]
            if self.measure.ratio and (given > 0).all():
                return float(np.exp(np.log(given).mean()))
            return float(given.mean())

        return middle(cells[~self.sides]), middle(cells[self.sides])


def _first_partings(
    tested: Sequence[_Tested], aligned: AlignedRuns, second: str, first: str, noises: Sequence[str], confidence: float
) -> Iterator[Parting]:
    """Yields the first parting of each quantity, those of the first step first.

    Raises:
        ValueError: no number can be compared.
    """
    p = np.stack([one.found.p for one in tested])
    cells = np.isfinite(p).sum(axis=(0, 1))
    if not cells.any() and not any(np.isfinite(one.measure.raw(aligned)).all(axis=0).any() for one in tested):
        raise ValueError(f"{second} and {first}: no number is present and valid in both at a common layer and step")
    parted = p < level_of(np.arange(len(cells)), cells, confidence)
    firsts = [(int(np.argmax(own.any(axis=0))), i) for i, own in enumerate(parted) if own.any()]
    for step, i in sorted(firsts):
        one, layers = tested[i], np.flatnonzero(parted[i][:, step])
        layer = int(layers[0])
        reference, value = one.values(layer, step)
        difference = float(one.found.difference[layer, step])
        change = float(np.exp(difference)) if one.measure.ratio else value - reference
        yield Parting(
            second=second,
            first=first,
            step=int(aligned.steps[step]),
            layer=aligned.layers[layer] if layer < len(aligned.layers) else ALL_LAYERS,
            key=one.measure.key,
            quantity=one.measure.label,
            value=value,
            reference=reference,
            change=change,
            ratio=one.measure.ratio,
            errors=float(one.found.errors[layer, step]),
            p=float(p[i, layer, step]),
            noise=noises[step],
            others=len(layers) - 1,
        )
