"""The page of several runs, of ``fastfs diff`` and ``fastfs report``: heat maps side by side, and their differences."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastfs._compare.measures import MEASURES, Measure
from fastfs._compare.result import ALL_LAYERS, RunComparison
from fastfs._compare.runs import AlignedRuns, RecordedRun, align
from fastfs._record.reading.confidence import LARGEST_FACTOR, SHARE, WINDOW
from fastfs._report.grids import Grid, Thinned, empty_grid, thin
from fastfs._report.page import header_facts, packed, render, room
from fastfs._report.quantities import QUANTITIES, Quantity
from fastfs._utils.output_files import write_whole

__all__ = ["comparison_page", "write_comparison"]

_MOST_RUNS = 8


def write_comparison(runs: Sequence[RecordedRun], comparison: RunComparison, out: str | os.PathLike[str]) -> int:
    """Writes the page of a comparison atomically.

    Args:
        runs: of both sides.
        comparison: of these runs.
        out: path of the page; its folder is created if missing.

    Returns:
        The size of the page in bytes.

    Raises:
        OSError: the page cannot be written.
        ValueError: ``out`` exists and is not a regular file.
    """
    page = comparison_page(runs, comparison).encode("utf-8")
    write_whole(out, page)
    return len(page)


def comparison_page(runs: Sequence[RecordedRun], comparison: RunComparison) -> str:
    """Builds the page.

    Args:
        runs: of both sides; the first eight are drawn.
        comparison: of these runs.

    Returns:
        The page as HTML.
    """
    aligned = align(runs)
    aligned = dataclasses.replace(aligned, runs=aligned.runs[:_MOST_RUNS])
    measures = sorted(MEASURES, key=lambda one: (one.over is not None, QUANTITIES.index(one.quantity)))
    columns = {one.key: one.raw(aligned, valid=False).astype(np.float32) for one in measures}
    shown = [one for one in measures if np.isfinite(columns[one.key]).any()]
    grids = [_grid(aligned, i, {one.key: columns[one.key][i] for one in shown}) for i in range(len(aligned.runs))]
    any_invalid = dataclasses.replace(grids[0], invalid=np.any([grid.invalid for grid in grids], axis=0))
    kept = thin(any_invalid, room(len(aligned.layers), len(shown) * len(grids)))
    quantities = [_quantity(one) for one in shown]
    parts = [packed(grid, _own(kept, grid), quantities) for grid in grids]
    nothing = empty_grid(len(aligned.layers))
    labels = [run.label for run in aligned.runs]
    notes = list(comparison.notes)
    if len(runs) > _MOST_RUNS:
        notes.append(f"the first {_MOST_RUNS} of {len(runs)} runs are drawn")
    if len(kept.index) < len(aligned.steps):
        notes.append(f"{len(kept.index):,} of {len(aligned.steps):,} steps are drawn, as recorded; all were compared")
    data = {
        "title": ", ".join(labels) if len(labels) < 4 else f"{len(runs)} runs",
        "labels": labels,
        "verdict": str(comparison).split("\n"),
        "notes": notes,
        "rows": [{"name": name, "group": False, "cut": None} for name in aligned.layers],
        "measured": parts[0],
        "others": parts[1:],
        "predicted": {**packed(nothing, thin(nothing, 1), []), "withheld": ""},
        "confidence": {"share": SHARE, "largest": LARGEST_FACTOR, "window": WINDOW},
        "alerts": [],
        "partings": [
            {**dataclasses.asdict(one), "all": one.layer == ALL_LAYERS, "said": str(one)} for one in comparison.partings
        ],
        "losses": [
            {"steps": aligned.steps.tolist(), "values": [None if np.isnan(v) else float(f"{v:.6g}") for v in losses]}
            for losses in aligned.losses()
        ],
        "facts": _facts(aligned),
    }
    return render(data, "compare.html")


def _grid(aligned: AlignedRuns, run: int, columns: dict[str, np.ndarray[Any, Any]]) -> Grid:
    own = aligned.runs[run]
    where = aligned.places(own)
    grid = own.grid
    nothing = np.full(len(aligned.steps), np.nan)
    return Grid(aligned.steps, nothing, nothing, nothing, columns, grid.invalid[where], grid.why[where], grid.reasons)


def _own(kept: Thinned, grid: Grid) -> Thinned:
    """The shown steps, with the cells that are not valid in this run."""
    return dataclasses.replace(kept, invalid=grid.invalid[:, kept.index].astype(np.uint16))


def _quantity(measure: Measure) -> Quantity:
    about = measure.quantity.about if measure.over is None else f"{measure.label}: the ratio of two norms of the layer."
    unit = measure.quantity.unit if measure.over is None else "ratio"
    return dataclasses.replace(
        measure.quantity, key=measure.key, label=measure.label, about=about, unit=unit, error=None
    )


def _facts(aligned: AlignedRuns) -> list[list[str]]:
    """Rows of the table of settings: name, then the text of each run; those that differ first."""
    each = [{key: text for key, text in header_facts(run.header)} for run in aligned.runs]  # noqa: C416 - lists of two
    keys = list(dict.fromkeys(key for facts in each for key in facts))
    rows = [[key, *(facts.get(key, "-") for facts in each)] for key in keys]
    return sorted(rows, key=lambda row: len(set(row[1:])) == 1)
