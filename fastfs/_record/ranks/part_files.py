"""The files that the ranks of a run have written, each its own, as one record: ``record.rank0.jsonl``, ...

A file has headers, with the number of the rank, and lines of kind ``part``. The records are made when they are read, by
the same :class:`Assembler` and in the same order as rank 0 makes them of what it is sent. A rank whose file is missing,
ends early or cannot be read in places is missing in the records of these steps, and they say so.
"""

from __future__ import annotations

import base64
import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastfs._record.columns import PART
from fastfs._record.encoding import TORN, parse, to_json
from fastfs._record.ranks.assembly import Assembler
from fastfs._record.ranks.exchange import assembled
from fastfs._record.ranks.order import FIRST, Key, PartKeys
from fastfs._record.ranks.part import RankPart
from fastfs._record.record import as_line
from fastfs._record.schema import Checker, Line, UnknownSchemaError

__all__ = ["PartFiles", "base_of", "decoded", "header_of_run", "rank_files", "rank_path"]

_CHUNK = 1 << 18
_LONGEST = 1 << 28
_LINE = re.compile(rb'\{"kind":"[a-z]+","run":"(?P<run>[^"\\]*)"')  # as the sink begins it
_NAME = re.compile(r"(?P<stem>.+)\.rank(?P<rank>\d+)")


