"""Which parts of different ranks belong together."""

from __future__ import annotations

from collections.abc import Iterable

from fastfs._record.ranks.part import RankPart

__all__ = ["FIRST", "Key", "PartKeys"]

Key = tuple[int, int]
"""Number of a step, and which of the parts of that step it is: a step may have several."""

FIRST: Key = (-1, 0)
"""Comes before every other key."""


class PartKeys:
    """Gives keys to the parts of ranks, each of which sends its own in order.

    Args:
        ranks: Numbers of the ranks.

    Attributes:
        last: By rank, the key of its last part.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self.last: dict[int, Key] = dict.fromkeys(ranks, FIRST)
        self._rows: dict[int, int] = {}  # by rank, the step of the last row

    def of(self, rank: int, part: RankPart) -> Key | None:
        """Returns the key of the next part of a rank; None if it says what has failed after the row of its step."""
        if part.kind != "skipped":
            self._rows[rank] = part.step
        elif self._rows.get(rank) == part.step:
            return None
        step, count = self.last[rank]
        self.last[rank] = key = (part.step, count + 1 if part.step == step else 0)
        return key
