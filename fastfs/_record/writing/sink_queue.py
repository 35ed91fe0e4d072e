"""A sink with the records that it has not accepted yet."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from fastfs._record.exception_text import exception_text
from fastfs._record.record import Record
from fastfs._record.sinks.protocol import PartlyWrittenError, Sink

__all__ = ["SinkQueue"]

_TRIES = 3
_LONGEST_PAUSE = 60.0


class SinkQueue:
    """Writes records to a sink, and keeps those that the sink failed to accept for later attempts.

    Pauses between attempts grow. After a failure, records are written one by one, so that one that cannot be written
    does not hold up the others. An ``OSError`` (a full disk, a network) may be temporary and is retried without limit;
    a record that fails three times with another error is dropped. When the backlog is full, its oldest records are
    dropped. All exceptions of the sink are caught, including ``SystemExit`` and others that do not derive from
    ``Exception``: they affect neither the other sinks nor the thread.

    Args:
        sink: opened.
        most_values: capacity of the backlog in numbers (about 32 bytes each).
        retry_seconds: first pause before a retry; doubles up to a minute.
        warn: passes a warning to the training thread.
    """

    def __init__(self, sink: Sink, most_values: int, retry_seconds: float, warn: Callable[[str], None]) -> None:
        self.sink = sink
        self.name = type(sink).__name__
        self.lost = 0
        self.discarded = False  # attaching failed: the sink removes what it created
        self.error: BaseException | None = None  # the last one, until a call succeeds
        self._flush: Callable[[], object] | None = getattr(sink, "flush", None)
        self._due: Callable[[], float | None] | None = getattr(sink, "due", None)
        self._backlog: deque[Record] = deque()
        self._values = 0
        self._most_values = most_values
        self._retry_seconds = self._pause = retry_seconds
        self._retry_at = 0.0
        self._singly = 0  # number of records to be written one by one
        self._tries = 0  # failed attempts to write the first of these
        self._warned = False
        self._warn = warn

    def __len__(self) -> int:
        """Number of waiting records."""
        return len(self._backlog)

    def add(self, records: Sequence[Record]) -> None:
        for record in records:
            self._backlog.append(record)
            self._values += record.size
        while self._values > self._most_values and len(self._backlog) > 1:
            self._remove(1)
            self.lost += 1

    def due_at(self) -> float | None:
        """Time at which :meth:`run` has something to do, by ``time.monotonic()``; None if it has nothing to do."""
        times = []
        if self._backlog:
            times.append(self._retry_at)
        due = self._sink_due()
        if due is not None:
            times.append(max(due, self._retry_at))
        return min(times, default=None)

    def run(self, *, force: bool = False, settle: bool = False) -> None:
        """Writes the waiting records.

        Args:
            force: whether to write even during a pause between attempts.
            settle: whether to flush the sink afterwards.
        """
        now = time.monotonic()
        if now < self._retry_at and not force:
            return
        if self._backlog and not self._write():
            return
        due = self._sink_due()
        if self._flush is not None and (settle or (due is not None and due <= now)):
            try:
                self._flush()
            except BaseException as error:
                self._failed(error, " to flush")
            else:
                self._succeeded()

    def close(self) -> str | None:
        """Closes the sink. Returns the error as text, if there is one."""
        try:
            if self.discarded:
                getattr(self.sink, "discard", self.sink.close)()
            else:
                self.sink.close()
        except BaseException as error:
            return f"{self.name} ({exception_text(error)})"
        return None

    def _sink_due(self) -> float | None:
        if self._due is None or self._flush is None:
            return None
        try:
            due = self._due()
            return None if due is None else float(due)
        except BaseException as error:
            self._due = None
            self._failed(error, " in due()")
            return None

    def _write(self) -> bool:
        while self._backlog:
            part = list(islice(self._backlog, 1 if self._singly else None))
            try:
                self.sink.write(part)
            except BaseException as error:
                done = min(error.written, len(part)) if isinstance(error, PartlyWrittenError) else 0
                self._remove(done)
                self._failed(error, f" at step {part[min(done, len(part) - 1)].step}")
                self._tries = self._tries + 1 if self._singly else 0
                self._singly = self._singly or len(part) - done
                if self._tries < _TRIES or isinstance(error, OSError):
                    return False
                self._remove(1)  # dropped
                self.lost += 1
                self._singly -= 1
                self._tries = 0
                continue
            self._remove(len(part))
            self._singly = max(0, self._singly - 1)
            self._tries = 0
            self._succeeded()
        return True

    def _remove(self, count: int) -> None:
        for _ in range(count):
            self._values -= self._backlog.popleft().size

    def _succeeded(self) -> None:
        self._pause, self._retry_at, self.error = self._retry_seconds, 0.0, None

    def _failed(self, error: BaseException, what: str) -> None:
        self._retry_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, max(_LONGEST_PAUSE, self._retry_seconds))
        self.error = error
        if not self._warned:
            self._warned = True
            self._warn(
                f"fastfs.Monitor: {self.name} failed{what} ({exception_text(error)}); its rows are "
                "kept and written again later, and training goes on. This warning is shown once."
            )

    def report(self) -> dict[str, Any]:
        """Returns counts, for tests and messages."""
        return {"sink": self.name, "waiting": len(self._backlog), "lost": self.lost, "values": self._values}
