"""Reads a record that is still being written: only new lines, and of these only what is needed."""

from __future__ import annotations

import os
import re
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from fastfs._record.encoding import TORN
from fastfs._record.reading.jsonl_reader import LONGEST
from fastfs._record.schema import CheckedLine, Checker, UnknownSchemaError

__all__ = ["Follower", "NewLines"]

_CHUNK = 8 << 20
_RECENT = 64
"""Number of rows of each kind that one poll decodes: following a long record must not take minutes to start."""

_START = 512

_ROW = re.compile(rb'\s*\{\s*"kind"\s*:\s*"(measured|predicted)"')


@dataclass
class NewLines:
    """The result of a poll.

    Attributes:
        lines: in the order of the file; of measured and predicted lines the last 64 each.
        exists: whether the file exists.
        restarted: whether the file was truncated or replaced since the previous poll and therefore read from its start.
        unreadable: how many lines do not conform to the schema, among those that were decoded.
    """

    lines: list[CheckedLine] = field(default_factory=list)
    exists: bool = True
    restarted: bool = False
    unreadable: int = 0


class Follower:
    """Reads a growing JSONL record. A last line without a newline waits until the rest of it is there.

    Args:
        path: of the record, which need not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._torn = b""
        self._begun = False
        self._checker = Checker()
        self._why = ""  # why the first line is not a header
        self._start = b""  # of the file: a new file under the same name begins differently

    def poll(self) -> NewLines:
        """Reads what was written since the last call.

        Returns:
            The new lines.

        Raises:
            OSError: the file exists but cannot be read.
            ValueError: the file is not a record.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            new = NewLines(exists=False, restarted=self._identity is not None)
            self._reset()
            return new
        new = NewLines()
        with file:
            about = os.fstat(file.fileno())
            identity = (about.st_dev, about.st_ino)
            replaced = (
                identity != self._identity or about.st_size < self._offset or file.read(len(self._start)) != self._start
            )
            if self._identity is not None and replaced:
                new.restarted = True
                self._reset()
            self._identity = identity
            file.seek(0)
            self._start = file.read(min(about.st_size, _START))
            file.seek(self._offset)
            found: list[tuple[int, CheckedLine]] = []
            rows: dict[bytes, deque[tuple[int, bytes]]] = {}
            number = 0
            while chunk := file.read(_CHUNK):
                self._offset += len(chunk)
                *lines, self._torn = (self._torn + chunk).split(b"\n")
                for line in lines:
                    number += 1
                    row = _ROW.match(line)
                    if b'"header"' in line:  # earlier rows are checked against the earlier header
                        new.unreadable += self._check_recent(rows, found)
                    if row and self._begun:
                        rows.setdefault(row[1], deque(maxlen=_RECENT)).append((number, line))
                    elif line.strip():
                        new.unreadable += not self._check(line, number, found)
            if len(self._torn) > LONGEST:
                raise ValueError(f"{self.path}: a line longer than {LONGEST:,} bytes: not a record")
            if not self._begun and self._torn.strip() and not self._torn.lstrip().startswith(b"{"):
                raise ValueError(f"{self.path}: not a record of fastfs.Monitor (expected lines of JSON)")
        new.unreadable += self._check_recent(rows, found)
        found.sort(key=lambda one: one[0])
        new.lines = [line for _, line in found]
        return new

    def _check_recent(self, rows: dict[bytes, deque[tuple[int, bytes]]], into: list[tuple[int, CheckedLine]]) -> int:
        """Checks the rows that were kept. Returns how many do not conform."""
        bad = 0
        for kept in rows.values():
            bad += sum(not self._check(line, number, into) for number, line in kept)
        rows.clear()
        return bad

    def _check(self, line: bytes, number: int, into: list[tuple[int, CheckedLine]]) -> bool:
        """Checks a line. Returns False if it does not conform and was not torn by a failed write."""
        try:
            checked = self._checker.check_bytes(line.strip())
        except UnknownSchemaError as error:
            raise ValueError(f"{self.path}: {error}") from None
        except ValueError as error:
            if not self._begun and b'"header"' not in line:
                why = self._why or str(error)
                raise ValueError(
                    f"{self.path}: not a record of fastfs.Monitor (its first line is not a header: {why})"
                ) from None
            self._why = self._why or str(error)
            return line.rstrip().endswith(TORN)
        self._begun = True
        into.append((number, checked))
        return True

    def _reset(self) -> None:
        self._identity, self._offset, self._torn, self._begun, self._start = None, 0, b"", False, b""
        self._checker, self._why = Checker(), ""
