"""Which parts of different ranks belong together."""

from __future__ import annotations

from collections.abc import Iterable

from fastfs._record.ranks.part import RankPart

__all__ = ["FIRST", "Key", "PartKeys"]

Key = tuple[int, bool]
"""Of a step and what comes before it, see :attr:`RankPart.key`."""

FIRST: Key = (-1, False)
"""Comes before every other key."""


class PartKeys:
    """Follows the keys of the parts of ranks, each of which sends its own in order.

    Args:
        ranks: Numbers of the ranks.

    Attributes:
        last: By rank, the key of its last part.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self.last: dict[int, Key] = dict.fromkeys(ranks, FIRST)

    def of(self, rank: int, part: RankPart) -> Key | None:
        """Returns the key of the next part of a rank; None if it has sent one with this key: what failed after it."""
        if part.key == self.last[rank]:
            return None
        self.last[rank] = part.key
        return part.key
