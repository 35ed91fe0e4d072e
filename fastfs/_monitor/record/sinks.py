"""Where records go: files of JSON lines, functions, and whatever has ``open``, ``write`` and ``close``."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fastfs._monitor.record.file_lock import claim, tell_if_taken
from fastfs._monitor.record.record import Record, as_line, as_rows

__all__ = [
    "CallableSink",
    "JsonlSink",
    "PartlyWrittenError",
    "Row",
    "Sink",
    "as_sink",
    "as_sinks",
    "checked_metadata",
    "make_folders",
    "remove_folders",
    "to_json",
]

Row = dict[str, Any]

TORN = b"~"
"""Ends a line that a failed write left torn and whose record is written again."""


class PartlyWrittenError(OSError):
    """A write that failed after the first ``written`` records were safe: only the others are to be tried again."""

    def __init__(self, error: OSError, written: int) -> None:
        super().__init__(error.errno, error.strerror)
        self.written = written


@runtime_checkable
class Sink(Protocol):
    """Takes a header, then batches of records, then ``close``.

    ``open`` is called in the thread that attaches the monitor and may raise: attaching fails. All else happens in the
    writer's thread. A batch whose ``write`` raises is given again later, from its first record on.

    A sink that collects what it gets may have two methods more: ``flush()``, after which everything is safe, and
    ``due() -> float | None``, the time (``time.monotonic()``) at which ``flush`` is to be called. One that makes files
    may have ``discard()``, called instead of ``close`` where attaching failed: what was made is to go. Several headers
    can come with one run id: a run that was resumed (``resumed_at``) goes on where it was.
    """

    def open(self, header: Mapping[str, Any]) -> None: ...

    def write(self, records: Sequence[Record]) -> None: ...

    def close(self) -> None: ...


class CallableSink:
    """Calls a function with every batch of rows: ``sinks=[rows.extend]`` collects them in a list.

    A row is a dictionary: ``kind, run, step, time, layer, name, group``, the columns of the record at that layer, and
    its scalars; a record without columns (an alert, a skipped step) is one dictionary. Numbers can be NaN here. The
    function is called in the writer's thread; if it raises, it gets the same rows again later.
    """

    def __init__(self, function: Callable[[list[Row]], object]) -> None:
        self._function = function
        self._header: Mapping[str, Any] = {}

    def open(self, header: Mapping[str, Any]) -> None:
        self._header = header

    def write(self, records: Sequence[Record]) -> None:
        self._function([row for record in records for row in as_rows(record, self._header)])

    def close(self) -> None:
        pass


class JsonlSink:
    """Appends to a file, one JSON object a line: a header per run, then a line per record.

    Every batch is one write to the operating system, so that a killed process loses nothing that was written and at
    worst leaves its last line torn, which the reader tolerates. After a write that the disk cut short the torn line
    gets a mark and is written again. Each line carries the id of its run: several runs, one after the other or at
    the same time, can share a file. A second process is told so when it attaches, where the file system has locks:
    nothing is lost on a local disk, but a network file system need not keep their lines apart. NaN and infinities
    become null.

    Args:
        path: the file; missing folders are made.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
        self._run = ""
        self._torn = False  # the last line in the file has no end
        self._tore = False  # and this sink wrote it
        self._sizes: tuple[int, int] | None = None  # of the file before and after the first header
        self._made = make_folders(self.path.parent)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            try:
                self._descriptor = os.open(self.path, flags | os.O_EXCL, 0o666)
                self._created = True
            except FileExistsError:  # also a link to nothing
                self._created = False
                self._descriptor = os.open(self.path, flags, 0o666)
        except BaseException:
            remove_folders(self._made)
            raise

    def open(self, header: Mapping[str, Any]) -> None:
        """Append the header.

        Warns:
            RuntimeWarning: another process is writing this file.
        """
        if self._descriptor is None:
            raise ValueError(f"{self.path}: this sink is closed")
        if self._sizes is None:
            tell_if_taken(self._descriptor, self.path)
        self._run = header["run"]
        before = os.fstat(self._descriptor).st_size
        try:
            self._append([header])
        finally:
            if self._sizes is None:
                self._sizes = before, os.fstat(self._descriptor).st_size

    def write(self, records: Sequence[Record]) -> None:
        """Append the records.

        Raises:
            PartlyWrittenError: the operating system took only some of the lines.
            ValueError: the sink is closed.
        """
        self._append([as_line(record, self._run) for record in records])

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def discard(self) -> None:
        """Close, and take back what this sink made: the file, if it was not there before, or else the header in it."""
        if self._descriptor is None:
            return
        size = os.fstat(self._descriptor).st_size
        before, after = self._sizes or (size, size)
        try:
            if self._created and size == after:
                with contextlib.suppress(FileNotFoundError):
                    self.path.unlink()
                remove_folders(self._made)
            elif before < after == size and claim(self._descriptor):
                os.ftruncate(self._descriptor, before)
        finally:
            self.close()

    def _append(self, objects: Sequence[Mapping[str, Any]]) -> None:
        if self._descriptor is None:
            raise ValueError(f"{self.path}: this sink is closed")
        claim(self._descriptor)
        lines = [to_json(item).encode() + b"\n" for item in objects]
        self._torn = self._torn or not self._ends_a_line()  # by an earlier run, or by somebody else at the same time
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


