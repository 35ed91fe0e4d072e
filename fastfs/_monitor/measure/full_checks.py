"""When contents are looked at in full, and when the last full look may be relied on."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

__all__ = ["FIRST", "PERIOD", "Flag", "Occasions", "both"]

FIRST = 4
"""Steps that are looked at in full at the beginning, and after anything has changed."""

PERIOD = 16
"""From then on every so many-th step is."""


class Flag:
    """A bool of a device that the host learns of later, without waiting.

    Args:
        value: bool (), on any device; or a bool.
    """

    def __init__(self, value: Tensor | bool) -> None:
        self._event: torch.cuda.Event | None = None
        self._host: Tensor | bool | None = value
        if isinstance(value, Tensor) and not value.is_cpu:
            self._host = None  # of other devices it is never known
            if value.is_cuda:
                self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
                self._host.copy_(value, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record(torch.cuda.current_stream(value.device))

    def known(self) -> bool | None:
        """The value, once it has arrived."""
        if self._host is None or (self._event is not None and not self._event.query()):
            return None
        return bool(self._host)


class Occasions:
    """Which steps are looked at in full: the first ones, those after a change, then every ``PERIOD``-th.

    Steps count as first ones until ``FIRST`` of them in a row were as they should be. As long as it is not known
    whether the last one was, the next is looked at in full, too.
    """

    def __init__(self) -> None:
        self._good = 0  # full looks in a row that were
        self._since = 0  # steps since the last full look
        self._flags: deque[Flag] = deque()
        self._doubts: deque[Flag] = deque()

    def again(self) -> None:
        """Something has changed: begin anew."""
        self._good = self._since = 0
        self._flags.clear()
        self._doubts.clear()

    def looked(self, good: Tensor | bool) -> None:
        """A step was looked at in full; whether the next ones may rely on it."""
        self._since = 0
        self._flags.append(Flag(good))
        while len(self._flags) > FIRST:  # on a device of which nothing is ever known
            self._flags.popleft()

    def relied(self) -> None:
        """A step has relied on the last full look."""
        self._since += 1

    def told(self, good: Tensor) -> None:
        """Whether what a step has relied on was right, once that is known."""
        self._doubts.append(Flag(good))
        while len(self._doubts) > PERIOD:
            self._doubts.popleft()

    def due(self) -> bool:
        """Whether the coming step is to be looked at in full."""
        while self._doubts and (known := self._doubts[0].known()) is not None:
            self._doubts.popleft()
            if not known:
                self.again()
        while self._flags:
            known = self._flags[0].known()
            if known is None:
                return True
            self._flags.popleft()
            self._good = self._good + 1 if known else 0
        return self._good < FIRST or self._since >= PERIOD - 1


def both(a: Tensor | bool, b: Tensor | bool) -> Tensor | bool:
    """Whether two things hold, of which each may be known on a device only."""
    if a is False or b is False:
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.logical_and(b.to(a.device, non_blocking=True))
    return a if isinstance(a, Tensor) else b
