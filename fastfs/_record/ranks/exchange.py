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
from fastfs._record.ranks.part import RankPart
from fastfs._record.ranks.run_store import RunStore
from fastfs._record.record import Record

__all__ = ["Alone", "Collector", "Gatherer", "Inbox", "PartRecords", "Sender"]

_MOST = 4096  # steps, or messages, that wait for other ranks
_POLL = 0.2  # seconds between two looks into the inbox
_FORCED_POLL = 0.005  # while somebody waits

Key = tuple[int, bool]
"""Of a step and what comes before it, see `RankPart.key`."""


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
        return [
            r for item in items for r in (self._assembler.records([item]) if isinstance(item, RankPart) else [item])
        ]

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


class Sender:
    """Sends the parts of a rank to the inbox of the first one.

    Args:
        store: Over a connection of the writer's thread.
        warn: Called once with a message if parts cannot be sent.
    """

    def __init__(self, store: RunStore, warn: Callable[[str], None]) -> None:
        self._store = store
        self._warn = warn
        self._waiting: deque[bytes] = deque(maxlen=_MOST)
        self._retry_at = 0.0
        self._warned = False

    def take(self, items: Iterable[Any]) -> list[Record]:
        """Part of :class:`Collector`."""
        self._waiting.extend(item.to_bytes() for item in items if isinstance(item, RankPart))
        return []

    def collect(self, *, force: bool, last: bool) -> list[Record]:
        """Part of :class:`Collector`."""
        if last:
            self._waiting.append(b"")  # the end
        if not force and time.monotonic() < self._retry_at:
            return []
        try:
            while self._waiting:
                number = self._store.add("sent", 1)
                self._store.set(f"part/{number}", f"{self._store.rank} ".encode() + self._waiting[0])
                self._waiting.popleft()
                if number % 64 == 0 and number - self._store.add("received", 0) > 16 * _MOST:
                    raise RuntimeError("nobody takes what the ranks send")
        except Exception as error:  # the server is gone, or stopped
            self._retry_at = time.monotonic() + self._store.timeout
            if not self._warned:
                self._warned = True
                self._warn(
                    f"fastfs.Monitor: rank {self._store.rank} cannot send what it measures to rank "
                    f"{self._store.ranks[0]} ({type(error).__name__}: {error}); the record will be without it"
                )
        return []

    def due_at(self) -> float | None:
        """Part of :class:`Collector`."""
        return self._retry_at if self._waiting else None


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
        self._progress: dict[int, Key] = dict.fromkeys(ranks, (-1, False))
        self._done: Key = (-1, False)

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
        end = time.monotonic() + self._timeout
        while force and self._steps and time.monotonic() < end:
            time.sleep(_FORCED_POLL)
            records += self._ready()
        if last:
            self._late = set(self._expected)
            records += self._ready()
        return records

    def due_at(self) -> float | None:
        """Part of :class:`Collector`."""
        return time.monotonic() + _POLL if self._steps else None

    def _add(self, rank: int, part: RankPart) -> None:
        key = part.key
        self._progress[rank] = key
        self._late.discard(rank)
        if key <= self._done:
            self.lost += 1
            return
        self._steps.setdefault(key, {})[rank] = part
        self._since.setdefault(key, time.monotonic())

    def _ready(self) -> list[Record]:
        for rank, part in self._inbox():
            if rank not in self._progress:
                continue
            if part is None:
                self._expected.discard(rank)
            else:
                self._add(rank, part)
        records: list[Record] = []
        for key in sorted(self._steps):
            missing = [r for r in self._expected - self._late if self._progress[r] < key]
            waited = time.monotonic() - self._since[key] >= self._timeout or len(self._steps) > _MOST
            if missing and not waited:
                break
            self._give_up(missing)
            parts = self._steps.pop(key)
            del self._since[key]
            self._done = key
            records += self._assembler.records([parts[rank] for rank in sorted(parts)])
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
    """The messages of the other ranks, in the order in which they were sent.

    Args:
        store: Over a connection of the writer's thread.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._next = 1
        self._stuck_since: float | None = None  # at a number whose message has not come
        self._pause_until = 0.0

    def __call__(self) -> list[tuple[int, RankPart | None]]:
        """Returns what has come since the last call: the number of a rank, and its part or None at its end."""
        found: list[tuple[int, RankPart | None]] = []
        if time.monotonic() < self._pause_until:
            return found
        try:
            first, sent = self._next, self._store.add("sent", 0)
            while self._next <= sent:
                data = self._store.take(f"part/{self._next}")
                if data is None and not self._given_up():
                    break
                self._next += 1
                self._stuck_since = None
                if data is not None:
                    rank, _, rest = data.partition(b" ")
                    found.append((int(rank), RankPart.from_bytes(rest) if rest else None))
            if self._next > first:
                self._store.add("received", self._next - first)
        except Exception:  # the server is gone: the record will say which ranks are missing
            self._pause_until = time.monotonic() + self._store.timeout
        return found

    def _given_up(self) -> bool:
        """Returns whether the next message will not come: its sender has died after it took the number."""
        now = time.monotonic()
        if self._stuck_since is None:
            self._stuck_since = now
        return now - self._stuck_since > self._store.timeout
