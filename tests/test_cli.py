"""The command line: what it refuses, and how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fastfs.cli import app


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def test_help_lists_the_commands():
    code, output = run("--help")
    assert code == 0
    assert "demo" in output
    assert "doctor" in output
    code, output = run("demo", "--help")
    assert code == 0
    for option in ("--steps", "--model", "--every", "--threads", "--out"):
        assert option in output


def test_demo_writes_where_it_is_told_to(tmp_path):
    code, output = run("demo", "--model", "resnet", "--steps", 3, "--every", 2, "--out", tmp_path / "out")
    assert code == 0, output
    assert "bitwise equal" in output
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
def test_bad_values_are_refused(tmp_path, options, message):
    code, output = run("demo", "--out", tmp_path / "out", *options)
    assert code == 2
    assert message in output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "out").write_text("a file")
    code, output = run("demo", "--out", tmp_path / "out")
    assert code == 1
    assert "exists and is not a folder" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("status", [0, 1])
def test_doctor_passes_on_the_exit_code(monkeypatch, status):
    import fastfs.doctor

    monkeypatch.setattr(fastfs.doctor, "run_doctor", lambda: status)
    assert run("doctor")[0] == status


def test_missing_packages_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fastfs.report.plots", None)
    code, output = run("demo", "--out", tmp_path / "out")
    assert code == 1
    assert "fastfs demo:" in output
    assert not (tmp_path / "out").exists()


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "fastfs.cli", "demo", "--steps", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "--steps" in done.stderr
