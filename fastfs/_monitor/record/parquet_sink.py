"""Records as a folder of Parquet files. Needs the extra ``parquet``."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfs._monitor.record.record import (
    BOOLEANS,
    COLUMNS,
    INTEGERS,
    SCALARS,
    STRINGS,
    TABLED,
    Record,
    as_line,
    row_names,
)
from fastfs._monitor.record.sinks import make_folders, remove_folders, to_json

try:
    import pyarrow
    import pyarrow.parquet
except ImportError as missing:
    raise ImportError('fastfs: a Parquet sink needs pyarrow: pip install "fastfs[parquet]"') from missing

__all__ = ["HEADER_KEY", "OTHERS_KEY", "ParquetSink"]

HEADER_KEY = b"fastfs.header"
"""In the metadata of each part: the header of its run, as JSON."""

OTHERS_KEY = b"fastfs.others"
"""In the metadata of each part: the records that are no rows (structure, skipped, alerts), as a JSON list of lines."""


class ParquetSink:
    """Part files with the columns of :func:`fastfs.load`: one row for each record and layer.

    A part is written every ``part_seconds``, every ``part_rows`` rows, at a flush and at the end: under another name
    first, then renamed, so that whatever happens every part can be read. Rows that are not yet in a part are lost when
    the process is killed. Several runs can share a folder; a run that is resumed adds parts. So can
    processes at the same time, also where they go on with the same run: no part replaces another.

    Args:
        folder: made if missing; by custom its name ends in ``.parquet``.
        part_seconds: how long a row may wait for its part.
        part_rows: rows in a part, about.

    Raises:
        OSError: the folder cannot be made.
        ValueError: a setting out of range.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, part_seconds: float = 300.0, part_rows: int = 100_000
    ) -> None:
        if not part_seconds >= 0 or part_rows < 1:
            raise ValueError(
                f"expected part_seconds >= 0 and part_rows >= 1, got part_seconds={part_seconds!r}, "
                f"part_rows={part_rows!r}"
            )
        self.folder = Path(folder)
        self._part_seconds = part_seconds
        self._part_rows = part_rows
        self._header: dict[str, Any] = {}
        self._number = 0
        self._records: list[Record] = []
        self._rows = 0
        self._since = 0.0
        self._closed = False
        self._parts: list[Path] = []  # the first ones, until a record came
        self._made = make_folders(self.folder)

    def open(self, header: Mapping[str, Any]) -> None:
        """Write a first part without rows: the header is safe, and the folder known to be writable."""
        self._header = dict(header)
        run = re.escape(header["run"])
        for path in self.folder.glob(".*.tmp"):
            if re.fullmatch(rf"\.part-{run}-\d+(\.[0-9a-f]+)?\.tmp", path.name):
                _remove_left(path)  # of this run, killed while it wrote
        parts = [re.fullmatch(rf"part-{run}-(\d+)\.parquet", path.name) for path in self.folder.iterdir()]
        self._number = max((int(part[1]) + 1 for part in parts if part), default=0)
        self._write_part()

    def write(self, records: Sequence[Record]) -> None:
        if self._closed:
            raise ValueError(f"{self.folder}: this sink is closed")
        if self._full():  # the part could not be written: the new records stay with the caller
            self._write_part()
        if not self._records:
            self._since = time.monotonic()
        self._records += records
        self._rows += sum(_length(record) or 1 for record in records)

    def due(self) -> float | None:
        if not self._records:
            return None
        return 0.0 if self._full() else self._since + self._part_seconds

    def flush(self) -> None:
        if self._records:
            self._write_part()

    def close(self) -> None:
        if not self._closed:
            self.flush()
            self._closed = True

    def discard(self) -> None:
        """Close, and take back what this sink made."""
        self._records, self._rows, self._closed = [], 0, True
        for path in self._parts:
            path.unlink(missing_ok=True)
        remove_folders(self._made)

    def _full(self) -> bool:
        return self._rows >= self._part_rows

    def _write_part(self) -> None:
        others = [as_line(record, self._header["run"]) for record in self._records if record.kind not in TABLED]
        table = _table([record for record in self._records if record.kind in TABLED], self._header)
        table = table.replace_schema_metadata({HEADER_KEY: to_json(self._header), OTHERS_KEY: to_json(others)})
        name = f"part-{self._header['run']}-{self._number:06d}"
        temporary = self.folder / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            with temporary.open("xb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # until it is closed: nobody takes it for the rest of a killed process
                pyarrow.parquet.write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
                path = self._named(temporary)
        finally:
            temporary.unlink(missing_ok=True)
        self._number += 1
        self._parts = [] if self._records else [*self._parts, path]
        self._records, self._rows = [], 0

    def _named(self, temporary: Path) -> Path:
        """Give a part its name, the next that is free: another process may go on with this run."""
        while True:
            path = self.folder / f"part-{self._header['run']}-{self._number:06d}.parquet"
            try:
                os.link(temporary, path)
                return path
            except FileExistsError:
                self._number += 1
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK) or path.exists():
                    raise
                temporary.rename(path)  # a file system without links
                return path


def _remove_left(path: Path) -> None:
    """Remove what a killed process was writing; not what a living one is."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        path.unlink()


def _length(record: Record) -> int:
    return max(map(len, record.columns.values()), default=0) if record.kind in TABLED else 0


def _table(records: Sequence[Record], header: Mapping[str, Any]) -> pyarrow.Table:
    names, layers = row_names(header)
    columns: dict[str, list[Any]] = {name: [] for name in ("kind", "run", "step", "time", "layer", "name", "group")}
    extra = dict.fromkeys(name for record in records for name in (*record.columns, *record.scalars))
    quantities = [*COLUMNS, *(name for name in extra if name not in COLUMNS and name not in SCALARS), *SCALARS]
    columns.update({name: [] for name in quantities})
    for record in records:
        length = _length(record)
        columns["kind"] += [record.kind] * length
        columns["run"] += [header["run"]] * length
        columns["step"] += [record.step] * length
        columns["time"] += [record.time] * length
        columns["layer"] += range(length)
        columns["name"] += [names[i] if i < len(names) else str(i) for i in range(length)]
        columns["group"] += [i >= layers for i in range(length)]
        for name in quantities:
            if name in record.columns:
                column = record.columns[name]
                columns[name] += column
                columns[name] += [None] * (length - len(column))
            else:
                columns[name] += [record.scalars.get(name)] * length
    arrays = {name: pyarrow.array(values, _type(name, values)) for name, values in columns.items()}
    return pyarrow.table(arrays)


def _type(name: str, values: Sequence[Any]) -> pyarrow.DataType:
    if name in ("kind", "run", "name", *STRINGS) or any(isinstance(value, str) for value in values):
        return pyarrow.string()
    if name in ("group", *BOOLEANS):
        return pyarrow.bool_()
    return pyarrow.int64() if name in ("step", "layer", *INTEGERS) else pyarrow.float64()
