"""From a record on disk to a table."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfs.monitor.record.rows import TABLED, row_names
from fastfs.monitor.record.sinks import TORN

if TYPE_CHECKING:
    import pandas

__all__ = ["load", "read_header", "read_record"]

_SCHEMAS = (1, 2)

Line = dict[str, Any]


def load(path: str | os.PathLike[str]) -> pandas.DataFrame:
    """A record as a table: one row for each measured or predicted record and layer or group, of all runs in it.

    Columns: ``kind`` (measured or predicted), ``run``, ``step``, ``time`` (seconds since 1970), ``layer`` (its number;
    groups come after the layers), ``name``, ``group`` (bool), then what was recorded (``angle`` in radians,
    ``update_rms`` in features per step, ...) and what belongs to the whole step (``loss``, ``micro_batches``,
    ``overhead_seconds``, ``loss_scale``). Numbers that are absent or were undefined are NaN, strings None; ``valid`` is
    NA where absent (then its dtype is ``boolean``), and columns of integers become floats where some are absent.

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
        RuntimeWarning: lines that cannot be read are left out, other than where a run was killed.
    """
    try:
        import pandas  # noqa: F401
    except ImportError as error:
        raise ImportError('fastfs.load needs pandas: pip install "fastfs[pandas]"') from error
    from fastfs.report.table import Builder

    path = Path(path)
    if path.is_dir():
        from fastfs.report.parquet import read_parts

        parts, headers = read_parts(path)
        _check_schemas(path, headers)
        _some(path, headers)
        builder = Builder()
        for header, part, others in parts:
            _resume(builder, header)
            builder.add_frame(part)
            for line in others:
                builder.add_other(line)
        return builder.table(_used(headers))
    headers = []
    names: dict[str, Sequence[str]] = {}
    layers: dict[str, int] = {}
    builder = Builder()
    for line in _lines(path):
        kind, run = line["kind"], line.get("run", "")
        if kind == "header":
            _check_schemas(path, [line])
            headers.append(line)
            names[run], layers[run] = row_names(line)
            _resume(builder, line)
        elif kind not in TABLED:
            builder.add_other(line)
        elif "layer" in line:  # schema 1: a line for each layer
            builder.add_row(line)
        else:
            builder.add(line, names.get(run, ()), layers.get(run, 0))
    _some(path, headers)
    return builder.table(_used(headers))


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
        from fastfs.report.parquet import read_headers

        headers = read_headers(path)
    else:
        headers = [line for line in _lines(path) if line["kind"] == "header"]
    _check_schemas(path, headers)
    found = [header for header in headers if run is None or header["run"] == run]
    _some(path, found, run)
    return found[-1]


def _resume(builder: Any, header: Line) -> None:
    if header.get("resumed_at") is not None:
        builder.forget(header["run"], int(header["resumed_at"]))


def _used(headers: Sequence[Line]) -> list[Line]:
    """Without those of runs that an earlier one was loaded into: they have no rows."""
    replaced = {header.get("replaces") for header in headers}
    return [header for header in headers if header["run"] not in replaced]


def _check_schemas(path: Path, headers: Sequence[Line]) -> None:
    for header in headers:
        if header.get("schema") not in _SCHEMAS:
            raise ValueError(f"{path}: schema {header.get('schema')!r}; this version of fastfs reads {list(_SCHEMAS)}")


def _some(path: Path, headers: Sequence[Line], run: str | None = None) -> None:
    if not headers:
        raise ValueError(f"{path}: no run {run!r}" if run else f"{path}: holds no run of fastfs.Monitor")


def _lines(path: Path) -> Iterator[Line]:
    """All records of the file, of which the first must be a header; without lines that cannot be read.

    A line that a killed process left torn, the last or one before a header, is nothing to speak of, nor is one that the
    sink marked as torn, since it wrote the record again; others are reported by one warning.
    """
    started = False
    torn: list[int] = []  # since the last record
    left_out: list[int] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.strip()
            if not line:
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or "kind" not in record:
                    raise ValueError("not a record of fastfs.Monitor")
            except ValueError as error:
                if not started and not line.startswith(_HEADER[: len(line)]):
                    raise ValueError(f"{path}, line {number}: expected the header of a record: {error}") from None
                if not line.endswith(TORN):
                    torn.append(number)
                continue
            if not started and record["kind"] != "header":
                raise ValueError(f"{path}, line {number}: expected the header of a record, got {record['kind']!r}")
            if torn and record["kind"] == "header":
                torn.pop()  # where the run before was killed
            left_out += torn
            torn = []
            started = True
            yield record
    left_out += torn[:-1]
    if left_out:
        numbers = ", ".join(map(str, left_out[:10])) + (", ..." if len(left_out) > 10 else "")
        warnings.warn(
            f"{path}, line {numbers}: cannot be read and is left out (a write that failed, on a full disk perhaps)",
            RuntimeWarning,
            stacklevel=3,
        )


_HEADER = b'{"kind":"header",'
