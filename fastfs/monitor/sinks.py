"""Where rows go: plain dictionaries of numbers and strings, in batches."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

__all__ = ["CallableSink", "JsonlSink", "Row", "Sink", "as_sink", "as_sinks", "checked_metadata"]

Row = dict[str, Any]


@runtime_checkable
class Sink(Protocol):
    """Takes a header once, then batches of rows, then ``close``."""

    def open(self, header: Mapping[str, Any]) -> None: ...

    def write(self, rows: Sequence[Row]) -> None: ...

    def close(self) -> None: ...


class CallableSink:
    """Calls a function with every batch of rows: ``sinks=[rows.extend]`` collects them in a list."""

    def __init__(self, function: Callable[[list[Row]], object]) -> None:
        self._function = function

    def open(self, header: Mapping[str, Any]) -> None:
        pass

    def write(self, rows: Sequence[Row]) -> None:
        self._function(list(rows))

    def close(self) -> None:
        pass


class JsonlSink:
    """Appends to a file, one JSON object a line: a header per run, then one line per measured step and layer.

    Every batch is one write to the operating system, so that a killed process loses nothing that was written and at
    worst leaves its last line torn, which the reader tolerates. So does a write that the disk cuts short; the next one
    starts on a line of its own. Each line carries the id of its run: several runs, one
    after the other or at the same time, can share a file. NaN and infinities become null.

    Args:
        path: the file; missing folders are made.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._torn = False  # the last line written has no end

    def open(self, header: Mapping[str, Any]) -> None:
        self._torn = not self._ends_a_line()
        self._append([header])

    def write(self, rows: Sequence[Row]) -> None:
        self._append(rows)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        if self._descriptor is None:
            raise ValueError(f"{self.path}: this sink is closed")
        data = (b"\n" if self._torn else b"") + b"".join(_line(line) for line in lines)
        while data:
            written = os.write(self._descriptor, data)
            if written:
                self._torn = data[written - 1 : written] != b"\n"
            data = data[written:]

    def _ends_a_line(self) -> bool:
        """False if an earlier run was killed in the middle of a line."""
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        if size == 0:
            return True
        with self.path.open("rb") as file:
            file.seek(size - 1)
            return file.read(1) == b"\n"


def as_sink(target: Any) -> Sink:
    """A sink as it is, a path as :class:`JsonlSink`, a callable as :class:`CallableSink`.

    Raises:
        TypeError: none of these, or a class.
    """
    if isinstance(target, type):
        raise TypeError(f"sink: expected an object, got the class {target.__name__}: make one, {target.__name__}(...)")
    if isinstance(target, (str, os.PathLike)):
        return JsonlSink(target)
    if isinstance(target, Sink):
        return target
    if callable(target):
        return CallableSink(target)
    raise TypeError(f"sink: expected a path, a function or an object with open, write and close, got {target!r}")


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
        _line(result)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata: expected a dictionary that JSON can hold: {error}") from error
    return result


_ENCODE = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        text = _ENCODE(record)
    except ValueError:  # not finite
        text = _ENCODE(_finite(record))
    return text.encode() + b"\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
