"""Reads the folders that :class:`fastfs.monitor.parquet.ParquetSink` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import pyarrow.parquet
except ImportError as missing:
    raise ImportError('fastfs: reading Parquet needs pyarrow: pip install "fastfs[parquet]"') from missing

from fastfs.monitor.record.parquet import HEADER_KEY, OTHERS_KEY

__all__ = ["read_headers", "read_parts"]

Line = dict[str, Any]


def read_parts(folder: Path) -> tuple[list[tuple[Line, Any, list[Line]]], list[Line]]:
    """The parts of all runs in order: header, table (pandas) and other records of each; and the headers, each once."""
    headers: list[Line] = []
    parts = []
    for path, header, metadata in _ordered(folder):
        again = header in headers
        if not again:
            headers.append(header)
        table = pyarrow.parquet.ParquetFile(path).read().to_pandas()
        # Only the first part of a run that goes on says so: the others would forget its own steps.
        told = {**header, "resumed_at": None} if again else header
        parts.append((told, table, json.loads(metadata[OTHERS_KEY])))
    return parts, headers


def read_headers(folder: Path) -> list[Line]:
    """The header of each start of a run, in order."""
    headers: list[Line] = []
    for _, header, _ in _ordered(folder):
        if header not in headers:
            headers.append(header)
    return headers


def _ordered(folder: Path) -> list[tuple[Path, Line, Mapping[bytes, bytes]]]:
    """Runs by their start, parts by their number."""
    found = []
    for path in sorted(folder.glob("part-*.parquet")):
        metadata = pyarrow.parquet.read_metadata(path).metadata
        if not metadata or HEADER_KEY not in metadata:
            raise ValueError(f"{path}: expected a part of a record of fastfs.Monitor")
        found.append((path, json.loads(metadata[HEADER_KEY]), metadata))
    starts: dict[str, str] = {}
    for _, header, _ in found:
        starts[header["run"]] = min(starts.get(header["run"], "~"), str(header.get("started", "")))
    found.sort(key=lambda part: (starts[part[1]["run"]], part[1]["run"], part[0].name))
    return found
