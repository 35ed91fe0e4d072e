"""How the parts of the ranks of a run come together: alone, through a store at the first rank, or in files.

The writer's thread calls a collector with what it has decoded, and writes the records that the collector returns::

    rank 0:   own parts ---> Gatherer <--- inbox in the store      -> records of the run
    rank r:   own parts ---> Sender   ---> inbox in the store      -> nothing
    files:    own parts ---> PartRecords                           -> lines of a file of this rank, merged when loaded

No method waits for another rank for longer than a timeout, and none runs in the training thread.
"""

from __future__ import annotations

import base64
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from fastfs._record.ranks.assembly import Assembler
from fastfs._record.ranks.order import FIRST, Key, PartKeys
from fastfs._record.ranks.part import RankPart
from fastfs._record.ranks.run_store import RankError, RunStore
from fastfs._record.record import Record

__all__ = ["Alone", "Collector", "Gatherer", "Inbox", "PartRecords", "Sender", "assembled"]

_MOST = 4096  # steps, or messages, that wait for other ranks
_MOST_BYTES = 1 << 28  # of messages that wait in the store, and of those that wait on a rank
_MOST_VALUES = 1 << 25  # of parts that wait for those of other ranks
_POLL = 0.2  # seconds between two looks into the inbox
_FORCED_POLL = 0.005  # while somebody waits
_LONGEST_WAIT = 20.0  # seconds that a flush waits for the parts of other ranks; the recorder's own limit is 30
_LAST_WAIT = 8.0  # and the end, for which an interpreter that exits leaves 10
_LONGEST_PAUSE = 1.0  # after the store has failed


class Collector(Protocol):
    """Makes records from parts."""

    def take(self, items: Iterable[Any]) -> list[Record]:
        """Takes parts of this rank, or finished records, and returns the records that are ready."""

    def collect(self, *, force: bool, last: bool) -> list[Record]:
        """Returns the records that have become ready since; waits for other ranks if ``force``, up to a timeout.

        Args:
            force: Somebody waits for all records.
            last: It is the last call: this rank takes part no longer.
        """

    def due_at(self) -> float | None:
        """Time at which :meth:`collect` has something to do, by ``time.monotonic()``; None for nothing."""


class Alone:
    """A run of one process."""

    def __init__(self, assembler: Assembler) -> None:
        self._assembler = assembler

    def take(self, items: Iterable[Any]) -> list[Record]:
        """Part of :class:`Collector`."""
        records: list[Record] = []
        for item in items:
            records += assembled(self._assembler, [item]) if isinstance(item, RankPart) else [item]
        return records

    def collect(self, *, force: bool, last: bool) -> list[Record]:
        """Part of :class:`Collector`."""
        return []

    def due_at(self) -> float | None:
        """Part of :class:`Collector`."""
        return None


class PartRecords:
    """Turns parts into lines of a file of this rank, which :mod:`fastfs._record.ranks.part_files` merges."""

    def take(self, items: Iterable[Any]) -> list[Record]:
        """Part of :class:`Collector`."""
        return [as_record(item) if isinstance(item, RankPart) else item for item in items]

    def collect(self, *, force: bool, last: bool) -> list[Record]:
        """Part of :class:`Collector`."""
        return []

    def due_at(self) -> float | None:
        """Part of :class:`Collector`."""
        return None


def as_record(part: RankPart) -> Record:
    """Returns a part as a record of kind ``part``."""
    data = base64.b64encode(part.to_bytes()).decode()
    return Record("part", part.step, part.time, {"rank": part.place.rank, "data": data})


def assembled(assembler: Assembler, parts: Sequence[RankPart]) -> list[Record]:
    """Returns the records of a step; of parts that do not belong together, one that says so."""
    try:
        return assembler.records(parts)
    except Exception as error:  # for example of ranks that watch different layers
        reason = f"the parts of the ranks could not be merged ({type(error).__name__}: {error})"
        return [Record("skipped", parts[0].step, parts[0].time, {"reason": reason})]


