"""Damaged records in the report, the terminal and the commands: shown as far as they can be read, or refused."""

from __future__ import annotations

import warnings
from io import StringIO
from typing import Any

import pytest
from hypothesis import given, settings
from rich.console import Console
from typer.testing import CliRunner

import fastfs
from fastfs._cli.app import app
from fastfs._record.reading.load import load_compact, read_header
from fastfs._report.page import page_data, write_page
from fastfs._report.quantities import UNUSED
from fastfs._report.watch import watch
from tests.helpers.damaged_records import LINES, damaged_records, encode, sentence, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=40)
@given(damaged_records())
def test_the_page_and_the_terminal_show_what_can_be_read(folder: Any, record: Any) -> None:
    path = write(folder / "shown.jsonl", record[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=r".* left out", category=RuntimeWarning)
        for show in (
            lambda: write_page(path, folder / "page.html"),
            lambda: watch(path, once=True, console=Console(file=StringIO(), width=100)),
            lambda: read_header(path),
        ):
            try:
                show()
            except ValueError as error:
                sentence(error)


@settings(max_examples=15)
@given(damaged_records())
def test_commands_end_with_a_sentence(folder: Any, record: Any) -> None:
    path = write(folder / "named.jsonl", record[0])
    for command in (["report", str(path), "-o", str(folder / "cli.html")], ["watch", "--once", str(path)]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = CliRunner().invoke(app, command)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        if done.exit_code:
            sentence(done.stderr.strip())
            assert done.stderr.startswith(f"fastfs {command[0]}: ")


@pytest.mark.parametrize(
    "start", [b"\x00" * 100, b"hello\n", b"\x1f\x8b\x08", b"[1, 2]\n", b'{"a": 1}\n', b"{" * 100_000]
)
def test_other_files_are_refused_in_one_sentence(folder: Any, start: Any) -> None:
    path = folder / "other.jsonl"
    path.write_bytes(start)
    for read in (fastfs.load, read_header, lambda p: watch(p, once=True), lambda p: write_page(p, folder / "o.html")):
        with pytest.raises(ValueError, match=r"other\.jsonl") as caught:
            read(path)
        sentence(caught.value)


def test_a_report_reads_what_load_reads(folder: Any) -> None:
    path = write(folder / "both.jsonl", map(encode, LINES))
    assert page_data(load_compact(path, UNUSED), run="r1") == page_data(fastfs.load(path), run="r1")
