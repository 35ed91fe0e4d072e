"""Reads a JSONL record: rows go into a store, headers and other lines into lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from os import fstat
from pathlib import Path
from typing import Any

import numpy as np

from fastfs._core import ops
from fastfs._record.columns import BY_NAME, PER_LAYER, PER_STEP, ROW_KINDS, type_of
from fastfs._record.encoding import HEADER_START, TORN, parse
from fastfs._record.reading.rejected_lines import RejectedLines
from fastfs._record.reading.store import ABSENT, Store
from fastfs._record.schema import CheckedLine, Checker, UnknownSchemaError

__all__ = ["LONGEST", "RowReader", "split_lines"]

_CHUNK = 1 << 20
LONGEST = 1 << 28
"""Bytes of the longest line that a record may have."""

_NATIVE_TYPES = ("number", "integer", "boolean", "string")  # by their number in the native reader (ValueKind)


def split_lines(
    path: Path, take: Callable[[bytes, int, float], tuple[int, int]] | None = None
) -> Iterator[tuple[int, bytes, bool]]:
    """Yields the lines of a file: number, text without the newline, and whether there was a newline.

    Args:
        path: of the file.
        take: called with the text read so far, the start of the next line in it, and the fraction of the file that has
            been read. It may consume complete lines. Returns the start of the first line that it did not consume, and
            the number of lines that it consumed.

    Raises:
        ValueError: the file does not begin like a record, or a line is too long for one.
    """
    number = 0
    with path.open("rb") as file:
        size = max(fstat(file.fileno()).st_size, 1)
        done, rest, started = 0, [b""], False
        while chunk := file.read(_CHUNK):
            done += len(chunk)
            if not started and (start := chunk.lstrip()):
                started = True
                if not start.startswith(b"{"):
                    raise ValueError(f"{path}, line 1: expected the header of a record, got {start[:20]!r}")
            rest.append(chunk)
            if b"\n" not in chunk:
                if sum(map(len, rest)) > LONGEST:
                    raise ValueError(f"{path}, line {number + 1}: longer than {LONGEST:,} bytes: not a record")
                continue
            data, at = b"".join(rest), 0
            while True:
                if take is not None:
                    at, taken = take(data, at, min(done / size, 1.0))
                    number += taken
                end = data.find(b"\n", at)
                if end < 0:
                    break
                number += 1
                yield number, data[at:end], True
                at = end + 1
            rest = [data[at:]]
        last = b"".join(rest)
        if last:
            yield number + 1, last, False


class RowReader:
    """Reads a file into a store.

    Args:
        path: of the file.
        store: receives the measured and predicted lines.
        native: whether to use the native reader for these, if it is available.

    Attributes:
        headers: of all runs, in order.
        others: lines of other kinds.
        rejected: lines that do not conform to the schema.
    """

    def __init__(self, path: Path, store: Store, *, native: bool = True) -> None:
        self.headers: list[dict[str, Any]] = []
        self.others: list[dict[str, Any]] = []
        self.rejected = RejectedLines(path)
        self._path = path
        self._store = store
        self._checker = Checker()
        self._shapes: dict[str, int] = {}
        self._native = _native_reader() if native else None
        self._codes = np.array(
            [ABSENT], dtype=np.int32
        )  # the store's codes of the native reader's strings; the last one is for -1

    def read(self) -> None:
        """Reads the whole file.

        A torn line is not counted as rejected if a killed process left it (the last line, or one before a header) or
        if the sink marked it as torn, because the sink then wrote the record again.

        Raises:
            OSError: the file cannot be read.
            ValueError: not a record, or of an unknown schema version.
        """
        torn: tuple[int, Exception] | None = None  # by a killed process, if the next line is a header
        for number, raw, ended in split_lines(self._path, None if self._native is None else self._take):
            if not (line := raw.strip()):
                continue
            checked, problem, is_json = self._checked(line)
            if torn is not None and not (checked is not None and checked.kind == "header" and torn[0] == number - 1):
                self.rejected.add(*torn)
            torn = None
            if checked is not None:
                self._add(checked)
                continue
            self._refuse_foreign(line, number, problem)
            if is_json or not line.startswith(b"{"):
                self.rejected.add(number, problem)
            elif line.endswith(TORN) or not ended:
                continue
            elif line.endswith(b"}"):
                self.rejected.add(number, problem)
            else:
                torn = number, problem
        if torn is not None:
            self.rejected.add(*torn)
        self._drain()

    def add(self, line: Any) -> None:
        """Adds a line that has been decoded.

        Raises:
            ValueError: It does not conform to the schema.
        """
        self._add(self._checker.check(line))

    def _checked(self, line: bytes) -> tuple[CheckedLine | None, Exception, bool]:
        """Checks a line. Returns it if it conforms to the schema, otherwise the error, and whether the line is JSON."""
        is_json = False
        try:
            value = parse(line)
            is_json = True
            return self._checker.check(value), ValueError(), True
        except UnknownSchemaError as error:
            raise ValueError(f"{self._path}: {error}") from None
        except ValueError as error:
            return None, error, is_json

    def _refuse_foreign(self, line: bytes, number: int, error: Exception) -> None:
        """Raises ValueError if the first line is neither a header nor a damaged one."""
        if (
            not self.headers
            and not self.rejected.count
            and b'"header"' not in line
            and not HEADER_START.startswith(line)
        ):
            raise ValueError(f"{self._path}, line {number}: expected the header of a record: {error}") from None

    def _add(self, checked: CheckedLine) -> None:
        line, kind = checked.line, checked.kind
        if kind == "header":
            self.headers.append(line)
            run = line["run"]
            if line.get("resumed_at") is not None:
                self._forget(run, line["resumed_at"])
            names, layers = self._checker.names(run)
            self._shapes[run] = self._store.add_shape(run, names, layers)
            if self._native is not None and line["schema"] > 1:
                self._native.expect(run, self._shapes[run], len(names))
        elif kind in ROW_KINDS:
            self._drain()
            self._store.add(checked, self._shapes[line["run"]])
        else:
            self.others.append(line)

    def _forget(self, run: str, step: int) -> None:
        self._drain()
        self._store.forget(run, step)
        self.others = [
            line for line in self.others if line["run"] != run or line["step"] < step or line["kind"] == "structure"
        ]

    def _take(self, data: bytes, at: int, share: float) -> tuple[int, int]:
        assert self._native is not None
        if not self._shapes:
            return at, 0
        before = self._native.taken
        at = self._native.read(data, at)
        if self._native.rows > 1 << 15:
            self._drain(share)
        return at, self._native.taken - before

    def _drain(self, share: float = 1.0) -> None:
        """Moves what the native reader has read to the store."""
        if self._native is None or not self._native.rows:
            return
        got = self._native.drain()
        store, row, record = self._store, self._store.rows, self._store.records
        kinds, shapes, lengths = (np.frombuffer(got[name], np.int32) for name in ("kinds", "runs", "lengths"))
        first = not record and share < 0.5
        store.add_records(
            kinds, shapes, lengths, np.frombuffer(got["steps"], np.int64), np.frombuffer(got["times"], np.float64)
        )
        if first:  # extrapolate the size of the whole record
            store.expect(int(1.1 * store.rows / share), int(1.1 * store.records / share))
        for name, values in self._arrays(got["columns"]):
            store.add_column(name[0], name[1], values, row)
        for name, values in self._arrays(got["scalars"]):
            store.add_scalar(name[0], name[1], values, record)

    def _arrays(self, columns: dict[str, tuple[int, bytes]]) -> Iterator[tuple[tuple[str, str], Any]]:
        for name, (number, memory) in columns.items():
            kind = _NATIVE_TYPES[number]
            if kind in ("number", "integer"):
                yield (name, "number"), np.frombuffer(memory, np.float64)
            elif kind == "boolean":
                yield (name, kind), np.frombuffer(memory, np.int32)
            else:
                yield (name, kind), self._own_codes(np.frombuffer(memory, np.int32))

    def _own_codes(self, codes: Any) -> Any:
        """Converts the native reader's codes of strings to those of the store."""
        assert self._native is not None
        if int(codes.max(initial=-1)) >= len(self._codes) - 1:
            new = [self._store.code(text) for text in self._native.strings(len(self._codes) - 1)]
            self._codes = np.array([*self._codes[:-1], *new, ABSENT], dtype=np.int32)
        return self._codes[codes]


def _native_reader() -> Any:
    """The native reader of rows with the declared columns, or None without the native core."""
    if not ops.native_available():
        return None

    def numbered(names: tuple[str, ...]) -> list[tuple[str, int]]:
        return [(name, _NATIVE_TYPES.index(type_of(name) or "number")) for name in names]

    # Names that cannot be columns of layers or of steps that the reader does not know.
    reserved = [*BY_NAME, "layers"]
    return ops._C.RecordLines(numbered(PER_LAYER), numbered(PER_STEP), reserved)
