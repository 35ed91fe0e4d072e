"""Reading a record that grows, tears, disappears and comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastfs._record.reading import follow
from fastfs._record.reading.follow import Follower
from tests.helpers import report_cases as cases
from tests.helpers.report_cases import append

NAMES = cases.names_of(2)


@pytest.fixture
def record(tmp_path: Path) -> Any:
    path = tmp_path / "record.jsonl"
    append(path, cases.header(NAMES))
    return path


def steps(new: Any) -> Any:
    return [line.line["step"] for line in new.lines if line.kind in ("measured", "predicted")]


def test_only_what_is_new_is_read(record: Any) -> None:
    follower = Follower(record)
    assert [line.kind for line in follower.poll().lines] == ["header"]
    assert follower.poll().lines == []
    append(record, cases.measured(NAMES, 0), cases.predicted(NAMES, 1), cases.alert(1), cases.predicted(NAMES, 2))
    new = follower.poll()
    assert [line.kind for line in new.lines] == ["measured", "predicted", "alert", "predicted"]
    assert not new.restarted
    # Lines that were read before are not read again, even if they change.
    start = follow._START
    content = record.read_bytes()
    with record.open("r+b") as file:
        file.seek(start)
        file.write(b" " * (len(content) - start - 1))
    append(record, cases.measured(NAMES, 3))
    new = follower.poll()
    assert steps(new) == [3]
    assert new.unreadable == 0


def test_a_torn_line_waits_for_its_rest(record: Any) -> None:
    follower = Follower(record)
    follower.poll()
    line = json.dumps(cases.measured(NAMES, 0)).encode()
    for cut in (1, len(line) // 2):
        append(record, end=line[:cut])
        line = line[cut:]
        assert follower.poll().lines == []
    append(record, end=line + b"\n")
    assert steps(follower.poll()) == [0]


def test_lines_that_cannot_be_read_are_counted(record: Any) -> None:
    follower = Follower(record)
    append(record, end=b'{"kind": "measured", "run": "r1", "ste\n')
    append(record, cases.measured(NAMES, 1), end=b"\n\n[]\n")
    new = follower.poll()
    assert steps(new) == [1]
    assert new.unreadable == 2


def test_a_file_that_is_removed_and_created_again(record: Any) -> None:
    follower = Follower(record)
    append(record, cases.measured(NAMES, 0))
    follower.poll()
    record.unlink()
    new = follower.poll()
    assert (new.exists, new.lines) == (False, [])
    assert not follower.poll().exists
    append(record, cases.header(NAMES, run="r2"), cases.measured(NAMES, 7, run="r2"))
    assert steps(follower.poll()) == [7]


@pytest.mark.parametrize("grown", [False, True])
def test_a_file_that_is_truncated_or_rewritten(record: Any, grown: bool) -> None:
    follower = Follower(record)
    append(record, cases.measured(NAMES, 0), cases.measured(NAMES, 1))
    follower.poll()
    record.write_bytes(b"")
    append(
        record, cases.header(NAMES, run="r2"), *(cases.measured(NAMES, s, run="r2") for s in range(9 if grown else 1))
    )
    new = follower.poll()
    assert new.restarted
    assert steps(new) == list(range(9 if grown else 1))
    append(record, cases.measured(NAMES, 20, run="r2"))
    new = follower.poll()
    assert not new.restarted
    assert steps(new) == [20]


def test_a_file_that_is_replaced(record: Any, tmp_path: Path) -> None:
    follower = Follower(record)
    append(record, cases.measured(NAMES, 0))
    follower.poll()
    other = tmp_path / "other"
    append(other, *cases.run_lines(2, 9))
    other.replace(record)
    new = follower.poll()
    assert new.restarted
    assert steps(new) == list(range(9))


def test_only_the_last_rows_of_a_long_record_are_parsed(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_CHUNK", 1000)  # lines across chunks
    lines = [line for s in range(300) for line in (cases.measured(NAMES, 2 * s), cases.predicted(NAMES, 2 * s + 1))]
    lines[10:10] = [cases.alert(5), cases.structure(NAMES)]
    append(record, *lines)
    new = Follower(record).poll()
    assert [line.kind for line in new.lines[:3]] == ["header", "alert", "structure"]
    assert steps(new) == list(range(600 - 128, 600))


@pytest.mark.parametrize("content", [b"PAR1 and then some", b'{"kind": "measured"}\n', b"[]\n", b"{nothing\n"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a record"):
        Follower(path).poll()
