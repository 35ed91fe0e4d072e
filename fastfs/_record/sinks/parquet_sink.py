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

from fastfs._record.columns import ALWAYS_PER_STEP, KEYS, PER_LAYER, ROW_KINDS, type_of
from fastfs._record.encoding import HEADER_KEY, OTHERS_KEY, to_json
from fastfs._record.record import Record, as_line
from fastfs._record.schema import row_names
from fastfs._record.sinks.folders import make_folders, remove_folders

try:
    import pyarrow
    import pyarrow.parquet
except ImportError as missing:
    raise ImportError('fastfs: a Parquet sink needs pyarrow: pip install "fastfs[parquet]"') from missing

__all__ = ["ParquetSink"]

_ARROW_TYPES = {
    "number": pyarrow.float64(),
    "integer": pyarrow.int64(),
    "boolean": pyarrow.bool_(),
    "string": pyarrow.string(),
}


class ParquetSink:
    """Writes part files with the columns of :func:`fastfs.load`: one row for each record and layer.

    A part is written every ``part_seconds``, every ``part_rows`` rows, at a flush and at the end, under a temporary
    name first, so that every part can always be read. Rows that are not yet in a part are lost when the process is
    killed. Several runs can share a folder, also from several processes at the same time and also if these continue the
    same run: no part replaces another. A run that is resumed adds parts.

    Args:
        folder: created if missing; by convention its name ends in ``.parquet``.
        part_seconds: the longest time that a row waits for its part.
        part_rows: approximate number of rows in a part.

    Raises:
        OSError: the folder cannot be created.
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
        self._parts: list[Path] = []  # written before the first record
        self._made = make_folders(self.folder)

    def open(self, header: Mapping[str, Any]) -> None:
        """Writes a first part without rows, which keeps the header safe and shows that the folder is writable."""
        self._header = dict(header)
        run = re.escape(header["run"])
        for path in self.folder.glob(".*.tmp"):
            if re.fullmatch(rf"\.part-{run}-\d+(\.[0-9a-f]+)?\.tmp", path.name):
                _remove_left(path)  # this run was killed while it wrote
        parts = [re.fullmatch(rf"part-{run}-(\d+)\.parquet", path.name) for path in self.folder.iterdir()]
        self._number = max((int(part[1]) + 1 for part in parts if part), default=0)
        self._write_part()

    def write(self, records: Sequence[Record]) -> None:
        if self._closed:
            raise ValueError(f"{self.folder}: this sink is closed")
        if self._full():  # the last part failed: if it fails again, the new records stay with the caller
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
        """Closes the sink and removes what it created."""
        self._records, self._rows, self._closed = [], 0, True
        for path in self._parts:
            path.unlink(missing_ok=True)
        remove_folders(self._made)

    def _full(self) -> bool:
        return self._rows >= self._part_rows

    def _write_part(self) -> None:
        others = [as_line(record, self._header["run"]) for record in self._records if record.kind not in ROW_KINDS]
        table = _table([record for record in self._records if record.kind in ROW_KINDS], self._header)
        table = table.replace_schema_metadata({HEADER_KEY: to_json(self._header), OTHERS_KEY: to_json(others)})
        name = f"part-{self._header['run']}-{self._number:06d}"
        temporary = self.folder / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            with temporary.open("xb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # while it is open, others know that its process lives
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
        """Renames a part to the next free name: another process may continue the same run."""
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
                temporary.rename(path)  # a file system without hard links
                return path


def _remove_left(path: Path) -> None:
    """Removes a temporary file of a killed process, but not one that a process is still writing."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        path.unlink()


def _length(record: Record) -> int:
    return max(map(len, record.columns.values()), default=0) if record.kind in ROW_KINDS else 0


def _table(records: Sequence[Record], header: Mapping[str, Any]) -> pyarrow.Table:
    names, layers = row_names(header)
    columns: dict[str, list[Any]] = {key.name: [] for key in KEYS}
    extra = dict.fromkeys(name for record in records for name in (*record.columns, *record.scalars))
    others = [name for name in extra if name not in PER_LAYER and name not in ALWAYS_PER_STEP]
    quantities = [*PER_LAYER, *others, *ALWAYS_PER_STEP]
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
    if any(isinstance(value, str) for value in values):  # perhaps a column that is not declared
        return pyarrow.string()
    return _ARROW_TYPES[type_of(name) or "number"]
