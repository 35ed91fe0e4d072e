"""The command line: invalid arguments and exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastfs._cli.app import app
from tests.helpers import report_cases as cases


def run(*arguments: Any) -> tuple[Any, ...]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def test_help_lists_the_commands() -> None:
    code, output = run("--help")
    assert code == 0
    assert "demo" in output
    for command in ("doctor", "report", "watch"):
        assert command in output
    code, output = run("demo", "--help")
    assert code == 0
    for option in ("--steps", "--model", "--every", "--threads", "--out"):
        assert option in output


def test_demo_writes_where_it_is_told_to(tmp_path: Path) -> None:
    code, output = run("demo", "--model", "resnet", "--steps", 3, "--every", 2, "--out", tmp_path / "out")
    assert code == 0, output
    assert "bitwise equal" in output
    assert "3 of 3 steps" in output
    task = json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"]["resnet"]
    assert (task["steps"], task["every"]) == (3, 2)
    assert (tmp_path / "out" / "resnet" / "angle.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "0"), "--steps"),
        (("--steps", "many"), "--steps"),
        (("--every", "-1"), "--every"),
        (("--threads", "0"), "--threads"),
        (("--model", "gpt"), "--model"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, options: tuple[Any, ...], message: str) -> None:
    code, output = run("demo", "--out", tmp_path / "out", *options)
    assert code == 2
    assert message in output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    code, output = run("demo", "--out", tmp_path / "out")
    assert code == 1
    assert "exists and is not a folder" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("status", [0, 1])
def test_doctor_passes_on_the_exit_code(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    import fastfs._cli.doctor

    monkeypatch.setattr(fastfs._cli.doctor, "run_doctor", lambda json: status)
    assert run("doctor")[0] == status


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "fastfs._report.plots", None)
    code, output = run("demo", "--out", tmp_path / "out")
    assert code == 1
    assert "fastfs demo:" in output
    assert not (tmp_path / "out").exists()


def test_report_writes_the_page_and_says_where(tmp_path: Path) -> None:
    cases.write(tmp_path / "record.jsonl", cases.run_lines(3, 5))
    code, output = run("report", tmp_path, "-o", tmp_path / "pages" / "report.html")
    assert code == 0, output
    assert output.endswith("MB)")
    page = (tmp_path / "pages" / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "blocks.2" in page


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, ["record.jsonl"], "record.jsonl: no such file or folder"),
        ({}, ["."], "no record in this folder"),
        ({"a.jsonl": "", "b.jsonl": ""}, ["."], "several records in this folder, name one of them: a.jsonl, b.jsonl"),
        ({"a.jsonl": "hello"}, ["a.jsonl"], "a.jsonl"),
        ({"a.jsonl": json.dumps(cases.header(["x"]))}, ["a.jsonl", "--run", "r9"], "no run 'r9' in the record"),
        ({"a.jsonl": json.dumps(cases.header(["x"]))}, ["a.jsonl", "-o", "."], "is a folder"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, Any], arguments: list[Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    code, output = run("report", *arguments)
    assert code == 1
    assert output.startswith("fastfs report: ")
    assert message in output
    assert not (tmp_path / "report.html").exists()


def test_report_without_plotly_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases.write(tmp_path / "record.jsonl", cases.run_lines(3, 5))
    for name in [name for name in sys.modules if name.startswith(("plotly", "fastfs._report.page"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    code, output = run("report", tmp_path)
    assert code == 1
    assert 'pip install "fastfs[report]"' in output


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastfs._cli.app", "demo", "--steps", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "--steps" in done.stderr
