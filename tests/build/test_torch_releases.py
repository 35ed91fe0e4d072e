"""scripts/torch_releases.py without downloads: selection, resolution, runs, stored results and output."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = {
    "test_good.py": "def test_one(): pass\ndef test_other(): pass\n",
    "test_mixed.py": (
        "import pytest\n"
        "def test_one(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='no GPU')\n"
        "def test_skipped(): pass\n"
    ),
    "test_crash.py": "import os\ndef test_crash(): os.abort()\n",
    "test_import.py": "import a_module_that_is_not_there\n",
}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script for a small tree, with this interpreter instead of environments."""
    spec = importlib.util.spec_from_file_location("torch_releases", ROOT / "scripts" / "torch_releases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "torch_releases", module)  # dataclasses look up annotations there
    spec.loader.exec_module(module)
    tree = tmp_path / "tree"
    (tree / "tests").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    for name, text in SUITE.items():
        (tree / "tests" / name).write_text(text)

    def environment(folder: Path, release: str, python: str, *, pinned: bool) -> Path:
        if release == "9.9.9":
            raise module.ReleaseError(
                "python -m exited with 1: ERROR: No matching distribution at https://a.host/simple"
            )
        home = folder / f"torch-{release}"
        home.mkdir(parents=True, exist_ok=True)
        (home / "bin").mkdir(exist_ok=True)
        link = home / "bin" / "python"
        if not link.exists():
            link.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            link.chmod(0o755)
        return link

    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # plugins take half of the time of these small suites
    monkeypatch.setattr(module, "ROOT", tree)
    monkeypatch.setattr(module, "environment", environment)
    return module


def run(script: ModuleType, folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    target = folder / "results.json"
    code = script.main(["--folder", str(folder / "work"), "--json", str(target), *words])
    return code, json.loads(target.read_text())


def test_counts_failures_skips_crashes_and_what_does_not_import(script: Any, tmp_path: Path) -> None:
    code, written = run(script, tmp_path, "--releases", "2.11.0", "--jobs", "2")
    (release,) = written["releases"]
    assert code == 1
    assert (release["passed"], release["failed"], release["skipped"], release["files"]) == (3, 3, 1, 4)
    assert release["skips"] == {"no GPU": 1}
    why = {failure["test"]: failure["why"] for failure in release["failures"]}
    assert why["tests.test_mixed::test_bad"] == "AssertionError: one is not two"
    assert why["tests/test_crash.py"].startswith("pytest exited with -6")
    assert any("test_import" in name for name in why)
    assert str(tmp_path) not in json.dumps(written)
    assert written["selected"] == "all test files"


def test_a_second_call_runs_what_is_missing_and_again_after_a_change(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--releases", "2.11.0", "--select", "tests/test_good.py", "tests/test_mixed.py"]
    first = run(script, tmp_path, *words)
    assert "tests/test_good.py: 2 passed" in capsys.readouterr().out
    kept = tmp_path / "work" / "torch-2.11.0" / "results" / "test_mixed.json"
    kept.unlink()
    assert run(script, tmp_path, *words)[1]["releases"][0]["passed"] == first[1]["releases"][0]["passed"]
    said = capsys.readouterr().out
    assert "tests/test_mixed.py: 1 passed" in said
    assert "tests/test_good.py" not in said
    (script.ROOT / "tests" / "test_good.py").write_text("def test_one(): pass\n")
    assert run(script, tmp_path, *words)[1]["releases"][0]["passed"] == 2
    assert "tests/test_good.py: 1 passed" in capsys.readouterr().out


def test_an_expression_and_files_left_out(script: Any, tmp_path: Path) -> None:
    words = ["--select", "one and not other", "--leave-out", "tests/test_crash.py=ends the process"]
    code, written = run(script, tmp_path, "--releases", "2.11.0", *words, "tests/test_import.py=needs a module")
    assert code == 0
    assert written["selected"] == ["one and not other"]
    assert written["left_out"] == {"tests/test_crash.py": "ends the process", "tests/test_import.py": "needs a module"}
    assert written["releases"][0]["passed"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--select", "tests/test_none.py"], "tests/test_none.py: no such test file"),
        (["--select", "one", "other"], "expected at most one expression"),
        (["--leave-out", "tests/test_good.py"], "expected FILE=WHY, got 'tests/test_good.py'"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(script: Any, tmp_path: Path, words: list[Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run(script, tmp_path, *words)


def test_a_release_that_does_not_install_is_an_entry_and_the_others_run(script: Any, tmp_path: Path) -> None:
    code, written = run(script, tmp_path, "--releases", "9.9.9", "2.11.0", "--select", "tests/test_good.py")
    assert code == 1
    assert written["releases"][0] == {
        "release": "9.9.9",
        "error": "python -m exited with 1: ERROR: No matching distribution at <address>",
    }
    assert written["releases"][1]["passed"] == 2


def test_a_file_that_hangs_is_ended_with_what_it_started(script: Any, tmp_path: Path) -> None:
    hang = "import subprocess\ndef test_hang(): subprocess.run(['sleep', '600'])\n"
    (script.ROOT / "tests" / "test_hang.py").write_text(hang)
    began = time.monotonic()
    words = ["--releases", "2.11.0", "--select", "tests/test_hang.py", "--timeout", "3"]
    _, written = run(script, tmp_path, *words)
    assert time.monotonic() - began < 60
    assert written["releases"][0]["failures"] == [{"test": "tests/test_hang.py", "why": "not finished after 3 s"}]


def test_an_interrupt_keeps_what_has_run_and_nothing_else(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (script.ROOT / "tests" / "test_hang.py").write_text("import time\ndef test_hang(): time.sleep(600)\n")
    words = ["--releases", "2.11.0", "--select", "tests/test_good.py", "tests/test_hang.py"]
    kept = tmp_path / "work" / "torch-2.11.0" / "results"

    def interrupt() -> None:
        while not (kept / "test_good.json").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert script.main(["--folder", str(tmp_path / "work"), *words]) == 130
    thread.join()
    assert [path.name for path in kept.iterdir()] == ["test_good.json"]
    assert "continues from here" in capsys.readouterr().out


def test_durations_are_ratios_to_the_pinned_release_of_files_that_both_ran(script: Any) -> None:
    assert script.ratio({"a": 3.0, "b": 1.0, "c": 9.0}, {"a": 1.0, "b": 1.0, "d": 5.0}) == 2.0
    assert script.ratio({"a": 1.0}, {"b": 1.0}) is None
    reports = [{"release": "1", "seconds": {"a": 3.0}}, {"release": "2", "error": "no"}]
    script.compare_durations(reports, "2")
    assert reports[0]["duration"] is None


def test_names_of_releases(script: Any) -> None:
    floor, pinned = script.floor_release(), script.pinned_release()
    assert script.resolve("oldest", sys.executable) == floor
    assert script.resolve("pinned", sys.executable) == pinned
    assert script.resolve("2.12.1", sys.executable) == "2.12.1"
    assert f'"torch>={floor.removesuffix(".0")}"' in (ROOT / "pyproject.toml").read_text()
    pins = (ROOT / "constraints.txt").read_text()
    assert f"torch=={pinned}\n" in pins
    assert script.without_torch(pins) == pins.replace(f"torch=={pinned}\n", "")


def test_messages_name_nothing_of_this_machine(script: Any) -> None:
    text = f"\nOSError: {script.ROOT}/tests/a.py, /scratch/of-me/x.json, /e/lib/site-packages/torch/a.py\nmore"
    assert script.plain(text) == "OSError: tests/a.py, <folder>/x.json, torch/a.py"
    assert len(script.plain("x" * 1000)) == script.LINE
    assert script.plain("") == "no message"
