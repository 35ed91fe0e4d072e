"""Reads the files of ranks that are still being written, as one record."""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from fastfs._record.columns import PART
from fastfs._record.encoding import TORN, parse, to_json
from fastfs._record.ranks.assembly import Assembler
from fastfs._record.ranks.exchange import assembled
from fastfs._record.ranks.order import FIRST, Key, PartKeys
from fastfs._record.ranks.part import RankPart
from fastfs._record.ranks.part_files import decoded, header_of_run, rank_files
from fastfs._record.reading.follow import NewLines
from fastfs._record.record import as_line
from fastfs._record.schema import CheckedLine, Checker, Line, UnknownSchemaError

__all__ = ["PartsFollower"]

_CHUNK = 8 << 20
_RECENT = 256  # lines of each rank that one poll decodes
_START = 512
_PATIENCE = 20.0  # seconds after which a step is shown without the ranks that have not written it


@dataclass
class _Tail:
    """How far a file has been read, with the checker of its lines."""

    identity: tuple[int, int]
    checker: Checker
    start: bytes = b""  # of the file: a new file under the same name begins differently
    offset: int = 0
    rest: bytes = b""


class PartsFollower:
    """Reads the growing files of the ranks of a run; of several runs the one that started last.

    A step is complete when every rank that has begun to write is past it, or some time after it was measured.

    Args:
        path: Of the record; those of the ranks are named after it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._reset()

    def _reset(self) -> None:
        self._tails: dict[Path, _Tail] = {}
        self._header: Line = {}
        self._begin({})

    def _begin(self, header: Line) -> None:
        """Forgets the parts of an earlier start of the run, or of another run."""
        if header and header["run"] != self._header.get("run"):
            self._assembler = Assembler(header, header.get("quantiles") or ())
            self._checker = Checker()
        self._header = header
        self._steps: dict[Key, dict[int, list[RankPart]]] = {}
        self._keys = PartKeys(())
        self._done = FIRST

    def poll(self) -> NewLines:
        """Reads what was written since the last call.

        Returns:
            The new lines.

        Raises:
            OSError: A file exists but cannot be read.
            ValueError: A file is of an unknown schema version.
        """
        new, files = NewLines(), rank_files(self.path)
        new.exists = bool(files)
        if any(_replaced(file, tail) for file, tail in self._tails.items()):
            new.restarted = True
            self._reset()
        found: list[CheckedLine] = []
        for file in files:
            new.unreadable += self._read(file, found)
        new.lines = [*found, *self._ready()]
        return new

    def _read(self, file: Path, found: list[CheckedLine]) -> int:
        """Reads what is new in a file; returns how many lines cannot be read."""
        tail = self._tails.setdefault(file, _Tail(_identity(file), Checker()))
        recent: deque[bytes] = deque(maxlen=_RECENT)
        unreadable = 0
        with file.open("rb") as opened:
            tail.start = opened.read(_START)
            opened.seek(tail.offset)
            while chunk := opened.read(_CHUNK):
                tail.offset += len(chunk)
                *lines, tail.rest = (tail.rest + chunk).split(b"\n")
                for line in lines:
                    if b'"header"' not in line[:64]:
                        recent.append(line.strip())
                        continue
                    try:
                        header = tail.checker.check_bytes(line).line
                    except UnknownSchemaError as error:
                        raise ValueError(f"{file}: {error}") from None
                    except ValueError:
                        unreadable += 1
                        continue
                    recent.clear()
                    self._start(header, found)
        return unreadable + sum(not self._take(tail.checker, line) for line in recent if line)

    def _start(self, header: Line, found: list[CheckedLine]) -> None:
        """Notes the header of a rank, and begins anew if it is the first one of its start of the run."""
        rank, now = header.get("rank"), self._header
        if rank is None:
            return
        resumed = header.get("resumed_at")
        if header["run"] != now.get("run"):
            if (header.get("started") or "") < (now.get("started") or ""):
                return
        elif resumed == now.get("resumed_at") or (header.get("started") or "") < (now.get("started") or ""):
            self._keys.last.setdefault(rank, FIRST)
            return
        self._begin(header)
        self._keys.last[rank] = FIRST
        found.append(self._checker.check(header_of_run(header)))

    def _take(self, checker: Checker, line: bytes) -> bool:
        """Takes a line that is no header; returns False if it cannot be read and is not marked as torn."""
        try:
            checked = checker.check_bytes(line)
            if checked.kind != PART or checked.line["run"] != self._header.get("run"):
                return True
            part = decoded(checked.line)
        except (ValueError, KeyError):
            return line.endswith(TORN)
        rank = part.place.rank
        self._keys.last.setdefault(rank, FIRST)
        key = self._keys.of(rank, part) or self._keys.last[rank]
        if key > self._done:
            self._steps.setdefault(key, {}).setdefault(rank, []).append(part)
        return True

    def _ready(self) -> list[CheckedLine]:
        """Returns the records of the steps that are complete."""
        found: list[CheckedLine] = []
        for key in sorted(self._steps):
            ranks = self._steps[key]
            begun = min(part.time for parts in ranks.values() for part in parts)
            if any(last < key for last in self._keys.last.values()) and time.time() - begun < _PATIENCE:
                break
            self._done = key
            del self._steps[key]
            parts = [ranks[rank] for rank in sorted(ranks)]
            together = [each[0] for each in parts] + [remark for each in parts for remark in each[1:]]
            for record in assembled(self._assembler, together):
                line = parse(to_json(as_line(record, self._header["run"])).encode())
                found.append(self._checker.check(line))
        return found


def _identity(file: Path) -> tuple[int, int]:
    about = file.stat()
    return about.st_dev, about.st_ino


def _replaced(file: Path, tail: _Tail) -> bool:
    try:
        with file.open("rb") as opened:
            start, size = opened.read(len(tail.start)), opened.seek(0, os.SEEK_END)
    except FileNotFoundError:
        return True
    return _identity(file) != tail.identity or size < tail.offset or start != tail.start
