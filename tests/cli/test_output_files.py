"""Output files are written atomically, and never replace a device, a pipe or a folder."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastfs._cli.app import app
from fastfs._utils.output_files import check_output, write_whole
from tests.helpers import report_cases as cases


def special(folder: Path, kind: Any) -> Any:
    path = folder / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            where = os.getcwd()
            os.chdir(folder)  # socket addresses have a maximum length
            try:
                server.bind(kind)
            finally:
                os.chdir(where)
    else:
        path.symlink_to("/dev/null")
    return path


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
def test_only_regular_files_are_replaced(tmp_path: Path, kind: str) -> None:
    path = special(tmp_path, kind)
    before = os.stat(path)
    for write in (check_output, lambda p: write_whole(p, b"x")):
        with pytest.raises(ValueError, match=f"is a {kind}, expected a regular file"):
            write(path)
    record = cases.write(tmp_path / "record.jsonl", cases.run_lines(3, 5))
    for command in (
        ["report", str(record), "-o", str(path)],
        ["bench", "--device", "cpu", "--json", str(path)],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code in (1, 2)
        assert f"is a {kind}" in " ".join(done.stderr.split())
        assert len(done.stderr.strip().splitlines()) <= 3
    after = os.stat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([kind, "record.jsonl"])


def test_links_stay_and_their_files_are_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "real.html").write_text("old")
    for name, target in (("link", "far/real.html"), ("new", "far/made.html")):
        (tmp_path / name).symlink_to(target)
        assert write_whole(tmp_path / name, b"new") == tmp_path / name
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target).read_bytes() == b"new"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        write_whole(tmp_path / "loop", b"x")
    assert len(list((tmp_path / "far").iterdir())) == 2


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.csv"
    write_whole(path, b"old")
    path.chmod(0o640)
    for call, error in (("os.replace", KeyboardInterrupt), ("os.fsync", OSError(28, "No space left on device"))):
        with monkeypatch.context() as patch:

            def fails(*_: Any, error: Any = error) -> None:
                raise error

            patch.setattr(call, fails)
            with pytest.raises((KeyboardInterrupt, OSError)):
                write_whole(path, b"new and longer")
        assert path.read_bytes() == b"old"
        assert [p.name for p in path.parent.iterdir()] == ["a.csv"]
    write_whole(path, b"new")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o640)
    mask = os.umask(0o027)
    try:
        write_whole(tmp_path / "b", b"")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o640
