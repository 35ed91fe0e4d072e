"""From a record on disk to a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfs._monitor.record.schema import Checker, UnknownSchemaError, parse
from fastfs._report.jsonl_reader import HEADER, LeftOut, RowReader, split_lines
from fastfs._report.store import Store

if TYPE_CHECKING:
    import pandas

__all__ = ["load", "read_header", "read_record"]

Line = dict[str, Any]


def load(path: str | os.PathLike[str]) -> pandas.DataFrame:
    """A record as a table: one row for each measured or predicted record and layer or group, of all runs in it.

    Columns: ``kind`` (measured or predicted), ``run``, ``step``, ``time`` (seconds since 1970), ``layer`` (its number;
    groups come after the layers), ``name``, ``group`` (bool), then what was recorded (``angle`` in radians,
    ``update_rms`` in features per step, ...) and what belongs to the whole step (``loss``, ``micro_batches``,
    ``overhead_seconds``, ``loss_scale``; ``kappa`` and others where recorded). Numbers that are absent or were
    undefined are NaN, strings None; ``valid`` and ``linear`` are NA where absent (then their dtype is ``boolean``), and
    columns of integers become floats where some are absent.

    When a run was resumed, steps that it did again are in the table once, as done last. ``attrs`` of the table holds
    ``headers`` (one for each start of a run), and ``structure``, ``alerts`` and ``skipped``: lists of dictionaries.

    Args:
        path: a JSONL file or a folder of Parquet parts written by :class:`fastfs.Monitor`, also one that is still
            being written. Files of the first version (schema 1) are read, too.

    Raises:
        ImportError: pandas is not installed, or pyarrow for Parquet.
        OSError: the file cannot be read.
        ValueError: not a record, or of an unknown schema version.

    Warns:
        RuntimeWarning: lines (parts, of Parquet) that are not of the format are left out, other than where a run was
            killed: how many, and the first reason.
    """
    try:
        import pandas  # noqa: F401
    except ImportError as error:
        raise ImportError('fastfs.load needs pandas: pip install "fastfs[pandas]"') from error
    return _table(Path(path), Store(), compact=False)


read_record = load
"""Another name of :func:`load`."""


def read_header(path: str | os.PathLike[str], run: str | None = None) -> dict[str, Any]:
    """The header of a run in a record: what ran, on what, since when.

    Args:
        path: a file or folder written by :class:`fastfs.Monitor`.
        run: id of the run; the last one by default. Of a run that was resumed, the last header.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a record, of another schema version, or without that run.
    """
    path = Path(path)
    if path.is_dir():
        from fastfs._report.parquet_reader import read_headers

        headers, left_out = read_headers(path)
    else:
        headers, left_out = _headers(path)
    found = [header for header in headers if run is None or header["run"] == run]
    _some(path, found, left_out, run)
    left_out.warn(stacklevel=2)
    return found[-1]


def load_compact(path: Path) -> pandas.DataFrame:
    """What a report needs of a record, in a third of the memory.

    As :func:`load`, with columns in float32, strings as categories, and only what was recorded and is shown.
    """
    return _table(path, Store(np.float32, _NOT_REPORTED), compact=True)


_NOT_REPORTED = ("method", "nonfinite", "count", "rows", "micro_batches", "loss_scale")


def _table(path: Path, store: Store, *, compact: bool) -> pandas.DataFrame:
    from fastfs._report.table import make_table

    if path.is_dir():
        from fastfs._report.parquet_reader import read_parts

        headers, others, left_out = read_parts(path, store)
    else:
        reader = RowReader(path, store)
        reader.read()
        headers, others, left_out = reader.headers, reader.others, reader.left_out
    _some(path, headers, left_out)
    left_out.warn(stacklevel=3)
    return make_table(store, _used(headers), others, compact=compact)


def _headers(path: Path) -> tuple[list[Line], LeftOut]:
    """The headers alone: other lines are not parsed."""
    checker, headers, left_out = Checker(), [], LeftOut(path)
    first = True
    for number, raw, ended in split_lines(path):
        line = raw.strip()
        if not line or (not first and b'"header"' not in line and b"\\u" not in line):
            continue
        try:
            value = parse(line)
            if first or (isinstance(value, dict) and value.get("kind") == "header"):
                checked = checker.check(value)
                if checked.kind == "header":
                    headers.append(checked.line)
        except UnknownSchemaError as error:
            raise ValueError(f"{path}: {error}") from None
        except ValueError as error:
            if first and b'"header"' not in line and not HEADER.startswith(line):
                raise ValueError(f"{path}, line {number}: expected the header of a record: {error}") from None
            if ended and b'"header"' in line:
                left_out.add(number, error)
        first = False
    return headers, left_out


def _used(headers: Sequence[Line]) -> list[Line]:
    """Without those of runs that an earlier one was loaded into: they have no rows."""
    replaced = {header.get("replaces") for header in headers}
    return [header for header in headers if header["run"] not in replaced]


def _some(path: Path, headers: Sequence[Line], left_out: LeftOut, run: str | None = None) -> None:
    if not headers:
        what = f"no run {run!r}" if run else "holds no run of fastfs.Monitor"
        raise ValueError(f"{path}: {what}{'' if run else left_out.reason}")
