"""Which steps are measured: a pure function of the number of the optimizer step."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

__all__ = ["Every", "Schedule", "as_schedule"]


@runtime_checkable
class Schedule(Protocol):
    """Tells which optimizer steps are measured; any object with this method will do."""

    def due(self, step: int) -> bool:
        """Tells whether an optimizer step is measured.

        Args:
            step: Number of the step; the first one is 0.

        Returns:
            Whether it is measured.
        """


@dataclass(frozen=True)
class Every:
    """Measures steps 0, ``steps``, 2 ``steps``, ...

    Args:
        steps: Number of optimizer steps between measurements.

    Raises:
        ValueError: If ``steps`` is not an integer of at least 1.
    """

    steps: int

    def __post_init__(self) -> None:
        try:
            steps = 0 if isinstance(self.steps, bool) else operator.index(self.steps)  # also accepts integers of NumPy
        except TypeError:
            steps = 0
        if steps < 1:
            raise ValueError(
                f"every: expected an integer >= 1, the number of steps between measurements, got {self.steps!r}"
            )
        object.__setattr__(self, "steps", steps)

    def due(self, step: int) -> bool:
        """Tells whether an optimizer step is measured.

        Args:
            step: Number of the step; the first one is 0.

        Returns:
            Whether ``step`` is a multiple of ``steps``.
        """
        return step % self.steps == 0


def as_schedule(every: Any) -> Schedule:
    """Returns a schedule unchanged, and an integer as :class:`Every`.

    Raises:
        ValueError: The argument is neither, or an integer below 1.
    """
    if isinstance(every, Schedule) and not isinstance(every, type):
        return every
    return Every(every)
