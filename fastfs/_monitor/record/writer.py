"""The background thread: takes batches out of the ring, makes records of them, looks for alerts, writes.

    training thread                    | writer thread
    push, put --> ring (bounded) ------|--> swap, fetch, decode --> alerts --> outlets (bounded) --> sinks
    poll <-- messages (bounded) <------|-------------------------------------------'

Nothing that happens in the writer thread reaches training: whatever a sink or a rule raises, ``SystemExit`` or the
panic of a Rust extension included, becomes a message, and a thread that hangs in a sink lets the ring run full, from
when on records are dropped and counted.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastfs._monitor.record.alerts import Alerts
from fastfs._monitor.record.exception_text import in_words
from fastfs._monitor.record.interruptible_lock import Lock
from fastfs._monitor.record.record import Record
from fastfs._monitor.record.ring import Batch, Decode, Ring
from fastfs._monitor.record.sink_queue import Outlet

__all__ = ["Message", "Writer"]

Message = str | Record
"""For the training thread: a warning, or an alert."""

_LAST_TRIES = 4  # at the end; enough to get past a record that cannot be written


class Writer:
    """Owns the thread. Holds no reference to the :class:`fastfs._monitor.record.Recorder` that feeds it.

    Args:
        ring: where payloads wait.
        outlets: the sinks, in order.
        alerts: the rules.
        messages: what the training thread is to be told.
        flush_seconds: how long a payload may wait in the ring.
    """

    def __init__(
        self,
        ring: Ring,
        outlets: Sequence[Outlet],
        alerts: Alerts,
        messages: deque[Message],
        flush_seconds: float,
    ) -> None:
        self.outlets = tuple(outlets)
        self.alerts = alerts
        self.messages = messages
        self.dropped = 0  # in all, for want of room in the ring
        self.unclosed: list[str] = []
        self._ring = ring
        self._flush_seconds = flush_seconds
        self._lock = Lock()
        self._condition = threading.Condition(self._lock.inner)
        self._asked = 0  # flushes that were asked for, and done
        self._done = 0
        self._stopping = False
        self._untold = 0  # dropped since the last batch
        self._last_step = 0
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="fastfs-writer", daemon=True)
        self._thread.start()

    # The training thread

    def push(self, payload: Tensor, decode: Decode) -> None:
        with self._lock:
            self._check()
            self._note(self._ring.push(payload, decode))

    def put(self, record: Record) -> None:
        with self._lock:
            self._check()
            self._note(self._ring.put(record))

    def reopen(self, header: Mapping[str, Any]) -> None:
        """Give the sinks another header, before the first record."""
        with self._lock:
            for outlet in self.outlets:
                outlet.sink.open(header)
            self.alerts.header = dict(header)

    def flush(self, timeout: float) -> bool:
        """Wait until everything is with the sinks; False if that did not happen in time or a sink failed."""
        if not self._thread.is_alive():
            return not any(map(len, self.outlets))
        with self._lock:
            self._asked += 1
            mine = self._asked
            self._condition.notify_all()
            answered = self._condition.wait_for(lambda: self._done >= mine, timeout)
        return answered and not any(len(outlet) or outlet.error for outlet in self.outlets)

    def discard(self) -> None:
        """At the end the sinks take back what they made."""
        for outlet in self.outlets:
            outlet.discarded = True

    def stop(self, timeout: float) -> bool:
        """Write everything, close the sinks, end the thread; False if it has not ended in time."""
        with self._lock:
            self._stopping = True
            self._condition.notify_all()
        if threading.current_thread() is self._thread:  # the garbage collector ran here
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def waiting(self) -> int:
        """Records on the way to at least one sink."""
        return len(self._ring) + max((len(outlet) for outlet in self.outlets), default=0)

    def _check(self) -> None:
        if self._stopping:
            raise ValueError("this recorder is closed")

    def _note(self, taken: bool) -> None:
        if not taken:
            self.dropped += 1
            self._untold += 1
            self._say(
                "dropped",
                "fastfs.Monitor: rows are dropped, since the sinks take them more slowly than they come (one may "
                "hang). Training goes on; the record will say how many. Said once.",
            )
        if len(self._ring) == 1 or self._ring.half_full:
            self._condition.notify_all()

    # The writer thread

    def _run(self) -> None:
        going = True
        while going:
            try:
                going = self._turn()  # a call of its own: nothing of the last batch is held while this thread sleeps
            except BaseException as error:  # out of memory, say
                self._say("turn", f"fastfs.Monitor: rows are lost ({in_words(error)}). Said once.")
                going = not self._stopping
                time.sleep(0.1)
        self.unclosed = [failure for outlet in self.outlets if (failure := outlet.close()) is not None]

    def _turn(self) -> bool:
        """Wait until there is something to do and do it; False at the end."""
        with self._lock:
            while (pause := self._pause()) is None or pause > 0:
                self._condition.wait(pause)
            force, stopping, asked = self._stopping or self._asked > self._done, self._stopping, self._asked
            since = self._ring.since
            due = since is not None and time.monotonic() >= since + self._flush_seconds
            batch = self._ring.swap() if force or due or self._ring.half_full else None
            untold = 0
            if batch is not None:
                untold, self._untold = self._untold, 0
        records = [] if batch is None else self._with_alerts(self._records(batch), untold)
        for outlet in self.outlets:
            outlet.add(records)
            for _ in range(_LAST_TRIES if stopping else 1):
                outlet.run(force=force, settle=force)
                if not len(outlet) and outlet.error is None:
                    break
        with self._lock:
            self._done = max(self._done, asked)
            self._condition.notify_all()
            return not stopping or len(self._ring) > 0

    def _records(self, batch: Batch) -> list[Record]:
        records: list[Record] = []
        try:
            host = self._ring.fetch(batch)
            for entry in batch.entries:
                records += self._decoded(entry.decode, host[entry.start : entry.stop], entry.record)
        except BaseException as error:
            self._say("fetch", f"fastfs.Monitor: rows are lost ({in_words(error)}). Said once.")
        with self._lock:
            self._ring.give_back(batch)
        return records

    def _pause(self) -> float | None:
        """Seconds until there is something to do; None if nothing is known of. Called with the lock."""
        if self._stopping or self._asked > self._done or (len(self._ring) and self._ring.half_full):
            return 0.0
        times = [due for outlet in self.outlets if (due := outlet.due_at()) is not None]
        if self._ring.since is not None:
            times.append(self._ring.since + self._flush_seconds)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _decoded(self, decode: Decode | None, payload: Tensor, record: Record | None) -> list[Record]:
        if decode is None:
            return [] if record is None else [record]
        try:
            return list(decode(payload))
        except BaseException as error:
            self._say(
                "decode",
                f"fastfs.Monitor: a row could not be made of what was measured and is lost "
                f"({in_words(error)}). Said once.",
            )
            return []

    def _with_alerts(self, records: list[Record], untold: int) -> list[Record]:
        result: list[Record] = []
        for record in records:
            result.append(record)
            raised, failures = self.alerts.update(record)
            result += raised
            self.messages.extend(raised)
            for name, error in failures:
                self._say(
                    f"rule {name}",
                    f"fastfs.Monitor: alert rule {name} failed ({in_words(error)}). Said once.",
                )
        if records:
            self._last_step = records[-1].step
        if untold:
            message = f"{untold} records were dropped here: the sinks did not keep up"
            scalars = {"rule": "dropped", "layer": None, "value": float(untold), "message": message}
            result.append(Record("alert", self._last_step, time.time(), scalars))
        return result

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self.messages.append(text)
