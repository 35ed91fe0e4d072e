"""Lines of a JSONL record, checked: rows go into a store, other lines come out one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from os import fstat
from pathlib import Path
from typing import Any

import numpy as np

from fastfs._core import ops
from fastfs._monitor.record.schema import (
    BOOLEANS,
    COLUMNS,
    INTEGERS,
    KEYS,
    MORE_SCALARS,
    SCALARS,
    STRINGS,
    TABLED,
    Checked,
    Checker,
    UnknownSchemaError,
    parse,
)
from fastfs._monitor.record.sinks import TORN
from fastfs._report.store import ABSENT, Store

__all__ = ["HEADER", "LONGEST", "LeftOut", "RowReader", "split_lines"]

_CHUNK = 1 << 20
LONGEST = 1 << 28
HEADER = b'{"kind":"header",'
_KINDS = ("number", "integer", "boolean", "string")  # as the native reader numbers them


class LeftOut:
    """Lines (or parts) that are not of the format: counted, and told in one warning."""

    def __init__(self, path: Path, what: str = "line") -> None:
        self.path = path
        self.count = 0
        self._what = what
        self._first: list[tuple[str, str]] = []

    def add(self, where: Any, why: object) -> None:
        self.count += 1
        if len(self._first) < 10:
            text = " ".join(str(why).split())
            self._first.append((str(where), text if len(text) <= 200 else f"{text[:197]}..."))

    @property
    def reason(self) -> str:
        """Of the first, for an error; empty without one."""
        return "" if not self._first else f" ({self._what} {self._first[0][0]}: {self._first[0][1]})"

    def warn(self, stacklevel: int) -> None:
        if not self.count:
            return
        places = ", ".join(place for place, _ in self._first) + (", ..." if self.count > len(self._first) else "")
        if self.count == 1:
            said = f"{self._what} {places}: cannot be read and is left out ({self._first[0][1]})"
        else:
            said = f"{self._what} {places}: {self.count} {self._what}s cannot be read and are left out{self.reason}"
        warnings.warn(f"{self.path}, {said}", RuntimeWarning, stacklevel=stacklevel + 1)


def split_lines(
    path: Path, take: Callable[[bytes, int, float], tuple[int, int]] | None = None
) -> Iterator[tuple[int, bytes, bool]]:
    """The lines of a file: number, text without its end, and whether it has an end.

    Args:
        path: of the file.
        take: is shown the text read so far with where the next line starts, and the share of the file read; may use up
            complete lines, and returns where the first one starts that it does not want, and how many it took.

    Raises:
        ValueError: the file starts as no record does.
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
                    raise ValueError(f"{path}, line {number + 1}: longer than {LONGEST:,} bytes: no record")
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
        store: gets the measured and predicted lines.
        native: use the compiled reader for them, if there is one.

    Attributes:
        headers: of all runs, in order.
        others: lines of other kinds.
        left_out: what is not of the format.
    """

    def __init__(self, path: Path, store: Store, *, native: bool = True) -> None:
        self.headers: list[dict[str, Any]] = []
        self.others: list[dict[str, Any]] = []
        self.left_out = LeftOut(path)
        self._path = path
        self._store = store
        self._checker = Checker()
        self._shapes: dict[str, int] = {}
        self._native = _native_reader() if native else None
        self._codes = np.array([ABSENT], dtype=np.int32)  # of the native reader's strings; the last for none

    def read(self) -> None:
        """Read all of it.

        A line that a killed process left torn, the last or one before a header, is nothing to speak of, nor is one that
        the sink marked as torn, since it wrote the record again.

        Raises:
            OSError: the file cannot be read.
            ValueError: not a record, or of another version.
        """
        torn: tuple[int, Exception] | None = None  # by a kill, if a header is the next line
        for number, raw, ended in split_lines(self._path, None if self._native is None else self._take):
            if not (line := raw.strip()):
                continue
            checked, problem, is_json = self._checked(line)
            if torn is not None and not (checked is not None and checked.kind == "header" and torn[0] == number - 1):
                self.left_out.add(*torn)
            torn = None
            if checked is not None:
                self._add(checked)
                continue
            self._refuse_foreign(line, number, problem)
            if is_json or not line.startswith(b"{"):
                self.left_out.add(number, problem)
            elif line.endswith(TORN) or not ended:
                continue
            elif line.endswith(b"}"):
                self.left_out.add(number, problem)
            else:
                torn = number, problem
        if torn is not None:
            self.left_out.add(*torn)
        self._drain()

    def _checked(self, line: bytes) -> tuple[Checked | None, Exception, bool]:
        """The line if it is of the format; else what is wrong, and whether it is JSON at least."""
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
        """The first line has to be a header, or what is left of one."""
        if not self.headers and not self.left_out.count and b'"header"' not in line and not HEADER.startswith(line):
            raise ValueError(f"{self._path}, line {number}: expected the header of a record: {error}") from None

    def _add(self, checked: Checked) -> None:
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
        elif kind in TABLED:
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
        """What the native reader has, into the store."""
        if self._native is None or not self._native.rows:
            return
        got = self._native.drain()
        store, row, record = self._store, self._store.rows, self._store.records
        kinds, shapes, lengths = (np.frombuffer(got[name], np.int32) for name in ("kinds", "runs", "lengths"))
        first = not record and share < 0.5
        store.add_records(
            kinds, shapes, lengths, np.frombuffer(got["steps"], np.int64), np.frombuffer(got["times"], np.float64)
        )
        if first:  # by what has been read, how much there is
            store.expect(int(1.1 * store.rows / share), int(1.1 * store.records / share))
        for name, values in self._arrays(got["columns"]):
            store.add_column(name[0], name[1], values, row)
        for name, values in self._arrays(got["scalars"]):
            store.add_scalar(name[0], name[1], values, record)

    def _arrays(self, columns: dict[str, tuple[int, bytes]]) -> Iterator[tuple[tuple[str, str], Any]]:
        for name, (number, memory) in columns.items():
            kind = _KINDS[number]
            if kind in ("number", "integer"):
                yield (name, "number"), np.frombuffer(memory, np.float64)
            elif kind == "boolean":
                yield (name, kind), np.frombuffer(memory, np.int32)
            else:
                yield (name, kind), self._own_codes(np.frombuffer(memory, np.int32))

    def _own_codes(self, codes: Any) -> Any:
        """The native reader's codes of strings as the store's."""
        assert self._native is not None
        if int(codes.max(initial=-1)) >= len(self._codes) - 1:
            new = [self._store.code(text) for text in self._native.strings(len(self._codes) - 1)]
            self._codes = np.array([*self._codes[:-1], *new, ABSENT], dtype=np.int32)
        return self._codes[codes]


def _native_reader() -> Any:
    if not ops.native_available():
        return None
    numbers = dict.fromkeys(COLUMNS, "number") | dict.fromkeys(STRINGS, "string")
    numbers |= dict.fromkeys(BOOLEANS, "boolean") | {name: "integer" for name in INTEGERS if name in COLUMNS}
    scalars = {name: "integer" if name in INTEGERS else "number" for name in (*SCALARS, *MORE_SCALARS)}
    columns = [(name, _KINDS.index(kind)) for name, kind in numbers.items()]
    refused = [*KEYS, "layers", *COLUMNS, *SCALARS, *MORE_SCALARS]
    return ops._C.RecordLines(columns, [(name, _KINDS.index(kind)) for name, kind in scalars.items()], refused)
