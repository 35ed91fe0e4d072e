"""What differs between the ranks of a run, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastfs._report.grids import Array, Grid

__all__ = ["apart_text", "card", "findings"]

_STEPS = 3  # measured steps in a row in which a rank has to stand apart, as the alert rule has it
_NAMED = 3


def apart_text(names: Sequence[str], apart: Sequence[tuple[int, int]]) -> str:
    """Names the rank that stands apart at most layers, and the layers.

    Args:
        names: of layers and groups.
        apart: layers, and the rank that stands apart there.

    Returns:
        The text; empty if there is none.
    """
    layers: dict[int, list[int]] = {}
    for layer, rank in apart:
        layers.setdefault(rank, []).append(layer)
    if not layers:
        return ""
    rank = max(layers, key=lambda rank: (len(layers[rank]), -rank))
    where = layers[rank]
    more = f" and {len(where) - _NAMED:,} more" if len(where) > _NAMED else ""
    return f"rank {rank} stands apart at {', '.join(names[i] for i in where[:_NAMED])}{more}"


def card(header: Mapping[str, Any], measured: Grid, predicted: Grid) -> list[tuple[str, str, str]]:
    """Returns label, value and note of the box of a run of several ranks; none for another run."""
    total = _total(header)
    if total < 2:
        return []
    steps, ranks = _present(measured, predicted)
    since = _missing_since(steps, ranks, total)
    if since is not None:
        return [("Ranks", f"{int(ranks[-1]):,} of {total:,}", f"since step {since:,}")]
    fewer = int((ranks < total).sum())
    return [("Ranks", f"{total:,}", f"all of them in all but {fewer:,} rows" if fewer else "all of them in every row")]


def findings(
    header: Mapping[str, Any], names: Sequence[str], layers: int, measured: Grid, predicted: Grid
) -> list[str]:
    """Says which ranks are missing, and which stand apart from the others.

    Args:
        header: of the run.
        names: of layers and groups.
        layers: number of layers.
        measured: its rows.
        predicted: its rows.

    Returns:
        Sentences; none for a run of one rank.
    """
    total = _total(header)
    if total < 2:
        return []
    said = []
    steps, ranks = _present(measured, predicted)
    since = _missing_since(steps, ranks, total)
    if since is not None:
        said.append(f"The numbers are those of {int(ranks[-1]):,} of {total:,} ranks since step {since:,}.")
    elif (ranks < total).any():
        at = int(np.argmin(ranks))
        said.append(
            f"Ranks are missing in {int((ranks < total).sum()):,} of {len(ranks):,} rows, most at step {steps[at]:,} "
            f"({int(ranks[at]):,} of {total:,} ranks)."
        )
    return said + _apart(names, layers, measured)


def _apart(names: Sequence[str], layers: int, measured: Grid) -> list[str]:
    """Names every rank that stood apart at the same layer in three measured steps in a row, the worst ones first."""
    if measured.apart is None or measured.apart.shape[1] < _STEPS:
        return []
    apart = measured.apart[:layers]
    windows = np.lib.stride_tricks.sliding_window_view(apart, _STEPS, axis=1)
    lasting = (windows == windows[:, :, :1]).all(axis=2)  # NaN equals nothing
    found = []
    for rank in np.unique(windows[lasting][:, 0]).tolist() if lasting.any() else []:
        where = lasting & (windows[:, :, 0] == rank)
        at = np.flatnonzero(where.any(axis=0))
        ends = at[0], at[-1] + _STEPS - 1
        text = apart_text(names, [(i, int(rank)) for i in np.flatnonzero(where.any(axis=1)).tolist()])
        first, last = (int(measured.steps[i]) for i in ends)
        found.append((int(where.sum()), f"{text[0].upper()}{text[1:]}, between steps {first:,} and {last:,}."))
    return [sentence for _, sentence in sorted(found, reverse=True)[:_NAMED]]


def _total(header: Mapping[str, Any]) -> int:
    value = header.get("ranks")
    return value if type(value) is int else 1


def _present(measured: Grid, predicted: Grid) -> tuple[Array, Array]:
    """Returns the steps whose number of ranks is known, in order, and these numbers."""
    grids = [grid for grid in (measured, predicted) if grid.ranks is not None]
    steps = np.concatenate([np.empty(0, np.int64), *(grid.steps for grid in grids)])
    ranks = np.concatenate([np.empty(0), *(grid.ranks for grid in grids if grid.ranks is not None)])
    order = np.argsort(steps, kind="stable")
    known = np.isfinite(ranks[order])
    return steps[order][known], ranks[order][known]


def _missing_since(steps: Array, ranks: Array, total: int) -> int | None:
    """Returns the step since which ranks are missing; None if the last row has all."""
    if not len(ranks) or ranks[-1] >= total:
        return None
    whole = np.flatnonzero(ranks >= total)
    return int(steps[whole[-1] + 1 if len(whole) else 0])
