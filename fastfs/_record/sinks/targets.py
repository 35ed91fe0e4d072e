"""From what a user gives as ``path=`` or in ``sinks=`` to sinks."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fastfs._record.sinks.callable_sink import CallableSink
from fastfs._record.sinks.jsonl_sink import JsonlSink
from fastfs._record.sinks.protocol import Sink

__all__ = ["OPTIONAL_SINKS", "as_path", "as_sink", "checked_targets", "lines_path"]

OPTIONAL_SINKS = {
    "MlflowSink": "mlflow_sink",
    "OpenTelemetrySink": "opentelemetry_sink",
    "ParquetSink": "parquet_sink",
    "PrometheusSink": "prometheus_sink",
    "TensorBoardSink": "tensorboard_sink",
    "TrackioSink": "trackio_sink",
    "WandbSink": "wandb_sink",
}
"""Module of each class that needs an optional package, below ``fastfs._record.sinks``. Importing it says which."""

_NAMED = {
    "logging": ("LoggingSink", ""),
    "mlflow": ("MlflowSink", ""),
    "opentelemetry": ("OpenTelemetrySink", ""),
    "prometheus": ("PrometheusSink", "PORT"),
    "tensorboard": ("TensorBoardSink", "FOLDER"),
    "trackio": ("TrackioSink", ""),
    "wandb": ("WandbSink", ""),
}
"""By name: a class, and what may follow the name and a colon."""

_PREFIX = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # at least two characters: C:\\ is a drive
_WORD = re.compile(r"[^/\\.:]+")


def as_sink(target: Any) -> Sink:
    """Returns the sink that a target stands for.

    A sink stands for itself, a callable for a :class:`CallableSink`, a path that ends in ``.parquet`` for a
    :class:`fastfs.monitor.ParquetSink`, and any other path for a :class:`JsonlSink`. A string that is a single word or
    begins like a URL is not a path but the name of a sink: ``"wandb"``, ``"tensorboard:FOLDER"``,
    ``"prometheus:9100"``. ``pathlib.Path("wandb")`` and ``"./wandb"`` are paths.

    Raises:
        ImportError: the sink needs a package that is not installed.
        TypeError: none of these, or a class.
        ValueError: a string that looks like the name of a sink and is none.
    """
    if isinstance(target, type):
        raise TypeError(f"sink: expected an object, got the class {target.__name__}: make one, {target.__name__}(...)")
    if _is_name(target):
        return _named(target)
    if (path := lines_path(target)) is not None:
        return JsonlSink(path)
    if isinstance(target, (str, os.PathLike)):
        return _made("ParquetSink", target)
    if isinstance(target, Sink):
        return target
    if callable(target):
        return CallableSink(target)
    raise TypeError(f"sink: expected a path, a function or an object with open, write and close, got {target!r}")


def as_path(target: Any) -> Any:
    """Returns a target that was given as ``path=``, where a single word is always the name of a file."""
    return Path(target) if isinstance(target, str) and _WORD.fullmatch(target) else target


def lines_path(target: Any) -> Path | None:
    """Returns the file of JSON lines that a target stands for; None if it stands for another sink."""
    if not isinstance(target, (str, os.PathLike)) or _is_name(target):
        return None
    return None if os.fspath(target).rstrip("/").endswith(".parquet") else Path(target)


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


def _is_name(target: Any) -> bool:
    return isinstance(target, str) and bool(not target or _WORD.fullmatch(target) or _PREFIX.match(target))


def _named(target: str) -> Sink:
    name, colon, argument = target.partition(":")
    kind, takes = _NAMED.get(name, ("", ""))
    if takes == "FOLDER" and argument.strip():
        return _made(kind, argument)
    if takes == "PORT" and re.fullmatch(r"[0-9]+", argument):
        return _made(kind, port=int(argument))
    if kind and takes != "FOLDER" and not colon:
        return _made(kind)
    names = ", ".join(f"{name!r}" for name, (_, takes) in _NAMED.items() if takes != "FOLDER")
    raise ValueError(
        f"sink: expected a path (JSON lines, or a folder FOLDER.parquet), {names}, 'prometheus:PORT', "
        "'tensorboard:FOLDER', a function of a list of rows, or an object with open, write and close, got "
        f"{target!r}; a file of that name is {'./' + target!r}"
    )


def _made(kind: str, *arguments: Any, **options: Any) -> Sink:
    module = OPTIONAL_SINKS.get(kind, "logging_sink")
    sink: Sink = getattr(import_module(f"fastfs._record.sinks.{module}"), kind)(*arguments, **options)
    return sink
