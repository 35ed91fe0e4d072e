"""Run steps within their limits, and write what has been found after each of them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu.collect import with_machine
from benchmarks.gpu.steps import Step

__all__ = ["FAILED", "LACKS", "NOT_RUN", "OK", "STARTED", "TIMED_OUT", "Places", "Runner", "failing_tests"]

OK, FAILED, TIMED_OUT, NOT_RUN, STARTED, LACKS = "ok", "failed", "timed out", "not run", "started", "lacks something"

_LEAST = 5.0  # seconds below which a step is not begun
_GRACE = 4.0  # seconds that a step gets to write its results once it is interrupted
# One line of `pytest -v` about a test, in several processes or in one.
_OUTCOME = re.compile(
    r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (tests/.+?) *$"
    r"|^(tests/.+?) (PASSED|FAILED|ERROR|SKIPPED)\b",
    re.MULTILINE,
)
_LAST, _KEPT = 25, 100  # lines of output in the results


@dataclass(frozen=True)
class Places:
    """Where steps run and write.

    Args:
        python: the interpreter.
        parts: folder of logs and partial results.
        prebuilt: folder of kernels that were compiled ahead, or None.
        quick: whether benchmarks are small.
        folder: working directory of the steps.
    """

    python: str
    parts: Path
    prebuilt: Path | None = None
    quick: bool = False
    folder: Path = Path()

    def words(self, command: Sequence[str]) -> list[str]:
        """Return a command with its placeholders replaced."""
        lists = {
            "{quick}": ["--quick"] if self.quick else [],
            "{prebuilt}": ["--prebuilt", str(self.prebuilt)] if self.prebuilt is not None else [],
        }
        return [part for word in command for part in lists.get(word, [self.text(word)])]

    def text(self, word: str) -> str:
        """Return a word with the placeholders of the interpreter and the folder of parts replaced."""
        return word.replace("{python}", self.python).replace("{parts}", str(self.parts))


@dataclass
class Runner:
    """Runs steps one after the other, and some of them beside the others.

    Args:
        places: where steps run and write.
        keep: receives the results of some steps, by name, and writes them.
        facts: about the machine.
        end: when all steps have to be over, in the time of ``time.monotonic()``.
    """

    places: Places
    keep: Callable[[dict[str, Any]], object]
    facts: Mapping[str, Any]
    end: float = math.inf
    _beside: list[threading.Thread] = field(default_factory=list)
    _processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _failed: list[str] = field(default_factory=list)
    _interrupted: bool = False

    def run(self, steps: Sequence[Step], lacking: Mapping[str, str]) -> list[str]:
        """Run the steps.

        Args:
            steps: the steps, in order.
            lacking: what is missing, by the name of the step that needs it.

        Returns:
            The names of the steps that are not ok.
        """
        self.keep({step.name: {"status": NOT_RUN} for step in steps})
        try:
            for step in steps:
                if step.name in lacking:
                    self._finish(step, {"status": LACKS, "lacks": lacking[step.name]})
                elif step.beside:
                    self._beside.append(threading.Thread(target=self._run, args=(step,)))
                    self._beside[-1].start()
                else:
                    if step.alone:
                        self._wait_for_others()
                    self._run(step)
            self._wait_for_others()
        except BaseException:
            self._interrupted = True
            raise
        finally:
            for process in list(self._processes):
                _end(process, signal.SIGKILL)
        return [step.name for step in steps if step.name in self._failed]

    def _wait_for_others(self) -> None:
        for thread in self._beside:
            thread.join()
        self._beside.clear()

    def _run(self, step: Step) -> None:
        left = self.end - time.monotonic() - _GRACE
        limit = min(step.limit, left)
        if limit < min(step.limit, _LEAST):
            self._finish(step, {"status": NOT_RUN, "why": "the time for all steps was used up"})
            return
        print(f"\n== {step.name}, {limit:.0f} s at most", flush=True)
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self._lock:
            self.keep({step.name: {"status": STARTED, "began": began}})
        result = Path(self.places.text(step.result)) if step.result else None
        if result is not None:
            result.unlink(missing_ok=True)
        log = self.places.parts / f"{step.name}.txt"
        start = time.monotonic()
        with log.open("w") as output:
            status = self._call(step, output, limit)
        if self._interrupted:  # it stays "started", since nothing is known about it
            return
        seconds = round(time.monotonic() - start, 1)
        text = log.read_text(errors="replace")
        entry = {"status": status, "seconds": seconds, "began": began, **self._found(step, result, text)}
        if status == OK and step.judge is not None and (wrong := step.judge(text)) is not None:
            entry.update(status=FAILED, why=wrong)
        lines = text.splitlines()
        if entry["status"] != OK or result is None:
            kept = [line for line in lines if step.keeps and re.search(step.keeps, line)][:_KEPT]
            entry["output"] = [line[:300] for line in [*kept, *lines[-_LAST:]]]
        print("\n".join(lines[-_LAST:]))
        self._finish(step, entry)

    def _call(self, step: Step, output: TextIO, limit: float) -> str:
        command = self.places.words(step.command)
        environment = {**os.environ, **step.environment}
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.places.folder,
                start_new_session=True,  # so that what it starts can be ended with it
            )
        except OSError as error:
            output.write(f"{command[0]}: {error}\n")
            return FAILED
        self._processes.add(process)
        try:
            return OK if process.wait(limit) == 0 else FAILED
        except subprocess.TimeoutExpired:
            _end(process, signal.SIGINT)  # pytest and the benchmarks then write what they have
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            return TIMED_OUT
        finally:
            _end(process, signal.SIGKILL)
            process.wait()
            self._processes.discard(process)

    def _found(self, step: Step, result: Path | None, output: str) -> dict[str, Any]:
        """Return the figures or the failing tests of a step, as far as it got."""
        if result is None:
            return {}
        if result.suffix == ".xml":
            return failing_tests(result, output)
        try:
            return with_machine(json.loads(result.read_text()), dict(self.facts))
        except (OSError, ValueError):
            return {"results": None}

    def _finish(self, step: Step, entry: dict[str, Any]) -> None:
        with self._lock:
            if entry["status"] != OK:
                self._failed.append(step.name)
            self.keep({step.name: entry})
        names = ", ".join(test["test"] for test in entry.get("failing", []))
        why = entry.get("why") or entry.get("lacks") or names
        spent = f" after {entry['seconds']} s" if "seconds" in entry else ""
        print(f"-- {step.name}: {entry['status']}{spent}{f': {why}' if why else ''}", flush=True)


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Send a signal to a process and to all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, how)


def failing_tests(report: Path, output: str) -> dict[str, Any]:
    """Return counts and failing tests, each with the last line of its message.

    Args:
        report: the report of pytest, in JUnit's format, which has the messages. It may be absent, and does not tell a
            test that was interrupted from one that passed.
        output: the output of ``pytest -v``, which has a line for each test that ended.

    Returns:
        ``"tests"``, the numbers of passed, failed and skipped tests, and ``"failing"``.
    """
    outcomes = {name or other: word or last for word, name, other, last in _OUTCOME.findall(output)}
    names = {_in_report(name): name for name in outcomes}
    failing = {name: "" for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")}
    with contextlib.suppress(OSError, ElementTree.ParseError):
        for case in ElementTree.parse(report).iter("testcase"):
            problem = next((x for x in case if x.tag in ("failure", "error")), None)
            if problem is not None:
                in_report = f"{case.get('classname')}.{case.get('name')}".strip(".")
                lines = (problem.get("message") or problem.text or "").strip().splitlines() or [""]
                failing[names.get(in_report, in_report)] = lines[-1][:300]
    count = Counter(outcome for name, outcome in outcomes.items() if name not in failing)
    return {
        "tests": {"passed": count["PASSED"], "skipped": count["SKIPPED"], "failed": len(failing)},
        "failing": [{"test": name, "message": message} for name, message in failing.items()],
    }


def _in_report(name: str) -> str:
    """Return the class and name that the report gives to the test ``path/to/file.py::Class::name[parameters]``."""
    path, _, test = name.partition("::")
    test, bracket, parameters = test.partition("[")
    return f"{path.removesuffix('.py').replace('/', '.')}.{test.replace('::', '.')}{bracket}{parameters}"