def rank_path(path: Path, rank: int) -> Path:
    """Returns the file of one rank: ``run/record.jsonl`` -> ``run/record.rank3.jsonl``."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def rank_files(path: Path) -> list[Path]:
    """Returns the files of the ranks of a record, in the order of their numbers."""
    found: dict[int, Path] = {}
    if path.parent.is_dir():
        for each in path.parent.iterdir():
            match = _NAME.fullmatch(each.stem)
            if match and match["stem"] == path.stem and each.suffix == path.suffix and each.is_file():
                found[int(match["rank"])] = each
    return [found[rank] for rank in sorted(found)]


def base_of(path: Path) -> Path | None:
    """Returns the path of the record that a file of one rank belongs to; None for any other file."""
    match = _NAME.fullmatch(path.stem)
    if match is None or not path.is_file():
        return None
    with path.open("rb") as file:
        first = file.readline(_LONGEST)
    try:
        header = parse(first)
    except ValueError:  # empty, or torn
        header = {"rank": 0} if b'"rank"' in first or not first else {}
    if not isinstance(header, dict) or header.get("rank") is None:
        return None
    return path.with_name(f"{match['stem']}{path.suffix}")


def header_of_run(header: Line) -> Line:
    """Returns the header of a run from that in the file of one of its ranks."""
    return {name: value for name, value in header.items() if name != "rank"}


def decoded(line: Line) -> RankPart:
    """Returns the part in a line of kind ``part``.

    Raises:
        ValueError: It cannot be decoded, or is of another step.
    """
    part = RankPart.from_bytes(base64.b64decode(line["data"], validate=True))
    if part.step != line["step"]:
        raise ValueError(f"data: expected the part of step {line['step']}, got that of step {part.step}")
    return part


@dataclass
class Segment:
    """A start of a run: what the ranks have written from their header to the next one of the same run.

    Attributes:
        run: Id of the run.
        headers: By rank.
        spans: By file: offset and number of the header's line, offset of the last line.
        next_step: Where the next start of the run resumes; None if it is the last one.
    """

    run: str
    headers: dict[int, Line] = field(default_factory=dict)
    spans: dict[Path, tuple[int, int, int]] = field(default_factory=dict)
    next_step: int | None = None


class PartFiles:
    """The files of the ranks of one record.

    Args:
        path: Of the record.

    Attributes:
        files: Those of the ranks.
        rejected: Why places do not conform to the schema, each as file and line.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is of an unknown schema version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = rank_files(path)
        self.rejected: dict[str, Exception] = {}
        self._segments: dict[tuple[str, int], Segment] = {}
        for file in self.files:
            self._scan(file)
        for (run, number), segment in self._segments.items():
            following = self._segments.get((run, number + 1))
            if following is not None:
                segment.next_step = max(header.get("resumed_at") or 0 for header in following.headers.values())

    def headers(self) -> list[Line]:
        """Returns the header of each start of a run."""
        return [header_of_run(self._first(segment)) for segment in self._segments.values()]

    def lines(self) -> Iterator[Line]:
        """Yields the lines of the record, in order."""
        assemblers: dict[str, tuple[Any, Assembler]] = {}
        states: dict[str, Any] = {}  # of the angles where the next start of each run resumes
        for segment in self._segments.values():
            header = self._first(segment)
            quantiles = header.get("quantiles") or ()
            made_for, assembler = assemblers.get(segment.run, (None, Assembler(header, quantiles)))
            if made_for not in (None, (header.get("groups"), quantiles)):
                assembler = Assembler(header, quantiles)
            assemblers[segment.run] = (header.get("groups"), quantiles), assembler
            if segment.run in states:
                assembler.angles.load_state_dict(states[segment.run])
            yield header_of_run(header)
            others: list[Line] = []
            kept = False
            for key, parts in self._steps(segment, others):
                if not kept and segment.next_step is not None and key[0] >= segment.next_step:
                    states[segment.run], kept = assembler.angles.state_dict(), True
                for record in assembled(assembler, parts):
                    yield parse(to_json(as_line(record, segment.run)).encode())
            if not kept:
                states[segment.run] = assembler.angles.state_dict()
            yield from others

    @staticmethod
    def _first(segment: Segment) -> Line:
        return segment.headers[min(segment.headers)]

    def _steps(self, segment: Segment, others: list[Line]) -> Iterator[tuple[Key, list[RankPart]]]:
        """Yields the parts that belong together, in the order of the steps.

        Args:
            segment: The start of the run.
            others: Receives what the ranks have written besides: alerts of records that were dropped.
        """
        streams = [self._parts(file, segment, others) for file in segment.spans]
        now: Key | None = None
        together: list[RankPart] = []
        for key, _, _, part in heapq.merge(*streams, key=lambda entry: entry[:3]):
            if now is not None and key != now:
                yield now, together
                together = []
            now = key
            together.append(part)
        if now is not None:
            yield now, together

    def _parts(self, file: Path, segment: Segment, others: list[Line]) -> Iterator[tuple[Key, bool, int, RankPart]]:
        """Yields the parts in a file: key, whether it is a remark on its step, rank."""
        checker, last = Checker(), FIRST
        keys: PartKeys | None = None
        start, first, end = segment.spans[file]
        for offset, number, raw, _ in _split(file, start, first):
            if offset > end:
                break
            begins = _LINE.match(raw)
            if not raw.endswith(b"}") or (begins and begins["run"] != segment.run.encode()):
                continue
            try:
                checked = checker.check_bytes(raw)
                if checked.kind != PART:
                    others.extend([] if checked.kind == "header" else [checked.line])
                    continue
                part = decoded(checked.line)
                rank = part.place.rank
                keys = keys or PartKeys([rank])
                key = keys.of(rank, part)
                if (key or last) < last:
                    raise ValueError(f"step {part.step} comes after step {last[0]}")
            except (ValueError, KeyError) as error:
                self.rejected[f"{file.name}, line {number}"] = error
                continue
            last = key or last
            yield last, key is None, rank, part

    def _scan(self, file: Path) -> None:
        """Finds the starts of runs in a file, and the lines that are none."""
        checker, starts = Checker(), dict[str, int]()
        torn: tuple[str, Exception] | None = None  # by a killed process, if the next line is a header
        for offset, number, raw, ended in _split(file):
            where = f"{file.name}, line {number}"
            begins = _LINE.match(raw)
            is_header = b'"header"' in raw[:64]
            if torn is not None and not is_header:
                self.rejected[torn[0]] = torn[1]
            torn = None
            if not raw.endswith(b"}"):
                if ended and not raw.endswith(TORN):
                    torn = where, ValueError("is torn")
            elif is_header:
                try:
                    header = checker.check_bytes(raw).line
                    if header.get("rank") is None:
                        raise ValueError("header: expected the number of a rank")
                except UnknownSchemaError as error:
                    raise ValueError(f"{file}: {error}") from None
                except ValueError as error:
                    self.rejected[where] = error
                    continue
                run = header["run"]
                starts[run] = starts.get(run, -1) + 1
                segment = self._segments.setdefault((run, starts[run]), Segment(run))
                segment.headers[header["rank"]] = header
                segment.spans[file] = offset, number, offset
            elif begins is None or begins["run"].decode() not in starts:
                self.rejected[where] = ValueError("expected a part of a run with a header")
            else:
                run = begins["run"].decode()
                span = self._segments[run, starts[run]].spans
                span[file] = *span[file][:2], offset
        if torn is not None:
            self.rejected[torn[0]] = torn[1]


def _split(path: Path, offset: int = 0, number: int = 1) -> Iterator[tuple[int, int, bytes, bool]]:
    """Yields the lines that are not empty: offset, number, text, and whether there was a newline.

    The file is open only while a chunk is read, since there may be many.

    Raises:
        ValueError: A line is too long for a record.
    """
    rest, at = b"", offset
    while True:
        with path.open("rb") as file:
            file.seek(at)
            chunk = file.read(_CHUNK)
        if not chunk:
            break
        at += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield offset, number, line.strip(), True
            offset += len(line) + 1
            number += 1
        if len(rest) > _LONGEST:
            raise ValueError(f"{path}, line {number}: longer than {_LONGEST:,} bytes: not a record")
    if rest.strip():
        yield offset, number, rest.strip(), False
