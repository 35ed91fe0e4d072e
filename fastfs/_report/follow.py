"""Reading a record that is still being written: only what is new, and only what is needed of it."""

from __future__ import annotations

import os
import re
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastfs._monitor.record.schema import Checker, UnknownSchemaError
from fastfs._monitor.record.sinks import TORN
from fastfs._report.jsonl_reader import LONGEST

__all__ = ["Follower", "News"]

_CHUNK = 8 << 20
_RECENT = 64
"""Rows of each kind that are parsed of one reading: a long record that is opened late costs no minutes of JSON."""

_START = 512

_ROW = re.compile(rb'\s*\{\s*"kind"\s*:\s*"(measured|predicted)"')


@dataclass
class News:
    """What one reading found.

    ``records``: in the order of the file; of measured and predicted steps the last 64 each. ``restarted``: the file was
    cut short or replaced since the reading before, and was read from its beginning. ``unreadable``: how many lines are
    not of the format, of those that were looked at (older rows are not).
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    exists: bool = True
    restarted: bool = False
    unreadable: int = 0


class Follower:
    """Reads a growing JSONL record. A last line without its end is kept until the rest of it is there.

    Args:
        path: of the record; it need not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._torn = b""
        self._begun = False
        self._checker = Checker()
        self._why = ""  # the first line was no header
        self._start = b""  # of the file: a file written anew under the same name starts differently

    def poll(self) -> News:
        """What was written since the last call.

        Raises:
            OSError: the file is there and cannot be read.
            ValueError: the file is not a record.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            news = News(exists=False, restarted=self._identity is not None)
            self._forget()
            return news
        news = News()
        with file:
            about = os.fstat(file.fileno())
            identity = (about.st_dev, about.st_ino)
            anew = (
                identity != self._identity or about.st_size < self._offset or file.read(len(self._start)) != self._start
            )
            if self._identity is not None and anew:
                news.restarted = True
                self._forget()
            self._identity = identity
            file.seek(0)
            self._start = file.read(min(about.st_size, _START))
            file.seek(self._offset)
            others: list[tuple[int, dict[str, Any]]] = []
            rows: dict[bytes, deque[tuple[int, bytes]]] = {}
            number = 0
            while chunk := file.read(_CHUNK):
                self._offset += len(chunk)
                *lines, self._torn = (self._torn + chunk).split(b"\n")
                for line in lines:
                    number += 1
                    row = _ROW.match(line)
                    if b'"header"' in line:  # rows are checked by the header before them
                        news.unreadable += self._take_kept(rows, others)
                    if row and self._begun:
                        rows.setdefault(row[1], deque(maxlen=_RECENT)).append((number, line))
                    elif line.strip():
                        news.unreadable += not self._take(line, number, others)
            if len(self._torn) > LONGEST:
                raise ValueError(f"{self.path}: a line longer than {LONGEST:,} bytes: no record")
            if not self._begun and self._torn.strip() and not self._torn.lstrip().startswith(b"{"):
                raise ValueError(f"{self.path}: not a record of fastfs.Monitor (expected lines of JSON)")
        news.unreadable += self._take_kept(rows, others)
        others.sort(key=lambda found: found[0])
        news.records = [record for _, record in others]
        return news

    def _take_kept(self, rows: dict[bytes, deque[tuple[int, bytes]]], into: list[tuple[int, dict[str, Any]]]) -> int:
        """Rows that were put off; how many cannot be read."""
        bad = 0
        for kept in rows.values():
            bad += sum(not self._take(line, number, into) for number, line in kept)
        rows.clear()
        return bad

    def _take(self, line: bytes, number: int, into: list[tuple[int, dict[str, Any]]]) -> bool:
        try:
            checked = self._checker.check_bytes(line.strip())
        except UnknownSchemaError as error:
            raise ValueError(f"{self.path}: {error}") from None
        except ValueError as error:
            if not self._begun and b'"header"' not in line:
                why = self._why or str(error)
                raise ValueError(
                    f"{self.path}: not a record of fastfs.Monitor (its first line is no header: {why})"
                ) from None
            self._why = self._why or str(error)
            return line.rstrip().endswith(TORN)
        self._begun = True
        into.append((number, checked.line))
        return True

    def _forget(self) -> None:
        self._identity, self._offset, self._torn, self._begun, self._start = None, 0, b"", False, b""
        self._checker, self._why = Checker(), ""
