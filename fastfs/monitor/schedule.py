"""When to measure: a pure function of the optimizer step's number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["Every", "Schedule"]


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
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(
                f"every: expected an integer >= 1, the number of steps between measurements, got {self.steps!r}"
            )

    def due(self, step: int) -> bool:
        return step % self.steps == 0
