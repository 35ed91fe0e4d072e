"""When to measure: a pure function of the optimizer step's number."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

__all__ = ["Every", "Schedule", "as_schedule"]


@runtime_checkable
class Schedule(Protocol):
    """Anything that says whether the optimizer step with this number (the first is 0) is to be measured."""

    def due(self, step: int) -> bool: ...


@dataclass(frozen=True)
class Every:
    """Steps 0, ``steps``, 2 ``steps``, ...

    Raises:
        ValueError: ``steps`` is not an integer of at least 1.
    """

    steps: int

    def __post_init__(self) -> None:
        try:
            steps = 0 if isinstance(self.steps, bool) else operator.index(self.steps)  # NumPy's integers, too
        except TypeError:
            steps = 0
        if steps < 1:
            raise ValueError(
                f"every: expected an integer >= 1, the number of steps between measurements, got {self.steps!r}"
            )
        object.__setattr__(self, "steps", steps)

    def due(self, step: int) -> bool:
        return step % self.steps == 0


def as_schedule(every: Any) -> Schedule:
    """A schedule as it is, an integer as :class:`Every`.

    Raises:
        ValueError: neither, or an integer below 1.
    """
    if isinstance(every, Schedule) and not isinstance(every, type):
        return every
    return Every(every)
