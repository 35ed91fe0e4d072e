"""From what a user gives as ``path=`` or in ``sinks=`` to sinks."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from fastfs._record.sinks.callable_sink import CallableSink
from fastfs._record.sinks.jsonl_sink import JsonlSink
from fastfs._record.sinks.protocol import Sink

__all__ = ["as_sink", "checked_targets"]

_PREFIX = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # at least two characters: C:\\ is a drive


def as_sink(target: Any) -> Sink:
    """Returns the sink that a target stands for.

    A sink stands for itself, a callable for a :class:`CallableSink`, a path that ends in ``.parquet`` for a
    :class:`fastfs.monitor.ParquetSink`, ``"tensorboard:FOLDER"`` for a :class:`fastfs.monitor.TensorBoardSink`, and any
    other path for a :class:`JsonlSink`. A string that begins like a URL (``"wandb:x"``, ``"s3://x"``) is not a path;
    ``pathlib.Path("wandb:x")`` and ``"./wandb:x"`` are.

    Raises:
        ImportError: the sink needs a package that is not installed.
        TypeError: none of these, or a class.
        ValueError: a string with an unknown prefix before a colon.
    """
    if isinstance(target, type):
        raise TypeError(f"sink: expected an object, got the class {target.__name__}: make one, {target.__name__}(...)")
    if isinstance(target, str) and (prefix := _PREFIX.match(target)):
        if prefix[1] != "tensorboard" or not target.removeprefix("tensorboard:").strip():
            raise ValueError(
                f"sink: expected a path (JSON lines, or a folder FOLDER.parquet), 'tensorboard:FOLDER', a function of "
                f"a list of rows, or an object with open, write and close, got {target!r}; a file of that name is "
                f"{'./' + target!r}"
            )
        from fastfs._record.sinks.tensorboard_sink import TensorBoardSink

        return TensorBoardSink(target.removeprefix("tensorboard:"))
    if isinstance(target, (str, os.PathLike)):
        if os.fspath(target).rstrip("/").endswith(".parquet"):
            from fastfs._record.sinks.parquet_sink import ParquetSink

            return ParquetSink(target)
        return JsonlSink(target)
    if isinstance(target, Sink):
        return target
    if callable(target):
        return CallableSink(target)
    raise TypeError(f"sink: expected a path, a function or an object with open, write and close, got {target!r}")


def checked_targets(targets: Any) -> list[Any]:
    """Checks the list of targets given as ``sinks=``. Opens nothing.

    Returns:
        The targets, each for :func:`as_sink`.

    Raises:
        TypeError: not a list, for example a single path or function.
    """
    if isinstance(targets, (str, bytes, bytearray)) or not isinstance(targets, Sequence):
        raise TypeError(
            f"sinks: expected a list of paths, functions or sinks, got {targets!r}; one file can be given as path="
        )
    return list(targets)
