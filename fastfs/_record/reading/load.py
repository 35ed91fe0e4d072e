"""Reads a record into a table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfs._record.columns import PER_LAYER, PER_STEP
from fastfs._record.detail_columns import DETAIL_FIELDS, DETAILS
from fastfs._record.encoding import HEADER_START, parse
from fastfs._record.ranks.part_files import PartFiles, base_of
from fastfs._record.reading.jsonl_reader import RowReader, split_lines
from fastfs._record.reading.locate import find_record
from fastfs._record.reading.rejected_lines import RejectedLines
from fastfs._record.reading.store import Store
from fastfs._record.schema import Checker, Line, UnknownSchemaError

if TYPE_CHECKING:
    import pandas

__all__ = ["load", "load_compact", "load_details", "read_header"]


def load(path: str | os.PathLike[str]) -> pandas.DataFrame:
    """Reads a record into a table with a row for each measured or predicted step and each layer or group, of all runs.

    The columns are ``kind`` (measured or predicted), ``run``, ``step``, ``time`` (seconds since 1970), ``layer`` (its
    index; groups follow the layers), ``name`` and ``group`` (bool), followed by the values per layer (``angle`` in
    radians, ``update_rms`` in feature units per step, ...) and the values per step (``loss``, ``micro_batches``,
    ``overhead_seconds``, ``loss_scale``; ``kappa`` and others if recorded). ``docs/record.md`` lists all of them. A
    missing or undefined number is NaN, a missing string None. ``valid`` and ``linear`` have the dtype ``boolean``, and
    columns of integers the dtype ``float64``, if values are missing.

    If a resumed run repeated steps, the table has only the last repetition. ``attrs`` of the table holds ``headers``
    (one for each start of a run), ``structure``, ``alerts`` and ``skipped`` as lists of dictionaries.

    Args:
        path: a JSONL file or a folder of Parquet parts that :class:`fastfs.Monitor` wrote or is still writing, with
            schema 1 or 2. If every rank has written a file of its own (``merge="files"``), the path that they were
            given, or that of one of the files: all of them are read. Another folder stands for the record in it.

    Returns:
        The table.

    Raises:
        ImportError: pandas is not installed, or pyarrow for Parquet.
        OSError: the file cannot be read.
        ValueError: not a record, or of an unknown schema version.

    Warns:
        RuntimeWarning: lines (or Parquet parts) that do not conform to the schema were left out. Lines that were torn
            because a run was killed do not count.
    """
    try:
        import pandas  # noqa: F401
    except ImportError as error:
        raise ImportError('fastfs.load needs pandas: pip install "fastfs[pandas]"') from error
    return _table(_record(Path(path)), Store(), compact=False)


def load_details(path: str | os.PathLike[str]) -> pandas.DataFrame:
    """Reads what ``Monitor(details=True)`` has recorded of the inside of layers into a table with a row for each value.

    The columns are ``run``, ``step``, ``time`` (seconds since 1970), ``name`` (of a parameter, or of the module that
    calls), ``quantity``, ``index`` (of the head or expert, NaN for all), ``value``, ``standard_error`` (NaN if all rows
    were kept) and ``why`` (the value is NaN, else None). A row without a name says why a step has no details.
    ``docs/monitor.md`` explains the quantities. If a resumed run repeated steps, the table has only the last
    repetition.

    Args:
        path: as for :func:`fastfs.load`.

    Returns:
        The table, empty if the record has no details.

    Raises:
        ImportError: pandas is not installed, or pyarrow for Parquet.
        OSError: the file cannot be read.
        ValueError: not a record, or of an unknown schema version.

    Warns:
        RuntimeWarning: lines (or Parquet parts) that do not conform to the schema were left out.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError('fastfs.monitor.load_details needs pandas: pip install "fastfs[pandas]"') from error
    every_column = (*PER_LAYER, *PER_STEP)
    _, others = _read(_record(Path(path)), Store(leave_out=every_column))
    lines = [line for line in others if line["kind"] == DETAILS]
    data: dict[str, Any] = {name: [] for name in ("run", "step", "time", *(one.name for one in DETAIL_FIELDS))}
    for line in lines:
        count = len(line["entries"]["name"])
        for name, values in data.items():
            values += [line[name]] * count if name in line else line["entries"][name]
    types = {"step": "int64", "time": "float64", "index": "float64", "value": "float64", "standard_error": "float64"}
    return pandas.DataFrame(
        {name: pandas.Series(values, dtype=types.get(name, "object")) for name, values in data.items()}
    )


