"""What a piece of Python costs, counted and not timed: the same on every machine and at every load."""

from __future__ import annotations

import contextlib
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

__all__ = ["Cost", "counted"]


@dataclass
class Cost:
    """Calls of Python and C functions; the most memory in bytes that Python and NumPy held at once."""

    calls: int = 0
    peak: int = 0


@contextlib.contextmanager
def counted() -> Iterator[Cost]:
    """Counts what the ``with`` block does; the result is complete after it."""
    cost = Cost()

    def profile(_frame: FrameType, event: str, _argument: Any) -> None:
        cost.calls += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(profile)
    try:
        yield cost
    finally:
        sys.setprofile(None)
        cost.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
