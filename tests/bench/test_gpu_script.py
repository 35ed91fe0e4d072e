"""benchmarks/gpu.sh without a GPU: its steps, the report of missing parts, and the collection of results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import collect, needs, steps
from benchmarks.ops.workloads import DTYPES, workloads

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/gpu.sh"
HERE = {"device": "a GPU", "driver": "1", "torch": "2", "python": "3"}


def call(
    *names: str, python: Path | str = sys.executable, path: str = os.environ["PATH"], cuda_home: str = "/none"
) -> Any:
    env = {"PATH": path, "PYTHON": str(python), "CUDA_HOME": cuda_home, "OUT": "/none/out"}
    return subprocess.run(["bash", str(SCRIPT), *names], env=env, capture_output=True, text=True, timeout=120)


def test_syntax() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.slow
def test_every_file_with_gpu_tests_is_run() -> None:
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = set(re.findall(r"^(tests/[\w/]+\.py)::", done.stdout, re.MULTILINE))
    assert sorted((*steps.TESTS, *steps.TRAINING_TESTS, *steps.MEMORY_TESTS)) == sorted(found)


def test_an_unknown_step_is_refused_with_the_list() -> None:
    done = call("needs", "nothing")
    assert done.returncode == 2
    assert "unknown step nothing" in done.stderr
    assert all(name in done.stderr for name in ("short", "needs", "machine", "build", *(s.name for s in steps.LONG)))


def test_the_short_run_has_the_steps_of_the_long_one_and_ends_in_time() -> None:
    names = [step.name for step in steps.SHORT]
    assert set(names) <= {step.name for step in steps.LONG}
    assert len(set(names)) == len(names)
    assert sum(step.limit for step in steps.SHORT if not step.beside) == steps.SHORT_SECONDS == 540
    first = names[: names.index("kernels") + 1]
    assert first == ["doctor", "memcheck", "racecheck", "synccheck", "tests", "kernels"]
    assert sum(step.limit for step in steps.SHORT[: len(first)] if not step.beside) <= 180
    assert [step.name for step in steps.SHORT if not step.alone] == ["memcheck", "racecheck", "synccheck", "tests"]


def test_the_short_run_times_some_workloads_of_each_part() -> None:
    (kernels,) = steps.find(steps.SHORT, ["kernels"])
    parts, match = (kernels.command[kernels.command.index(option) + 1] for option in ("--only", "--match"))
    counts = {}
    for part in parts.split(",")[1:]:
        found = workloads(part, torch.device("cuda"), largest=2**32, free=2**36, quick=False)
        counts[part] = sum(re.search(match, f"{w.name}, {w.dtype}") is not None for w in found)
    assert counts == {"ladder": 3 * len(DTYPES), "lists": len(DTYPES), "rows": 6}


def test_modules_and_files_of_the_steps_exist() -> None:
    for step in (*steps.LONG, *steps.SHORT):
        words = step.command
        if "-m" in words:
            module = words[words.index("-m") + 1]
            path = ROOT / module.replace(".", "/")
            assert module == "pytest" or path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        assert step.result == "" or "{parts}" in step.result


def test_initcheck_counts_only_findings_in_kernels_of_fastfs() -> None:
    (initcheck,) = steps.find(steps.LONG, ["initcheck"])
    assert initcheck.judge is not None
    assert initcheck.judge("Uninitialized read in some_kernel of torch\nall calls done") is None
    assert initcheck.judge("Uninitialized read in segment_sums<8>\nall calls done") == "1 lines name a kernel of fastfs"
    assert initcheck.judge("killed") == "not all calls were made"


def test_all_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    """Uses a Python with only the standard library."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    done = call("needs", "kernels", "memcheck", python=bare, path="/usr/bin:/bin")
    assert done.returncode == 1
    for name in needs.BUILD_NEEDS:
        assert re.search(rf"^  {name}\b.*not installed \(for build\)$", done.stderr, re.MULTILINE), name
    assert "rich: not installed (for kernels)" in done.stderr
    assert "nvcc: not on PATH" in done.stderr
    assert "compute-sanitizer: not on PATH nor in CUDA_HOME (for memcheck)" in done.stderr
    assert "PYTHONPATH=DIR" in done.stderr
    assert "expecttest" not in done.stderr  # needed only by a step that was not requested
    assert "== machine" not in done.stdout


def test_only_the_step_that_lacks_something_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = steps.find(steps.LONG, ["tests", "kernels"])
    monkeypatch.setattr(needs.shutil, "which", lambda name: name)  # type: ignore[attr-defined]
    monkeypatch.setattr(needs, "version", lambda name: "99.0")
    assert needs.missing(wanted, build=True) == {}
    lacks = needs.lacks
    monkeypatch.setattr(needs, "lacks", lambda name, oldest=(): "no" if name == "triton" else lacks(name, oldest))
    assert needs.missing(wanted, build=True) == {"no": ["kernels"]}
    monkeypatch.setattr(needs, "version", lambda name: "2.10.0+cu130")
    assert lacks("torch", (2, 11)) == "torch>=2.11: 2.10.0+cu130 is installed"
    assert lacks("torch", (2, 10)) is None
    assert list(needs.missing([], build=False)) == []


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
    assert [path.name for path in target.parent.iterdir()] == ["gpu.json"]
