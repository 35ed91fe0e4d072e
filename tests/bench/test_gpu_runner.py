"""The runner of gpu.sh: limits, steps beside others, failing tests, and what is left when it is ended early."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import runner
from benchmarks.gpu.collect import add
from benchmarks.gpu.runner import FAILED, LACKS, NOT_RUN, OK, STARTED, TIMED_OUT, Places, Runner
from benchmarks.gpu.steps import Step

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"device": "a GPU", "driver": "1", "torch": "2", "core": {"cuda": {"architectures": "90"}}}

TEST_OUTPUT = """
tests/a.py::test_good PASSED                                   [ 25%]
tests/a.py::test_bad[x y] FAILED                               [ 50%]
tests/a.py::test_left_out SKIPPED (no GPU)                     [ 75%]
tests/a.py::test_interrupted
"""
TEST_REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_good"/>
<testcase classname="tests.a" name="test_bad[x y]"><failure message="assert 1 == 2&#10;where 1 is one"/></testcase>
<testcase classname="tests.a" name="test_left_out"><skipped message="no GPU"/></testcase>
<testcase classname="tests.a" name="test_interrupted"/>
<testcase classname="" name="tests.b"><error message="collection failure">ImportError: no c</error></testcase>
</testsuite></testsuites>"""
FAILING = [
    {"test": "tests/a.py::test_bad[x y]", "message": "where 1 is one"},
    {"test": "tests.b", "message": "collection failure"},
]


def python(code: str) -> tuple[str, ...]:
    return "{python}", "-c", code


def run(tmp_path: Path, *steps: Step, seconds: float = 60, lacking: Any = None) -> tuple[list[str], dict[str, Any]]:
    target = tmp_path / "gpu.json"
    places = Places(sys.executable, tmp_path)
    end = time.monotonic() + seconds
    failed = Runner(places, lambda entries: add(target, entries, FACTS), FACTS, end).run(steps, lacking or {})
    return failed, json.loads(target.read_text())["steps"]


def test_statuses_figures_and_failing_tests(tmp_path: Path) -> None:
    figures = 'import json, sys; open(sys.argv[1], "w").write(json.dumps({"results": [1], "environment": {}}))'
    report = "import sys; open(sys.argv[1], 'w').write(sys.argv[2]); print(sys.argv[3]); sys.exit(1)"
    failed, found = run(
        tmp_path,
        Step("good", (*python(figures), "{parts}/good.json"), result="{parts}/good.json"),
        Step("bad", (*python(report), "{parts}/bad.xml", TEST_REPORT, TEST_OUTPUT), result="{parts}/bad.xml"),
        Step("mute", python("print('all is lost'); raise SystemExit(3)")),
        Step("absent", ("/no/such/program",)),
        Step("judged", python("print('nonsense')"), judge=lambda text: f"it says {text.strip()}"),
        Step("needy", python("")),
        lacking={"needy": "triton: not installed"},
    )
    assert failed == ["bad", "mute", "absent", "judged", "needy"]
    assert found["good"]["status"] == OK
    assert found["good"]["results"] == [1]
    assert found["good"]["environment"] == {"device": "a GPU", "driver": "1"}
    assert found["bad"]["status"] == FAILED
    assert found["bad"]["tests"] == {"passed": 1, "skipped": 1, "failed": 2}
    assert found["bad"]["failing"] == FAILING
    assert found["mute"]["output"] == ["all is lost"]
    assert "no/such/program" in found["absent"]["output"][0]
    assert (found["judged"]["status"], found["judged"]["why"]) == (FAILED, "it says nonsense")
    assert found["needy"] == {"status": LACKS, "lacks": "triton: not installed"}


def test_a_step_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    hangs = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        "print(child.pid, flush=True)\n"
        "print('[gw1] [ 50%] FAILED tests/a.py::test_bad ', flush=True)\n"
        "print('tests/a.py::test_good PASSED', flush=True)\n"
        "time.sleep(100)\n"
    )
    step = Step("hangs", python(hangs), limit=2, result="{parts}/hangs.xml")
    failed, found = run(tmp_path, step, Step("next", python("")))
    assert failed == ["hangs"]
    assert found["hangs"]["status"] == TIMED_OUT
    assert found["hangs"]["tests"] == {"passed": 1, "skipped": 0, "failed": 1}
    assert found["hangs"]["failing"] == [{"test": "tests/a.py::test_bad", "message": ""}]
    assert found["next"]["status"] == OK
    child = int((tmp_path / "hangs.txt").read_text().splitlines()[0])
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_an_old_result_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "kernels.json").write_text('{"results": [1]}')
    _, found = run(tmp_path, Step("kernels", python("raise SystemExit(1)"), result="{parts}/kernels.json"))
    assert found["kernels"]["status"] == FAILED
    assert found["kernels"]["results"] is None


