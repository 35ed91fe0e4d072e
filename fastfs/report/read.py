"""From a record on disk to a table."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

__all__ = ["read_header", "read_record"]

_SCHEMAS = (1,)
_INTEGERS = ("step", "layer", "nonfinite", "count", "micro_batches")
_STRINGS = ("kind", "run", "name")
_FLOATS = (
    "time",
    "angle",
    "cos_angle",
    "update_rms",
    "relative_update",
    "feature_rms",
    "backward_rms",
    "noise_floor",
    "loss",
    "measure_seconds",
)


def _lines(path: Path) -> list[dict[str, Any]]:
    """All records of the file, but for lines that a killed process left torn: the last, or one before a header."""
    raw = path.read_bytes().split(b"\n")
    records: list[dict[str, Any]] = []
    torn = 0
    for number, line in enumerate(raw, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "kind" not in record:
                raise ValueError("not a record of fastfs.Monitor")
        except ValueError as error:
            if torn:
                raise ValueError(
                    f"{path}, line {torn}: cannot be read, and it is not where a killed run ended"
                ) from None
            torn = number
            if number == 1 and len(raw) > 1:
                raise ValueError(f"{path}, line 1: {error}") from None
            continue
        if torn and record["kind"] != "header":
            raise ValueError(f"{path}, line {torn}: cannot be read, and it is not where a killed run ended")
        torn = 0
        records.append(record)
    return records


def read_header(path: str | os.PathLike[str], run: str | None = None) -> dict[str, Any]:
    """The header of a run in a record: what ran, on what, since when.

    Args:
        path: a file written by :class:`fastfs.Monitor`.
        run: id of the run; the last one in the file by default.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a record, of another schema version, or without that run.
    """
    path = Path(path)
    headers = [record for record in _lines(path) if record["kind"] == "header"]
    for header in headers:
        if header.get("schema") not in _SCHEMAS:
            raise ValueError(f"{path}: schema {header.get('schema')!r}; this version of fastfs reads {list(_SCHEMAS)}")
    found = [header for header in headers if run is None or header["run"] == run]
    if not found:
        raise ValueError(f"{path}: no run {run!r}" if run else f"{path}: holds no run of fastfs.Monitor")
    return found[-1]


def read_record(path: str | os.PathLike[str]) -> pandas.DataFrame:
    """A record as a table: one line per measured step and layer, of all runs in the file (column ``run``).

    Quantities that were undefined are NaN. Units: ``angle`` in radians, ``update_rms`` (feature speed) in features per
    step, ``time`` in seconds since 1970.

    Args:
        path: a file written by :class:`fastfs.Monitor`, also one that is still being written.

    Raises:
        ImportError: pandas is not installed.
        OSError: the file cannot be read.
        ValueError: not a record, of another schema version, or damaged elsewhere than where a run was killed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError('fastfs.report.read_record needs pandas: pip install "fastfs[pandas]"') from error

    path = Path(path)
    read_header(path)  # not a record, another schema
    rows = [record for record in _lines(path) if record["kind"] != "header"]
    columns = [*_STRINGS, *_INTEGERS, *_FLOATS, "valid"]
    table = pandas.DataFrame({name: [row.get(name) for row in rows] for name in columns})
    kinds = {
        **dict.fromkeys(_STRINGS, "object"),
        **dict.fromkeys(_INTEGERS, "int64"),
        **dict.fromkeys(_FLOATS, "float64"),
    }
    table = table.astype({**kinds, "valid": "bool"})
    order = ("kind", "run", "step", "time", "layer", "name", "angle", "cos_angle", "update_rms", "relative_update")
    return table[[*order, *(name for name in columns if name not in order)]]
