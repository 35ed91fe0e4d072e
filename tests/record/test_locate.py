"""Which record a folder stands for: its own, or the only one in its subfolders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastfs._cli.app import app
from fastfs._record.reading.locate import find_record
from tests.helpers import report_cases as cases


def record(path: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    return cases.write(path, cases.run_lines(2, 3))


def test_the_only_record_in_the_subfolders_is_found(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / ".hidden").mkdir()
    record(tmp_path / ".hidden" / "record.jsonl")
    with pytest.raises(FileNotFoundError, match="no record in this folder or one level down"):
        find_record(tmp_path)
    one = record(tmp_path / "run1" / "record.jsonl")
    (tmp_path / "run1" / "other.jsonl").write_text('{"loss": 1}\n')
    assert find_record(tmp_path) == one
    (tmp_path / "logs" / "train.jsonl").write_text('{"loss": 1}\n')  # does not begin like a record
    assert find_record(tmp_path) == one
    for command in (["report", str(tmp_path), "-o", str(tmp_path / "a.html")], ["watch", "--once", str(tmp_path)]):
        assert CliRunner().invoke(app, command).exit_code == 0
    parts = tmp_path / "run2" / "numbers.parquet"
    parts.mkdir(parents=True)
    (parts / "part-r1-0.parquet").touch()
    with pytest.raises(ValueError, match=r"several records .*: run1/record\.jsonl, run2/numbers\.parquet$"):
        find_record(tmp_path)
    for command in (["report", str(tmp_path)], ["watch", "--once", str(tmp_path)]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1
        assert done.stderr.count("\n") == 1
        assert "run1/record.jsonl" in done.stderr
    # The folder's own record takes precedence over those in subfolders.
    own = record(tmp_path / "mine.jsonl")
    assert find_record(tmp_path) == own


def test_many_records_are_listed_in_short(tmp_path: Path) -> None:
    for number in range(20):
        record(tmp_path / f"run{number:02d}" / "record.jsonl")
    with pytest.raises(ValueError, match=r"run07/record\.jsonl, \.\.\.$"):
        find_record(tmp_path)


def test_other_paths_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match="is neither a file nor a folder"):
            find_record(path)
        for command in (["report", str(path)], ["watch", "--once", str(path)]):
            done = CliRunner().invoke(app, command)
            assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
