"""The alert rule for a rank whose batches stand apart from those of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastfs._record.record import Record
from fastfs._record.schema import row_names
from fastfs._record.writing.alert_rule import Finding, Findings

__all__ = ["RankApart"]

_RUNS = 8  # of which one rule keeps who stood apart
_NAMED = 3  # layers in a message

Places = frozenset[tuple[str, int]]


@dataclass(eq=False)
class RankApart:
    """The same rank stands apart from the others at a layer, ``rank_apart``, in ``steps`` consecutive measured steps.

    Its batches differ from those of the other ranks in angle, speed, backward or feature size: its part of the data is
    broken, or its loss is scaled in another way. The alert belongs to no layer; its value is the number of the rank.

    Args:
        steps: Number of consecutive records.
        name: Name of the rule in alerts.
    """

    steps: int = 3
    name: str = "rank apart"
    _kept: dict[str, Places] = field(default_factory=dict, init=False, repr=False)

    def check(self, record: Record, header: Mapping[str, Any]) -> Findings:
        column = record.columns.get("rank_apart")
        if record.kind != "measured" or column is None:
            return {}
        names, layers = row_names(header)
        found = frozenset((name, int(x)) for name, x in zip(names[:layers], column, strict=False) if x is not None)
        run = str(header.get("run"))
        before = self._kept.pop(run, None)
        still = found & before if before else found
        self._kept[run] = still or found
        while len(self._kept) > _RUNS:
            del self._kept[next(iter(self._kept))]
        if not still:  # another rank or layer, if any, begins a new row with the next record
            return {None: None}
        return {None: _finding(still, names)}


def _finding(places: Places, names: list[str]) -> Finding:
    """Names the rank that stands apart at most layers."""
    by_rank: dict[int, list[str]] = {}
    for layer, rank in sorted(places, key=lambda place: names.index(place[0])):
        by_rank.setdefault(rank, []).append(layer)
    rank = max(by_rank, key=lambda rank: (len(by_rank[rank]), -rank))
    where = by_rank[rank]
    text = ", ".join(map(repr, where[:_NAMED])) + (f" and {len(where) - _NAMED} more" if len(where) > _NAMED else "")
    return Finding(
        float(rank),
        f"rank {rank} stands apart from the other ranks at {text}: its data or its loss differs from theirs",
    )
