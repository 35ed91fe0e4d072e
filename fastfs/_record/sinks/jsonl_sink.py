"""Records as JSON lines in a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfs._record.encoding import TORN, to_json
from fastfs._record.record import Record, as_line
from fastfs._record.sinks.file_lock import try_lock, warn_if_locked
from fastfs._record.sinks.folders import make_folders, remove_folders
from fastfs._record.sinks.protocol import PartlyWrittenError

__all__ = ["JsonlSink"]


class JsonlSink:
    """Appends to a file with one JSON object per line: a header per run, then a line per record.

    Each batch is a single write to the operating system. A killed process therefore loses nothing that was written; at
    worst its last line is torn, which readers tolerate. When the disk cuts a write short, the torn line gets a mark and
    is written again. Each line carries the id of its run, so that several runs can share a file, one after the other or
    at the same time. A second process gets a warning when it attaches, if the file system has locks: on a local disk
    nothing is lost, but a network file system may mix up their lines. NaN and infinities become null.

    Args:
        path: the file; missing folders are created.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
        self._run = ""
        self._torn = False  # the last line of the file has no end
        self._tore = False  # and this sink wrote that line
        self._sizes: tuple[int, int] | None = None  # of the file, before and after the first header
        self._made = make_folders(self.path.parent)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            try:
                self._descriptor = os.open(self.path, flags | os.O_EXCL, 0o666)
                self._created = True
            except FileExistsError:  # also a dangling link
                self._created = False
                self._descriptor = os.open(self.path, flags, 0o666)
        except BaseException:
            remove_folders(self._made)
            raise

    def open(self, header: Mapping[str, Any]) -> None:
        """Appends the header.

        Raises:
            ValueError: the sink is closed.

        Warns:
            RuntimeWarning: another process is writing to this file.
        """
        if self._descriptor is None:
            raise ValueError(f"{self.path}: this sink is closed")
        if self._sizes is None:
            warn_if_locked(self._descriptor, self.path)
        self._run = header["run"]
        before = os.fstat(self._descriptor).st_size
        try:
            self._append([header])
        finally:
            if self._sizes is None:
                self._sizes = before, os.fstat(self._descriptor).st_size

    def write(self, records: Sequence[Record]) -> None:
        """Appends the records.

        Raises:
            PartlyWrittenError: the operating system wrote only some of the lines.
            ValueError: the sink is closed.
        """
        self._append([as_line(record, self._run) for record in records])

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def discard(self) -> None:
        """Closes the file and removes what this sink created: the file if it was new, otherwise the header."""
        if self._descriptor is None:
            return
        size = os.fstat(self._descriptor).st_size
        before, after = self._sizes or (size, size)
        try:
            if self._created and size == after:
                with contextlib.suppress(FileNotFoundError):
                    self.path.unlink()
                remove_folders(self._made)
            elif before < after == size and try_lock(self._descriptor):
                os.ftruncate(self._descriptor, before)
        finally:
            self.close()

    def _append(self, objects: Sequence[Mapping[str, Any]]) -> None:
        if self._descriptor is None:
            raise ValueError(f"{self.path}: this sink is closed")
        try_lock(self._descriptor)
        lines = [to_json(item).encode() + b"\n" for item in objects]
        self._torn = self._torn or not self._ends_a_line()  # by an earlier run, or by another writer
        if self._torn and lines:
            lines[0] = (TORN if self._tore else b"") + b"\n" + lines[0]
        data = memoryview(b"".join(lines))
        sent = 0
        try:
            while sent < len(data):
                count = os.write(self._descriptor, data[sent:])
                sent += count
                if count:
                    self._torn = data[sent - 1] != 0x0A
        except OSError as error:
            self._tore = self._torn
            done = 0
            for line in lines:
                sent -= len(line)
                if sent < 0:
                    break
                done += 1
            raise PartlyWrittenError(error, done) from error

    def _ends_a_line(self) -> bool:
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        return size == 0 or os.pread(self._descriptor, 1, size - 1) == b"\n"
