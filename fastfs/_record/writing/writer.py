"""The background thread, which takes batches from the ring, decodes them, checks alert rules and writes to sinks.

    training thread                    | writer thread
    push, put --> ring (bounded) ------|--> swap, fetch, decode --> collector --> alerts --> queues (bounded) --> sinks
    poll <-- messages (bounded) <------|----------- of all ranks ---------------------------'

Errors in the writer thread do not affect training: any exception of a sink or a rule, including ``SystemExit`` and the
panic of a Rust extension, becomes a message. If a sink hangs, the ring fills up, and records are dropped and counted.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastfs._record.columns import PART
from fastfs._record.exception_text import exception_text
from fastfs._record.ranks.exchange import Collector
from fastfs._record.record import Record
from fastfs._record.writing.alerts import Alerts
from fastfs._record.writing.interruptible_lock import InterruptibleLock
from fastfs._record.writing.ring import Batch, Decode, Ring
from fastfs._record.writing.sink_queue import SinkQueue

__all__ = ["Message", "Writer"]

Message = str | Record
"""For the training thread: a warning, or an alert."""

_ONCE = "This warning is shown once."
_LAST_TRIES = 4  # attempts at the end; enough to drop a record that cannot be written


class Writer:
    """Owns the thread. It holds no reference to the :class:`Recorder` that feeds it, so that this can be collected.

    Args:
        ring: queue of payloads.
        collector: makes records of what the ranks of the run contribute.
        queues: one per sink, in order.
        alerts: rules of the run.
        messages: queue of warnings and alerts for the training thread.
        flush_seconds: the longest time that a payload waits in the ring.
    """

    def __init__(
        self,
        ring: Ring,
        collector: Collector,
        queues: Sequence[SinkQueue],
        alerts: Alerts,
        messages: deque[Message],
        flush_seconds: float,
    ) -> None:
        self.queues = tuple(queues)
        self.alerts = alerts
        self.messages = messages
        self.dropped = 0  # in total, because the ring was full
        self.unclosed: list[str] = []
        self._ring = ring
        self._collector = collector
        self._flush_seconds = flush_seconds
        self._lock = InterruptibleLock()
        self._condition = threading.Condition(self._lock.inner)
        self._flushes_requested = 0
        self._flushes_done = 0
        self._stopping = False
        self._unreported = 0  # records dropped since the last batch
        self._last_step = 0
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="fastfs-writer", daemon=True)
        self._thread.start()

    # Called by the training thread

    def push(self, payload: Tensor, decode: Decode) -> None:
        with self._lock:
            self._check_open()
            self._added(self._ring.push(payload, decode))

    def put(self, record: Any) -> None:
        with self._lock:
            self._check_open()
            self._added(self._ring.put(record))

    def reopen(self, header: Mapping[str, Any]) -> None:
        """Opens the sinks with another header. Called before the first record."""
        with self._lock:
            for queue in self.queues:
                queue.sink.open(header)
            self.alerts.header = dict(header)

    def flush(self, timeout: float) -> bool:
        """Waits until the sinks have everything. Returns False after the timeout or if a sink failed."""
        if not self._thread.is_alive():
            return not any(map(len, self.queues))
        with self._lock:
            self._flushes_requested += 1
            own = self._flushes_requested
            self._condition.notify_all()
            finished = self._condition.wait_for(lambda: self._flushes_done >= own, timeout)
        return finished and not any(len(queue) or queue.error for queue in self.queues)

    def discard(self) -> None:
        """Makes the sinks remove what they created instead of closing."""
        for queue in self.queues:
            queue.discarded = True

    def stop(self, timeout: float) -> bool:
        """Writes everything, closes the sinks and ends the thread. Returns False if it has not ended in time."""
        with self._lock:
            self._stopping = True
            self._condition.notify_all()
        if threading.current_thread() is self._thread:  # the garbage collector runs in this thread
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def waiting(self) -> int:
        """Number of records that at least one sink does not have yet."""
        return len(self._ring) + max((len(queue) for queue in self.queues), default=0)

    def _check_open(self) -> None:
        if self._stopping:
            raise ValueError("this recorder is closed")

    def _added(self, taken: bool) -> None:
        if not taken:
            self.dropped += 1
            self._unreported += 1
            self._warn(
                "dropped",
                "fastfs.Monitor: rows are dropped because the sinks are too slow (one may hang). Training goes on, and "
                f"the record will say how many. {_ONCE}",
            )
        if len(self._ring) == 1 or self._ring.half_full:
            self._condition.notify_all()

    # Called by the writer thread

    def _run(self) -> None:
        going = True
        while going:
            try:
                going = self._turn()  # a separate call, so that the last batch is released while this thread sleeps
            except BaseException as error:  # for example out of memory
                self._warn("turn", f"fastfs.Monitor: rows are lost ({exception_text(error)}). {_ONCE}")
                going = not self._stopping
                time.sleep(0.1)
        self.unclosed = [failure for queue in self.queues if (failure := queue.close()) is not None]

    def _turn(self) -> bool:
        """Waits until there is something to do and does it. Returns False at the end."""
        with self._lock:
            while (pause := self._pause()) is None or pause > 0:
                self._condition.wait(pause)
            stopping, requested = self._stopping, self._flushes_requested
            force = stopping or requested > self._flushes_done
            since = self._ring.since
            due = since is not None and time.monotonic() >= since + self._flush_seconds
            batch = self._ring.swap() if force or due or self._ring.half_full else None
            unreported = 0
            if batch is not None:
                unreported, self._unreported = self._unreported, 0
        records = self._with_alerts(self._collected(batch, force=force, last=stopping), unreported)
        for queue in self.queues:
            queue.add(records)
            for _ in range(_LAST_TRIES if stopping else 1):
                queue.run(force=force, settle=force)
                if not len(queue) and queue.error is None:
                    break
        with self._lock:
            self._flushes_done = max(self._flushes_done, requested)
            self._condition.notify_all()
            return not stopping or len(self._ring) > 0

    def _collected(self, batch: Batch | None, *, force: bool, last: bool) -> list[Record]:
        """Returns the records that a batch makes possible, with what other ranks have sent."""
        records: list[Record] = []
        try:
            if batch is not None:
                records += self._collector.take(self._items(batch))
            records += self._collector.collect(force=force, last=last)
        except BaseException as error:
            self._warn("collect", f"fastfs.Monitor: rows are lost ({exception_text(error)}). {_ONCE}")
        return records

    def _items(self, batch: Batch) -> list[Any]:
        records: list[Any] = []
        try:
            host = self._ring.fetch(batch)
            for entry in batch.entries:
                records += self._decoded(entry.decode, host[entry.start : entry.stop], entry.record)
        except BaseException as error:
            self._warn("fetch", f"fastfs.Monitor: rows are lost ({exception_text(error)}). {_ONCE}")
        with self._lock:
            self._ring.give_back(batch)
        return records

    def _pause(self) -> float | None:
        """Seconds until there is something to do; None for no limit. Called with the lock held."""
        requested = self._stopping or self._flushes_requested > self._flushes_done
        if requested or (len(self._ring) and self._ring.half_full):
            return 0.0
        times = [due for queue in self.queues if (due := queue.due_at()) is not None]
        if (due := self._collector.due_at()) is not None:
            times.append(due)
        if self._ring.since is not None:
            times.append(self._ring.since + self._flush_seconds)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _decoded(self, decode: Decode | None, payload: Tensor, record: Any) -> list[Any]:
        if decode is None:
            return [] if record is None else [record]
        try:
            return list(decode(payload))
        except BaseException as error:
            self._warn(
                "decode",
                f"fastfs.Monitor: a measured row could not be decoded and is lost ({exception_text(error)}). {_ONCE}",
            )
            return []

    def _with_alerts(self, records: list[Record], unreported: int) -> list[Record]:
        result: list[Record] = []
        for record in records:
            result.append(record)
            raised, failures = ([], []) if record.kind == PART else self.alerts.update(record)
            result += raised
            self.messages.extend(raised)
            for name, error in failures:
                self._warn(
                    f"rule {name}",
                    f"fastfs.Monitor: alert rule {name} failed ({exception_text(error)}). {_ONCE}",
                )
        if records:
            self._last_step = records[-1].step
        if unreported:
            message = f"{unreported} records were dropped here: the sinks did not keep up"
            scalars = {"rule": "dropped", "layer": None, "value": float(unreported), "message": message}
            result.append(Record("alert", self._last_step, time.time(), scalars))
        return result

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self.messages.append(text)
