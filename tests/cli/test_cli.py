"""The command line: invalid arguments and exit status."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fastfs._bench.ceilings import COPY
from fastfs._bench.command import show
from fastfs._bench.comparison import COMPILE, EAGER, HAND, NORMS, OURS
from fastfs._cli.app import app
from tests.helpers import report_cases as cases


def run(*arguments: Any) -> tuple[Any, ...]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def test_help_lists_the_commands() -> None:
    code, output = run("--help")
    assert code == 0
    assert "demo" in output
    for command in ("doctor", "report", "diff", "transfer", "watch"):
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


def test_a_locale_without_the_signs_of_a_table_does_not_end_a_command(tmp_path: Path) -> None:
    record = cases.write(tmp_path / "record.jsonl", cases.run_lines(3, 5))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "fastfs._cli.app", "watch", "--once", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"\d\.\d{3} +\d+\?", done.stdout)  # degrees


def test_json_to_a_closed_standard_output_is_reported_before_the_work() -> None:
    command = f"exec {shlex.quote(sys.executable)} -m fastfs._cli.app doctor --json - >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (2, "fastfs doctor: --json -: standard output is closed\n")


@pytest.mark.parametrize("seconds", ["nan", "inf", "0.5", "1e9"])
def test_bench_takes_a_duration_that_ends(seconds: str) -> None:
    code, output = run("bench", "--seconds", seconds)
    assert code == 2
    assert "Invalid value for '--seconds'" in output


def test_the_table_of_bench_fits_into_80_columns() -> None:
    rows = [{"implementation": "stream", "GB/s": 4024.0}, {"implementation": COPY, "GB/s": 4024.0}]
    rows += [{"implementation": OURS, "GB/s": 4024.0, "of ceiling": 0.87}]
    rows += [{"implementation": name, "fastfs is faster by": 185.8} for name in (EAGER, HAND, COMPILE, NORMS)]
    case = {"kind": "many layers", "dtype": "bfloat16", "rows": rows}
    printed = io.StringIO()
    machine = {"device": "GPU", "processor": "CPU", "threads": 1}
    result = {"environment": machine, "results": [case], "verdict": [], "troubles": [], "conclusion": ""}
    show(Console(file=printed, width=80), result)
    assert "…" not in printed.getvalue()
    assert printed.getvalue().count("185.8x") == 4
