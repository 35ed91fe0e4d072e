"""When the contents of tensors are compared in full, and when cheaper checks on the host replace that."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

__all__ = ["FIRST", "PERIOD", "DeviceFlag", "FullCheckSchedule", "both"]

FIRST = 4
"""Number of full checks at the beginning, and after anything has changed."""

PERIOD = 16
"""From then on every so many-th step is checked in full."""


class DeviceFlag:
    """A bool on a device whose value the host gets later, without waiting.

    Args:
        value: A bool, or a tensor bool () on any device.
    """

    def __init__(self, value: Tensor | bool) -> None:
        self._event: torch.cuda.Event | None = None
        self._host: Tensor | bool | None = value
        if isinstance(value, Tensor) and not value.is_cpu:
            self._host = None  # never known, unless the device is a CUDA device
            if value.is_cuda:
                self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
                self._host.copy_(value, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record(torch.cuda.current_stream(value.device))

    def known(self) -> bool | None:
        """Returns the value, None as long as it has not arrived."""
        if self._host is None or (self._event is not None and not self._event.query()):
            return None
        return bool(self._host)


class FullCheckSchedule:
    """Decides which steps are checked in full: the first ones, those after a change, then every `PERIOD`-th.

    Full checks go on until `FIRST` of them in a row have passed, and as long as the result of the last one is not
    known. In between steps are checked on the host alone.
    """

    def __init__(self) -> None:
        self._passed = 0  # full checks in a row
        self._since = 0  # steps since the last full check
        self._results: deque[DeviceFlag] = deque()
        self._late_results: deque[DeviceFlag] = deque()

    def restart(self) -> None:
        """Begins anew, since something has changed."""
        self._passed = self._since = 0
        self._results.clear()
        self._late_results.clear()

    def record_full_check(self, passed: Tensor | bool) -> None:
        """Records that a step was checked in full, and whether the next ones can do without."""
        self._since = 0
        self._results.append(DeviceFlag(passed))
        while len(self._results) > FIRST:  # on a device from which nothing ever arrives
            self._results.popleft()

    def record_host_check(self) -> None:
        """Records that a step was checked on the host alone."""
        self._since += 1

    def record_late_result(self, passed: Tensor) -> None:
        """Records whether a step that was checked on the host alone was right, once a device has told."""
        self._late_results.append(DeviceFlag(passed))
        while len(self._late_results) > PERIOD:
            self._late_results.popleft()

    def due(self) -> bool:
        """Returns whether the coming step has to be checked in full."""
        while self._late_results and (known := self._late_results[0].known()) is not None:
            self._late_results.popleft()
            if not known:
                self.restart()
        while self._results:
            known = self._results[0].known()
            if known is None:
                return True
            self._results.popleft()
            self._passed = self._passed + 1 if known else 0
        return self._passed < FIRST or self._since >= PERIOD - 1


def both(a: Tensor | bool, b: Tensor | bool) -> Tensor | bool:
    """Returns whether two conditions hold, each of which may be known on a device only."""
    if a is False or b is False:
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.logical_and(b.to(a.device, non_blocking=True))
    return a if isinstance(a, Tensor) else b