def read_header(path: str | os.PathLike[str], run: str | None = None) -> dict[str, Any]:
    """Reads the header of a run.

    Args:
        path: a file or folder written by :class:`fastfs.Monitor`.
        run: id of the run; the last one by default. A resumed run has several headers, of which the last one counts.

    Returns:
        The header.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a record, of an unknown schema version, or without that run.
    """
    path = _record(Path(path))
    if path.is_dir():
        from fastfs._record.reading.parquet_reader import read_headers

        headers, rejected = read_headers(path)
    else:
        files = PartFiles(path)
        headers, rejected = _headers(path) if path.exists() or not files.files else ([], RejectedLines(path))
        headers += files.headers()
        _add_rejected(files, rejected)
    found = [header for header in headers if run is None or header["run"] == run]
    _check_found(path, found, rejected, run)
    rejected.warn(stacklevel=2)
    return found[-1]


def load_compact(path: Path, leave_out: Iterable[str] = ()) -> pandas.DataFrame:
    """Reads a record like :func:`load`, in about a third of the memory.

    Numbers per layer are float32, strings are categories, and columns that were not recorded are missing.

    Args:
        path: of the record.
        leave_out: columns that are not needed.

    Returns:
        The table.
    """
    return _table(_record(path), Store(np.float32, leave_out), compact=True)


def _record(path: Path) -> Path:
    """Returns the path of the record of all ranks for the file of one, and of that in a folder that is not Parquet."""
    if path.is_dir() and not any(path.glob("part-*.parquet")):
        try:
            return find_record(path)
        except (OSError, ValueError):  # reading it says what is wrong
            return path
    return base_of(path) or path


def _table(path: Path, store: Store, *, compact: bool) -> pandas.DataFrame:
    from fastfs._record.reading.table import make_table

    headers, others = _read(path, store)
    return make_table(store, _used(headers), others, compact=compact)


def _read(path: Path, store: Store) -> tuple[list[Line], list[Line]]:
    """Reads a record into a store; returns its headers and the lines that are no rows."""
    if path.is_dir():
        from fastfs._record.reading.parquet_reader import read_parts

        headers, others, rejected = read_parts(path, store)
    else:
        reader, files = RowReader(path, store), PartFiles(path)
        if path.exists() or not files.files:
            reader.read()
        for line in files.lines():
            reader.add(line)
        _add_rejected(files, reader.rejected)
        headers, others, rejected = reader.headers, reader.others, reader.rejected
    _check_found(path, headers, rejected)
    rejected.warn(stacklevel=4)
    return headers, others


def _headers(path: Path) -> tuple[list[Line], RejectedLines]:
    """Reads the headers without parsing other lines."""
    checker, headers, rejected = Checker(), [], RejectedLines(path)
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
            if first and b'"header"' not in line and not HEADER_START.startswith(line):
                raise ValueError(f"{path}, line {number}: expected the header of a record: {error}") from None
            if ended and b'"header"' in line:
                rejected.add(number, error)
        first = False
    return headers, rejected


def _add_rejected(files: PartFiles, rejected: RejectedLines) -> None:
    for where, why in files.rejected.items():
        rejected.add(where, why)


def _used(headers: Sequence[Line]) -> list[Line]:
    """Leaves out headers of runs that continued an earlier one instead, and therefore have no rows."""
    replaced = {header.get("replaces") for header in headers}
    return [header for header in headers if header["run"] not in replaced]


def _check_found(path: Path, headers: Sequence[Line], rejected: RejectedLines, run: str | None = None) -> None:
    if not headers:
        what = f"no run {run!r}" if run else "holds no run of fastfs.Monitor"
        raise ValueError(f"{path}: {what}{'' if run else rejected.reason}")
