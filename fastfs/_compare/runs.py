"""Reads the runs that are compared, and brings their measured rows to common layers and steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from fastfs._record.reading.load import load_compact
from fastfs._record.reading.locate import find_record
from fastfs._report.grids import Grid, make_grid
from fastfs._report.quantities import QUANTITIES, UNUSED
from fastfs._utils.extras import load as load_extra

__all__ = ["AlignedRuns", "RecordedRun", "align", "read_runs"]

Array = np.ndarray[Any, Any]

_SETTINGS = ("model", "parameters", "dtype", "device", "optimizer", "mode", "every", "rows", "samples", "ranks")
"""Entries of the header whose differences are worth a note."""

_MOST_NAMED = 8


@dataclass(frozen=True)
class RecordedRun:
    """The measured rows of one run.

    Attributes:
        label: name in texts and on the page.
        header: the last one of the run.
        layers: names of its layers, without groups.
        grid: of its measured rows, (layers, steps).
    """

    label: str
    header: Mapping[str, Any]
    layers: tuple[str, ...]
    grid: Grid

    @property
    def run(self) -> str:
        """Id of the run."""
        return str(self.header["run"])


@dataclass(frozen=True)
class AlignedRuns:
    """Runs with the layers and steps that all of them have.

    Attributes:
        runs: of which all arrays have one entry each.
        layers: names, in the order of the first run.
        steps: (steps,) numbers of optimizer steps.
        notes: what was left out, and which settings differ.
    """

    runs: tuple[RecordedRun, ...]
    layers: tuple[str, ...]
    steps: Array
    notes: tuple[str, ...]

    def values(self, column: str, *, guarded: bool = False) -> Array:
        """Returns the values of a column, NaN where one is missing or, if ``guarded``, not valid.

        Args:
            column: name of the column.
            guarded: whether values mean nothing where ``valid`` is false.

        Returns:
            Shape (runs, layers, steps), float64.
        """
        found = np.full((len(self.runs), len(self.layers), len(self.steps)), np.nan)
        for values, run in zip(found, self.runs, strict=True):
            if column in run.grid.columns:
                where = self.places(run)
                values[:] = run.grid.columns[column][where]
                if guarded:
                    values[run.grid.invalid[where]] = np.nan
        return found

    def losses(self) -> Array:
        """Returns the logged losses, shape (runs, steps), NaN where there is none."""
        return np.stack([run.grid.loss[np.searchsorted(run.grid.steps, self.steps)] for run in self.runs])

    def places(self, run: RecordedRun) -> tuple[Array, ...]:
        """Returns the places of the common layers and steps in the grid of a run, to index it with."""
        row_of = {name: row for row, name in enumerate(run.layers)}
        rows = np.array([row_of[name] for name in self.layers])
        return np.ix_(rows, np.searchsorted(run.grid.steps, self.steps))


def read_runs(records: Sequence[str | os.PathLike[str]]) -> list[RecordedRun]:
    """Reads the last run of each record, or all runs of a single record.

    Args:
        records: records or folders of runs, as for :func:`fastfs.load`. ``PATH::ID`` names one of the runs of a record.

    Returns:
        The runs, in this order, with different labels: their paths without the folders that all share.

    Raises:
        ImportError: pandas is not installed.
        OSError: a record cannot be read.
        ValueError: not a record, without that run, or a run is named twice.
    """
    load_extra("pandas", "scaling", "a comparison of runs")
    found: list[RecordedRun] = []
    shared = _shared_folder([os.fspath(record).partition("::")[0] for record in records])
    for record in records:
        path, _, run = os.fspath(record).partition("::")
        table = load_compact(find_record(path), UNUSED)
        headers = {str(header["run"]): dict(header) for header in table.attrs["headers"]}
        if run and run not in headers:
            raise ValueError(f"{path}: no run {run!r} in the record; it has: {', '.join(list(headers)[-20:])}")
        chosen = [run] if run else list(headers) if len(records) == 1 else list(headers)[-1:]
        label = path[shared:]
        found += [_run(table, headers[one], f"{label}::{one}" if len(headers) > 1 else label) for one in chosen]
    named: dict[str, str] = {}
    for one in found:
        if one.run in named:
            raise ValueError(f"{one.label} and {named[one.run]} are the same run, {one.run}")
        named[one.run] = one.label
    return found


def _shared_folder(paths: Sequence[str]) -> int:
    """Number of characters of the folders that all paths begin with."""
    folders = [path.split(os.sep)[:-1] for path in paths]
    shared = 0
    while len(paths) > 1 and all(len(own) > shared and own[shared] == folders[0][shared] for own in folders):
        shared += 1
    return len(os.sep.join([*folders[0][:shared], ""])) if shared else 0


def _run(table: Any, header: Mapping[str, Any], label: str) -> RecordedRun:
    layers = tuple(str(name) for name in header.get("layers", []))
    chosen = (table["run"] == header["run"]) & (table["kind"] == "measured") & (table["layer"] < len(layers))
    where = np.asarray(chosen, dtype=bool)
    columns = [q.key for q in QUANTITIES] + [q.error for q in QUANTITIES if q.error]
    return RecordedRun(label, header, layers, make_grid(table, len(layers), columns, where))


def align(runs: Sequence[RecordedRun]) -> AlignedRuns:
    """Finds the layers and measured steps that all runs have.

    Args:
        runs: at least two.

    Returns:
        The runs with their common layers and steps.

    Raises:
        ValueError: fewer than two runs, a run without measured rows, or no common layer or step.
    """
    if len(runs) < 2:
        what = f"only {runs[0].label} with one run" if runs else "none"
        raise ValueError(f"a comparison takes at least two runs, got {what}")
    for run in runs:
        if not len(run.grid.steps):
            raise ValueError(f"{run.label}: the run has no measured rows yet")
    first = runs[0]
    others = [set(run.layers) for run in runs[1:]]
    layers = tuple(name for name in first.layers if all(name in own for own in others))
    if not layers:
        raise ValueError(
            "the runs have no layer in common: " + "; ".join(f"{r.label} has {_some(r.layers)}" for r in runs)
        )
    steps: Array = reduce(np.intersect1d, [run.grid.steps for run in runs])
    if not len(steps):
        raise ValueError(
            "the runs have no measured step in common: "
            + "; ".join(f"{r.label} has {_some([str(step) for step in r.grid.steps])}" for r in runs)
        )
    return AlignedRuns(tuple(runs), layers, steps, tuple(_notes(runs, layers, steps)))


def _notes(runs: Sequence[RecordedRun], layers: Sequence[str], steps: Array) -> list[str]:
    said, common = [], set(layers)
    for run in runs:
        others = [name for name in run.layers if name not in common]
        if others:
            said.append(f"{run.label}: left out {_some(others)}, which not every run has")
        if len(run.grid.steps) > len(steps):
            said.append(f"{run.label}: {len(run.grid.steps) - len(steps)} measured steps left out, not in every run")
        if run.header.get("groups"):
            said.append(f"{run.label}: groups are left out, they are totals of layers")
    for key in _SETTINGS:
        values = [str(run.header.get(key)) for run in runs]
        if len(set(values)) > 1:
            each = [f"{value} in {run.label}" for run, value in zip(runs, values, strict=True)]
            said.append(f"different {key}: {_some(each)}")
    return said


def _some(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