def as_sink(target: Any) -> Sink:
    """A sink as it is; a callable as :class:`CallableSink`; a path that ends in ``.parquet`` as a
    :class:`fastfs.monitor.parquet.ParquetSink`, ``"tensorboard:FOLDER"`` as a
    :class:`fastfs.monitor.tensorboard.TensorBoardSink`, other paths as :class:`JsonlSink`.

    A string that starts as an address does (``wandb:x``, ``s3://x``) is no path; as ``pathlib.Path("wandb:x")`` or
    ``"./wandb:x"`` it is.

    Raises:
        ImportError: the sink needs a package that is not installed.
        TypeError: none of these, or a class.
        ValueError: a string with an unknown kind of sink in front of a colon.
    """
    if isinstance(target, type):
        raise TypeError(f"sink: expected an object, got the class {target.__name__}: make one, {target.__name__}(...)")
    if isinstance(target, str) and (kind := _KIND.match(target)):
        if kind[1] != "tensorboard" or not target.removeprefix("tensorboard:").strip():
            raise ValueError(
                f"sink: expected a path (JSON lines, or a folder FOLDER.parquet), 'tensorboard:FOLDER', a function of "
                f"a list of rows, or an object with open, write and close, got {target!r}; a file of that name is "
                f"{'./' + target!r}"
            )
        from fastfs._monitor.record.tensorboard_sink import TensorBoardSink

        return TensorBoardSink(target.removeprefix("tensorboard:"))
    if isinstance(target, (str, os.PathLike)):
        if os.fspath(target).rstrip("/").endswith(".parquet"):
            from fastfs._monitor.record.parquet_sink import ParquetSink

            return ParquetSink(target)
        return JsonlSink(target)
    if isinstance(target, Sink):
        return target
    if callable(target):
        return CallableSink(target)
    raise TypeError(f"sink: expected a path, a function or an object with open, write and close, got {target!r}")


_KIND = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # two characters at least: C:\\ is a drive


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; those that were not there, the innermost first."""
    missing = []
    for one in (folder, *folder.parents):
        if one.exists():
            break
        missing.append(one)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_folders(made: Sequence[Path]) -> None:
    """Take them back, but for those that hold something by now."""
    with contextlib.suppress(OSError):
        for folder in made:
            folder.rmdir()


def as_sinks(targets: Any) -> list[Any]:
    """The targets of ``sinks=``, each for :func:`as_sink`; nothing is opened.

    Raises:
        TypeError: not a list; a single path or function, say.
    """
    if isinstance(targets, (str, bytes, bytearray)) or not isinstance(targets, Sequence):
        raise TypeError(
            f"sinks: expected a list of paths, functions or sinks, got {targets!r}; one file can be given as path="
        )
    return list(targets)


def checked_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Metadata for the header.

    Raises:
        TypeError: not a dictionary, or JSON cannot hold it.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata: expected a dictionary, got {type(metadata).__name__}")
    result = dict(metadata)
    try:
        to_json(result)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata: expected a dictionary that JSON can hold: {error}") from error
    return result


_ENCODE = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def to_json(value: Any) -> str:
    """One line; NaN and infinities become null.

    Raises:
        TypeError: JSON cannot hold the value.
    """
    try:
        return _ENCODE(value)
    except ValueError:  # not finite
        return _ENCODE(_finite(value))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [None if type(x) is float and not math.isfinite(x) else _finite(x) for x in value]
    return value