class Sender:
    """Sends the parts of a rank to the inbox of the first one.

    A message has a number among those of all ranks, and begins with the rank and the number among its own, since a
    message whose setting has failed may have been set all the same.

    Args:
        store: Over a connection of the writer's thread.
        warn: Called once with a message if parts cannot be sent.
    """

    def __init__(self, store: RunStore, warn: Callable[[str], None]) -> None:
        self.lost = 0  # parts that were not sent, because too many waited
        self._store = store
        self._warn = warn
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._own = 0  # number of the last message
        self._retry_at = 0.0
        self._warned = False

    def take(self, items: Iterable[Any]) -> list[Record]:
        """Part of :class:`Collector`."""
        for item in items:
            if isinstance(item, RankPart):
                try:
                    self._put(item.to_bytes())
                except Exception as error:
                    self._failed(error)
        return []

    def collect(self, *, force: bool, last: bool) -> list[Record]:
        """Part of :class:`Collector`."""
        if last:
            self._put(b"")  # the end
        if not force and time.monotonic() < self._retry_at:
            return []
        try:
            while self._waiting:
                own, data = self._waiting[0]
                number = self._store.add("sent", 1)
                if (number - self._store.add("received", 0)) * len(data) > _MOST_BYTES:
                    raise RankError("nobody takes what the ranks send")
                self._store.set(f"part/{number}", f"{self._store.rank} {own} ".encode() + data)
                self._remove()
            self._retry_at = 0.0
        except Exception as error:  # the server is gone, or stopped
            self._retry_at = time.monotonic() + self._store.timeout
            self._failed(error)
            if not last:
                self._store.reconnect(error)
        return []

    def due_at(self) -> float | None:
        """Part of :class:`Collector`."""
        return self._retry_at if self._waiting else None

    def _put(self, data: bytes) -> None:
        self._own += 1
        self._waiting.append((self._own, data))
        self._bytes += len(data)
        while len(self._waiting) > 1 and (self._bytes > _MOST_BYTES or len(self._waiting) > _MOST):
            self._remove()
            self.lost += 1

    def _failed(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            self._warn(
                f"fastfs.Monitor: rank {self._store.rank} cannot send what it measures to rank {self._store.ranks[0]} "
                f"({type(error).__name__}: {error}); the record will be without it"
            )

    def _remove(self) -> None:
        self._bytes -= len(self._waiting.popleft()[1])


class Gatherer:
    """Waits for the parts of all ranks of a step and merges them, in the order of the steps.

    A rank whose part has not come ``timeout`` seconds after the first one of its step is not waited for again until it
    is heard of. Parts that come later than that are lost.

    Args:
        assembler: Makes records.
        ranks: Numbers of the ranks of the run.
        inbox: Returns the messages that have come since: the number of a rank, and its part or None at its end.
        timeout: In seconds.
        warn: Called with a message when a rank is missing for the first time.
    """

    def __init__(
        self,
        assembler: Assembler,
        ranks: Sequence[int],
        inbox: Callable[[], Iterable[tuple[int, RankPart | None]]],
        timeout: float,
        warn: Callable[[str], None],
    ) -> None:
        self.lost = 0  # parts that came too late
        self._assembler = assembler
        self._inbox = inbox
        self._timeout = timeout
        self._warn = warn
        self._warned: set[int] = set()
        self._expected = set(ranks)
        self._late: set[int] = set()
        self._steps: dict[Key, dict[int, RankPart]] = {}
        self._since: dict[Key, float] = {}
        self._remarks: dict[Key, list[RankPart]] = {}  # further parts of a rank: what failed after its row
        self._values = 0  # in the parts that wait
        self._keys = PartKeys(ranks)
        self._done = FIRST

    def take(self, items: Iterable[Any]) -> list[Record]:
        """Part of :class:`Collector`."""
        records = []
        for item in items:
            if isinstance(item, RankPart):
                self._add(item.place.rank, item)
            else:
                records.append(item)
        return records

    def collect(self, *, force: bool, last: bool) -> list[Record]:
        """Part of :class:`Collector`."""
        records = self._ready()
        end = time.monotonic() + min(self._timeout, _LAST_WAIT if last else _LONGEST_WAIT)
        while force and self._steps and time.monotonic() < end:
            time.sleep(_FORCED_POLL)
            records += self._ready()
        if last:
            self._give_up(
                [r for r in self._expected - self._late if any(self._keys.last[r] < key for key in self._steps)]
            )
            self._expected.clear()
            records += self._ready()
            if self.lost:
                self._warn(f"fastfs.Monitor: {self.lost} parts of ranks came too late and are not in the record")
        return records

    def due_at(self) -> float | None:
        """Part of :class:`Collector`."""
        return time.monotonic() + _POLL if self._steps else None

    def _add(self, rank: int, part: RankPart) -> None:
        key = self._keys.of(rank, part)
        self._late.discard(rank)
        if key is None and part.key >= self._done:
            self._remarks.setdefault(part.key, []).append(part)
            return
        if key is None or key <= self._done:
            self.lost += 1
            return
        self._steps.setdefault(key, {})[rank] = part
        self._since.setdefault(key, time.monotonic())
        self._values += part.size

    def _ready(self) -> list[Record]:
        for rank, part in self._inbox():
            if rank not in self._keys.last:
                continue
            if part is None:
                self._expected.discard(rank)
            else:
                self._add(rank, part)
        records: list[Record] = []
        for key in sorted(self._steps):
            missing = [r for r in self._expected - self._late if self._keys.last[r] < key]
            full = len(self._steps) > _MOST or self._values > _MOST_VALUES
            if missing and not full and time.monotonic() - self._since[key] < self._timeout:
                break
            self._give_up(missing)
            parts = self._steps.pop(key)
            del self._since[key]
            self._values -= sum(part.size for part in parts.values())
            self._done = key
            remarks = self._remarks.pop(key, [])
            records += assembled(self._assembler, [*(parts[rank] for rank in sorted(parts)), *remarks])
        if late := self._remarks.pop(self._done, None):
            records += assembled(self._assembler, late)
        return records

    def _give_up(self, missing: Sequence[int]) -> None:
        self._late.update(missing)
        new = sorted(set(missing) - self._warned)
        if new:
            self._warned.update(new)
            shown = ", ".join(map(str, new[:8])) + (", ..." if len(new) > 8 else "")
            self._warn(
                f"fastfs.Monitor: nothing has come from rank {shown} for {self._timeout:g} s; the record goes on "
                "without, and says so"
            )


class Inbox:
    """The messages of the other ranks, those of each in the order in which it has sent them.

    A message that does not come, because its sender died or failed after it took the number, holds up no other one.
    What cannot be decoded, or has come before, is left out.

    Args:
        store: Over a connection of the writer's thread.
        warn: Called once with a message if something cannot be decoded.
    """

    def __init__(self, store: RunStore, warn: Callable[[str], None]) -> None:
        self.unreadable = 0
        self._store = store
        self._warn = warn
        self._next = 1
        self._missing: dict[int, float] = {}  # numbers whose messages have not come, and since when
        self._last: dict[int, int] = {}  # by rank, the number among its own of the last message
        self._received = 0  # as the senders know it
        self._pause_until = 0.0

    def __call__(self) -> list[tuple[int, RankPart | None]]:
        """Returns what has come since the last call: the number of a rank, and its part or None at its end."""
        found: list[tuple[int, RankPart | None]] = []
        if time.monotonic() < self._pause_until:
            return found
        try:
            sent = self._store.add("sent", 0)
            until = min(sent, self._next + _MOST)
            for number in list(self._missing):
                self._take(number, found)
            while self._next <= until:
                self._take(self._next, found)
                self._next += 1
            if self._next > self._received + 1:
                self._received = self._next - 1
                self._store.set("received", str(self._received).encode())
        except Exception as error:  # if the server is gone, the record will say which ranks are missing
            self._store.reconnect(error)
            self._pause_until = time.monotonic() + min(self._store.timeout, _LONGEST_PAUSE)
        return found

    def _take(self, number: int, found: list[tuple[int, RankPart | None]]) -> None:
        data = self._store.take(f"part/{number}")
        if data is None:
            now = time.monotonic()
            if now - self._missing.setdefault(number, now) > self._store.timeout:
                del self._missing[number]
            return
        self._missing.pop(number, None)
        try:
            rank, own, rest = self._decoded(data)
        except Exception as error:
            self.unreadable += 1
            if self.unreadable == 1:
                self._warn(f"fastfs.Monitor: what a rank has sent cannot be read and is left out ({error})")
            return
        if own > self._last.get(rank, 0):
            self._last[rank] = own
            found.append((rank, rest))

    @staticmethod
    def _decoded(data: bytes) -> tuple[int, int, RankPart | None]:
        rank, own, rest = data.split(b" ", 2)
        return int(rank), int(own), RankPart.from_bytes(rest) if rest else None
