"""From a record on disk to a table."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

__all__ = ["load", "read_header", "read_record"]

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
    """All records of the file, of which the first must be a header; without lines that cannot be read.

    A line that a killed process left torn, the last or one before a header, is nothing to speak of; others are reported
    by one warning.
    """
    raw = path.read_bytes().split(b"\n")
    records: list[dict[str, Any]] = []
    torn: list[int] = []  # since the last record
    left_out: list[int] = []
    for number, line in enumerate(raw, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "kind" not in record:
                raise ValueError("not a record of fastfs.Monitor")
        except ValueError as error:
            if not records:
                raise ValueError(f"{path}, line {number}: expected the header of a record: {error}") from None
            torn.append(number)
            continue
        if not records and record["kind"] != "header":
            raise ValueError(f"{path}, line {number}: expected the header of a record, got {record['kind']!r}")
        if record["kind"] == "header":
            torn = torn[:-1]  # where the run before was killed
        left_out += torn
        torn = []
        records.append(record)
    left_out += torn[:-1]
    if left_out:
        numbers = ", ".join(map(str, left_out[:10])) + (", ..." if len(left_out) > 10 else "")
        warnings.warn(
            f"{path}, line {numbers}: cannot be read and is left out (a write that failed, on a full disk perhaps)",
            RuntimeWarning,
            stacklevel=3,
        )
    return records


def _header(path: Path, records: list[dict[str, Any]], run: str | None = None) -> dict[str, Any]:
    headers = [record for record in records if record["kind"] == "header"]
    for header in headers:
        if header.get("schema") not in _SCHEMAS:
            raise ValueError(f"{path}: schema {header.get('schema')!r}; this version of fastfs reads {list(_SCHEMAS)}")
    found = [header for header in headers if run is None or header["run"] == run]
    if not found:
        raise ValueError(f"{path}: no run {run!r}" if run else f"{path}: holds no run of fastfs.Monitor")
    return found[-1]


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
    return _header(path, _lines(path), run)


def read_record(path: str | os.PathLike[str]) -> pandas.DataFrame:
    """A record as a table: one line per measured step and layer, of all runs in the file (column ``run``).

    Quantities that were undefined are NaN. Units: ``angle`` in radians, ``update_rms`` (feature speed) in features per
    step, ``time`` in seconds since 1970.

    Args:
        path: a file written by :class:`fastfs.Monitor`, also one that is still being written.

    Raises:
        ImportError: pandas is not installed.
        OSError: the file cannot be read.
        ValueError: not a record, or of another schema version.

    Warns:
        RuntimeWarning: lines that cannot be read are left out, other than where a run was killed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError('fastfs.report.read_record needs pandas: pip install "fastfs[pandas]"') from error

    path = Path(path)
    records = _lines(path)
    _header(path, records)  # not a record, another schema
    rows = [record for record in records if record["kind"] != "header"]
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


def load(path: str | os.PathLike[str]) -> pandas.DataFrame:
    """A record of schema 2 as a tidy table: one row per record of a step and layer or group.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a record.
    """
    import pandas

    path = Path(path)
    records: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record = None
        if record is None:
            continue
        if not records and (not isinstance(record, dict) or record.get("kind") != "header"):
            raise ValueError(f"{path}, line {number}: expected the header of a record")
        records.append(record)
    if not records:
        raise ValueError(f"{path}: holds no record of fastfs.Monitor")
    kinds: dict[str, list[dict[str, Any]]] = {}
    tables = []
    names: list[str] = []
    layers = 0
    for record in records:
        kinds.setdefault(record["kind"], []).append(record)
        if record["kind"] == "header":
            layers = len(record["layers"])
            names = [*record["layers"], *record.get("groups", {})]
        elif record["kind"] in ("measured", "predicted"):
            common = {key: value for key, value in record.items() if key != "layers"}
            count = len(next(iter(record["layers"].values())))
            tables.append(
                {
                    **{key: [value] * count for key, value in common.items()},
                    "layer": list(range(count)),
                    "name": names[:count],
                    "group": [i >= layers for i in range(count)],
                    **record["layers"],
                }
            )
    columns = list(dict.fromkeys(key for part in tables for key in part))
    joined = {c: [v for part in tables for v in part.get(c, [None] * len(part["layer"]))] for c in columns}
    table = pandas.DataFrame(joined)
    table = table.astype(
        {c: "float64" for c in columns if c not in ("kind", "run", "name", "why", "method", "valid", "group")}
    )
    table.attrs = {
        "headers": kinds.get("header", []),
        "structure": kinds.get("structure", []),
        "alerts": kinds.get("alert", []),
        "skipped": kinds.get("skipped", []),
    }
    return table