def test_a_step_alone_waits_for_those_beside(tmp_path: Path) -> None:
    def waits_for(mark: str) -> str:
        return f"import os, time\nwhile not os.path.exists({str(tmp_path / mark)!r}): time.sleep(0.02)\n"

    def makes(mark: str) -> str:
        return f"open({str(tmp_path / mark)!r}, 'w')\n"

    failed, found = run(
        tmp_path,
        Step("beside", python(waits_for("together") + makes("over")), beside=True, alone=False),
        Step("together", python(makes("together")), alone=False),
        Step("alone", python(f"import os; raise SystemExit(not os.path.exists({str(tmp_path / 'over')!r}))")),
    )
    assert failed == []
    assert {entry["status"] for entry in found.values()} == {OK}


def test_what_no_longer_fits_is_not_run(tmp_path: Path) -> None:
    failed, found = run(tmp_path, Step("late", python(""), limit=90), seconds=runner._GRACE + 1)
    assert failed == ["late"]
    assert found["late"] == {"status": NOT_RUN, "why": "the time for all steps was used up"}


# The script, with an interpreter that stands for all steps

STUB = """#!/bin/sh
here=$(dirname "$0")
for last; do :; done
case "$*" in
"-m benchmarks.gpu short") exec "{python}" "$@" ;;
"-m benchmarks.gpu.collect") echo '{facts}' ;;
*feature_stats*) echo '{{"results": ["figures"]}}' > "$last" ;;
*test_combinations*) echo $$ > "$here/pid"; exec sleep 60 ;;
*pytest*)
  for word; do case "$word" in */tests.xml) cp "$here/report.xml" "$word"; cat "$here/output" ;; esac; done
  exit 1
  ;;
esac
"""


@pytest.fixture
def script(tmp_path: Path) -> dict[str, Any]:
    """Arguments of subprocess.Popen for `benchmarks/gpu.sh short`, with triton and the sanitizer pretended."""
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable, facts=json.dumps(FACTS)))
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text("#!/bin/sh\necho 'ERROR SUMMARY: 0 errors'\n")
    for program in (stub, sanitizer):
        program.chmod(0o755)
    (tmp_path / "report.xml").write_text(TEST_REPORT)
    (tmp_path / "output").write_text(TEST_OUTPUT)
    (tmp_path / "triton-3.dist-info").mkdir()
    (tmp_path / "triton-3.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 3.6\n")
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
        "PYTHON": str(stub),
        "OUT": str(tmp_path / "out"),
        "PARTS": str(tmp_path / "parts"),
    }
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), "short"]
    return {"args": command, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}


def check_first_steps(found: dict[str, Any]) -> None:
    assert found["machine"]["device"] == "a GPU"
    at = found["steps"]
    for name in ("doctor", "memcheck", "racecheck", "synccheck", "kernels"):
        assert at[name]["status"] == OK
    assert at["memcheck"]["output"] == ["ERROR SUMMARY: 0 errors"]
    assert at["tests"]["failing"] == FAILING
    assert at["kernels"]["results"] == ["figures"]


@pytest.mark.slow
def test_the_script_ends_in_time_and_says_what_was_not_run(tmp_path: Path, script: dict[str, Any]) -> None:
    script["env"]["LIMIT"] = "14"
    done = subprocess.run(**script, timeout=60)
    assert done.returncode == 1
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    check_first_steps(found)
    assert found["steps"]["training_tests"]["status"] == TIMED_OUT
    assert found["steps"]["bench"]["status"] == NOT_RUN
    assert done.stderr.splitlines()[-1].startswith("gpu.sh: not ok: tests training_tests ")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_finished_is_in_the_file_if_the_script_is_ended(
    tmp_path: Path, script: dict[str, Any], how: signal.Signals
) -> None:
    process = subprocess.Popen(**script)
    pid = tmp_path / "pid"
    try:
        for _ in range(600):
            if pid.exists() and pid.read_text():
                break
            time.sleep(0.1)
        process.send_signal(how)
        process.communicate(timeout=30)
        found = json.loads((tmp_path / "out" / "gpu.json").read_text())
        check_first_steps(found)
        assert found["steps"]["training_tests"]["status"] == STARTED
        assert found["steps"]["monitor"] == {"status": NOT_RUN}
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu.json"]
        if how is signal.SIGTERM:
            assert not Path(f"/proc/{pid.read_text().strip()}").exists()
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
            os.kill(int(pid.read_text()), signal.SIGKILL)
