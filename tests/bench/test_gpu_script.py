"""benchmarks/gpu.sh without a GPU: its tests and steps, report of missing parts, and collection of results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import collect, needs

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/gpu.sh"
HERE = {"device": "a GPU", "driver": "1", "torch": "2", "python": "3"}


def call(
    *steps: str, python: Path | str = sys.executable, path: str = os.environ["PATH"], cuda_home: str = "/none"
) -> Any:
    env = {"PATH": path, "PYTHON": str(python), "CUDA_HOME": cuda_home, "OUT": "/none/out"}
    return subprocess.run(["bash", str(SCRIPT), *steps], env=env, capture_output=True, text=True, timeout=120)


def names() -> list[str]:
    found = re.search(r"^steps=\((.*?)^\)$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1].split()


def test_syntax() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.slow
def test_every_file_with_gpu_tests_is_run() -> None:
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = set(re.findall(r"^(tests/[\w/]+\.py)::", done.stdout, re.MULTILINE))
    lists = re.findall(r"^(?:training_)?tests=\((.*?)^\)$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    words = " ".join(" ".join(lists).split())
    named = subprocess.run(["bash", "-c", f"printf '%s\\n' {words}"], capture_output=True, text=True, check=True).stdout
    assert sorted(named.split()) == sorted(found)


def test_an_unknown_step_is_refused_with_the_list() -> None:
    done = call("needs", "nothing")
    assert done.returncode == 2
    assert "unknown step nothing" in done.stderr
    assert all(name in done.stderr for name in ("needs", "machine", "build", *names()))


def test_every_step_is_run_and_its_needs_are_known() -> None:
    text = SCRIPT.read_text()
    body = text[text.index("run() {") :]
    for name in names():
        assert re.search(rf"^  ([\w |]*\b)?{name}\b[\w |]*\)", body, re.MULTILINE), name
        assert name in needs.STEPS or name in needs.SANITIZER
    assert set(needs.STEPS) | set(needs.SANITIZER) == set(names())


def test_all_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    """Uses a Python with only the standard library."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    done = call("needs", "kernels", "memcheck", python=bare, path="/usr/bin:/bin")
    assert done.returncode == 1
    for name in needs.BUILD:
        assert re.search(rf"^  {name}\b.*not installed \(for build\)$", done.stderr, re.MULTILINE), name
    assert "rich: not installed (for kernels)" in done.stderr
    assert "nvcc: not on PATH" in done.stderr
    assert "compute-sanitizer: not on PATH nor in CUDA_HOME (for memcheck)" in done.stderr
    assert "PYTHONPATH=DIR" in done.stderr
    assert "expecttest" not in done.stderr  # needed only by a step that was not requested
    assert "== machine" not in done.stdout


def test_only_the_step_that_lacks_something_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(needs.shutil, "which", lambda name: name)  # type: ignore[attr-defined]
    monkeypatch.setattr(needs, "version", lambda name: "99.0")
    assert needs.main(["tests", "kernels"]) == 0
    assert capsys.readouterr().out == ""
    lacks = needs.lacks
    monkeypatch.setattr(needs, "lacks", lambda name, oldest=(): "no" if name == "triton" else lacks(name, oldest))
    assert needs.main(["tests", "kernels"]) == 0
    assert capsys.readouterr().out == "kernels\n"
    monkeypatch.setattr(needs, "version", lambda name: "2.10.0+cu130")
    assert lacks("torch", (2, 11)) == "torch>=2.11: 2.10.0+cu130 is installed"
    assert lacks("torch", (2, 10)) is None


def test_results_are_collected(tmp_path: Path) -> None:
    part, target, other = tmp_path / "kernels.json", tmp_path / "new" / "gpu.json", tmp_path / "gpu2.json"
    part.write_text(json.dumps({"environment": {"date": "today"}, "results": [1]}))
    collect.collect(target, [], HERE)
    assert collect.collect(target, [part], HERE)["steps"]["kernels"]["results"] == [1]
    other.write_text(json.dumps({"machine": HERE, "steps": {"rows": {"results": [2]}, "kernels": {"results": [3]}}}))
    collect.collect(target, [other], HERE)
    written = json.loads(target.read_text())
    assert written["machine"] == HERE
    assert [written["steps"][name]["results"] for name in ("kernels", "rows")] == [[3], [2]]
    collect.collect(target, [part], HERE)
    environment = json.loads(target.read_text())["steps"]["kernels"]["environment"]
    assert environment == {"date": "today", "device": "a GPU", "driver": "1"}
    with pytest.raises(ValueError, match=r"different machines: \{'driver': \('1', '2'\)\}"):
        collect.collect(target, [part], {**HERE, "driver": "2"})
