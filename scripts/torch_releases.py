#!/usr/bin/env python3
"""Run the test suite under several torch releases, each in its own virtual environment.

    scripts/torch_releases.py [--releases oldest newest] [--select tests/core/test_ops.py "compile or jvp"] [--jobs 2]

A release is a version, or `oldest` (the floor in pyproject.toml), `pinned` (the one in constraints.txt) or `newest`
(the one that pip would install today). Other packages are installed as constraints.txt pins them, and fastfs itself as
editable. The native core does not depend on torch: one compiled in the tree for the same Python serves every release.

Every test file runs in its own process, so that a crash or time-out affects one file. Results are kept below --folder:
the same command after an interruption runs the missing files, and all files after a source or a test has changed.
Durations are compared with those of the pinned release if it ran too. The exit code is 1 if a test fails or a release
cannot be installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("fastfs", "tests", "benchmarks", "build_backend", "csrc", "docs", "examples", "scripts")
SUFFIXES = frozenset(".py .h .cuh .cpp .cu .md .sh .css .js .html .toml .txt".split())
LINE = 240  # longest message in characters


class ReleaseError(Exception):
    """A release cannot be tested. The message says why in one line."""


@dataclass(frozen=True)
class Selection:
    """The selected test files relative to the tree, an expression for `pytest -k`, and excluded files with reasons."""

    files: tuple[str, ...]
    expression: str
    left_out: dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    selection = select(options.select, options.leave_out)
    folder = options.folder.resolve()
    tree = fingerprint(ROOT)
    reports: list[dict[str, Any]] = []
    try:
        releases = dict.fromkeys([resolve(name, options.python) for name in options.releases])
    except ReleaseError as error:
        raise SystemExit(f"--releases: {error}") from None
    for release in releases:
        try:
            python = environment(folder, release, options.python, pinned=not options.unpinned)
            files = run_all(python, selection, tree, options.jobs, options.timeout)
            reports.append(report(release, python, files, selection))
        except ReleaseError as error:
            reports.append({"release": release, "error": plain(str(error))})
        except KeyboardInterrupt:
            print("interrupted; the same command continues from here")
            return 130
        print(line(reports[-1]), flush=True)
    compare_durations(reports, pinned_release())
    if options.json:
        options.json.write_text(json.dumps(document(reports, selection, options), indent=1) + "\n")
    return 1 if any(one.get("error") or one["failed"] for one in reports) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The test suite under several torch releases.")
    parser.add_argument("--releases", nargs="+", default=["oldest", "newest"], metavar="RELEASE")
    parser.add_argument(
        "--select", nargs="+", default=[], metavar="WHAT", help="test files, and a pytest -k expression"
    )
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="FILE=WHY", help="test files, with the reason")
    parser.add_argument("--jobs", type=int, default=1, help="test files at a time (default: 1)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds per test file (default: 1800)")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments (default: this one)")
    parser.add_argument("--unpinned", action="store_true", help="ignore constraints.txt")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "torch_releases", help="environments and results"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    return parser.parse_args(arguments)


# Selection


def select(what: Iterable[str], leave_out: Iterable[str] = ()) -> Selection:
    """Split the words of --select into test files and an expression.

    Raises:
        SystemExit: a file does not exist, or there are two expressions.
    """
    words = list(what)
    files = [word for word in words if word.endswith(".py")]
    expressions = [word for word in words if not word.endswith(".py")]
    if len(expressions) > 1:
        raise SystemExit(f"--select: expected at most one expression for pytest -k, got {expressions}")
    reasons = {}
    for word in leave_out:
        name, given, why = word.partition("=")
        if not given or not why.strip():
            raise SystemExit(f"--leave-out: expected FILE=WHY, got {word!r}")
        reasons[name] = why.strip()
    for name in [*files, *reasons]:
        if not (ROOT / name).is_file():
            raise SystemExit(f"{name}: no such test file; expected a path like tests/core/test_ops.py")
    found = files or [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    kept = tuple(name for name in dict.fromkeys(found) if name not in reasons)
    return Selection(kept, expressions[0] if expressions else "", reasons)


def fingerprint(root: Path) -> str:
    """Return a hash of all sources, tests and documents of the tree."""
    digest = hashlib.sha256()
    paths = [path for name in SOURCES for path in (root / name).rglob("*") if path.suffix in SUFFIXES]
    for path in sorted([*paths, root / "pyproject.toml", root / "constraints.txt"]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# Releases and their environments


def floor_release() -> str:
    """Return the oldest release that pyproject.toml admits."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    if found is None:
        raise ReleaseError("pyproject.toml requires no torch>=VERSION")
    return _three_parts(found[1])


def pinned_release() -> str:
    """Return the release that constraints.txt pins."""
    found = re.search(r"^torch==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if found is None:
        raise ReleaseError("constraints.txt pins no torch")
    return _three_parts(found[1])


def _three_parts(version: str) -> str:
    return ".".join([*version.split("."), "0", "0"][:3])


def resolve(name: str, python: str) -> str:
    """Return the version for `oldest`, `pinned` or `newest`; return any other name unchanged."""
    if name == "oldest":
        return floor_release()
    if name == "pinned":
        return pinned_release()
    if name != "newest":
        return name
    command = [python, *"-m pip install --dry-run --no-deps --ignore-installed -q --report - torch".split()]
    (found,) = json.loads(call(command, {}))["install"]
    return str(found["metadata"]["version"]).partition("+")[0]


def environment(folder: Path, release: str, python: str, *, pinned: bool) -> Path:
    """Return the interpreter of the release's environment, which is created if necessary.

    Raises:
        ReleaseError: pip cannot install the release.
    """
    version = call([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], {}).strip()
    home = folder / f"torch-{release}-python-{version}"
    interpreter, ready = home / "bin" / "python", home / "ready.txt"
    constraints = without_torch((ROOT / "constraints.txt").read_text()) if pinned else ""
    project = (ROOT / "pyproject.toml").read_text().partition("[tool.")[0]  # dependencies, without settings of tools
    state = hashlib.sha256((constraints + project + str(ROOT)).encode()).hexdigest()
    if ready.exists() and ready.read_text() == state:
        return interpreter
    print(f"torch {release}: installing", flush=True)
    call([python, "-m", "venv", home], {})
    (home / "constraints.txt").write_text(constraints)
    have_core = list((ROOT / "fastfs").glob(f"_C.cpython-{version.replace('.', '')}-*.so"))
    install = [interpreter, "-m", "pip", "install", "-q", "-c", home / "constraints.txt"]
    call([*install, f"torch=={release}", "-e", f"{ROOT}[test]"], {"FASTFS_NATIVE": "0"} if have_core else {})
    ready.write_text(state)
    return interpreter


def without_torch(constraints: str) -> str:
    """Return the pins without that of torch."""
    return "".join(text for text in constraints.splitlines(keepends=True) if not text.startswith("torch=="))


def call(command: Sequence[object], settings: dict[str, str]) -> str:
    """Run a command and return its output.

    Raises:
        ReleaseError: the command fails; the message contains its last line with an error.
    """
    env = {**os.environ, **settings}
    done = subprocess.run(
        [str(word) for word in command], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = [text for text in (done.stderr + done.stdout).splitlines() if "error" in text.lower()]
        last = said[-1] if said else (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise ReleaseError(f"{Path(str(command[0])).name} {command[2]} exited with {done.returncode}: {last.strip()}")
    return done.stdout


# Running


def run_all(python: Path, selection: Selection, tree: str, jobs: int, timeout: float) -> dict[str, dict[str, Any]]:
    """Return the result of every file: stored results of the same tree and expression, and new ones."""
    results = python.parent.parent / "results"
    results.mkdir(exist_ok=True)
    stamp = hashlib.sha256(f"{tree} {selection.expression}".encode()).hexdigest()
    running: set[subprocess.Popen[str]] = set()
    ended = threading.Event()

    def one(name: str) -> dict[str, Any]:
        kept = results / f"{Path(name).stem}.json"
        if kept.exists() and (before := json.loads(kept.read_text()))["stamp"] == stamp:
            return dict(before)
        result = {"stamp": stamp, **run_file(python, name, selection.expression, jobs, timeout, running)}
        if ended.is_set():  # its process was killed with the others and has no result
            raise KeyboardInterrupt
        kept.write_text(json.dumps(result, indent=1))
        print(f"  {name}: {tally(result)}, {result['seconds']:.0f} s", flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        try:
            futures = {name: pool.submit(one, name) for name in selection.files}
            pending = set(futures.values())
            while pending:  # a signal just before a wait without end would not be handled
                done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                os.killpg(process.pid, signal.SIGKILL)
            raise


def run_file(
    python: Path, name: str, expression: str, jobs: int, timeout: float, running: set[subprocess.Popen[str]]
) -> dict[str, Any]:
    """Run one test file in its own process group, which a time-out kills as a whole."""
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "junit.xml"
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={written}", name]
        command += ["-k", expression] if expression else []
        env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        running.add(process)
        try:
            said, _ = process.communicate(timeout=timeout)
            ended = f"pytest exited with {process.returncode}: {(said.strip().splitlines() or ['nothing said'])[-1]}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            ended = f"not finished after {timeout:g} s"
        finally:
            running.discard(process)
        result = read_junit(written.read_text() if written.exists() else "")
        result["seconds"] = round(time.monotonic() - began, 2)
    if process.returncode not in (0, 1, 5) and not result["failures"]:  # 5: no test was selected
        result["failures"].append({"test": name, "why": plain(ended)})
    return result


def read_junit(text: str) -> dict[str, Any]:
    """Return counts, failures with their first line, and reasons of skipped tests."""
    passed = 0
    failures: list[dict[str, str]] = []
    skips: Counter[str] = Counter()
    for case in ElementTree.fromstring(text).iter("testcase") if text else ():
        name = f"{case.get('classname', '')}::{case.get('name', '')}".lstrip(":")
        bad = [part for part in case if part.tag in ("failure", "error")]
        skipped = case.find("skipped")
        if bad:
            failures.append({"test": name, "why": plain(bad[0].get("message") or bad[0].text or "no message")})
        elif skipped is not None:
            skips[plain(skipped.get("message") or "no reason")] += 1
        else:
            passed += 1
    return {"passed": passed, "failures": failures, "skips": dict(skips)}


def plain(message: str) -> str:
    """Return the first line of a message, without folders and addresses of this machine."""
    first = next((text.strip() for text in message.splitlines() if text.strip()), "no message")
    first = re.sub(r"\b(https?|file)://\S+", "<address>", first)
    first = first.replace(f"{ROOT}/", "")
    first = re.sub(r"/\S*/site-packages/", "", first)
    first = re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+([\w.+-]*)", r"<folder>/\1", first)
    return first if len(first) <= LINE else first[: LINE - 1] + "…"


# Reporting


def report(release: str, python: Path, files: dict[str, dict[str, Any]], selection: Selection) -> dict[str, Any]:
    """Return one entry of the results."""
    # Reads the metadata, because importing torch would take seconds.
    ask = "import platform; from importlib.metadata import version; print(version('torch'), platform.python_version())"
    torch_version, python_version = call([python, "-c", ask], {}).split()
    skips: Counter[str] = Counter()
    for result in files.values():
        skips.update(result["skips"])
    failures = [failure for result in files.values() for failure in result["failures"]]
    return {
        "release": release,
        "torch": torch_version,
        "python": python_version,
        "files": len(files),
        "passed": sum(result["passed"] for result in files.values()),
        "failed": len(failures),
        "skipped": sum(skips.values()),
        "failures": failures,
        "skips": dict(skips.most_common()),
        "seconds": {name: result["seconds"] for name, result in files.items()},
    }


def compare_durations(reports: Sequence[dict[str, Any]], pinned: str) -> None:
    """Add the duration of each release relative to the pinned one, or null if the latter did not run."""
    base = next((one for one in reports if one["release"] == pinned and "error" not in one), None)
    for one in reports:
        if "error" not in one:
            one["duration"] = None if base is None else ratio(one["seconds"], base["seconds"])


def ratio(seconds: dict[str, float], base: dict[str, float]) -> float | None:
    """Return the ratio of total durations over the files in both."""
    both = seconds.keys() & base.keys()
    below = sum(base[name] for name in both)
    return round(sum(seconds[name] for name in both) / below, 2) if below else None


def document(reports: Sequence[dict[str, Any]], selection: Selection, options: argparse.Namespace) -> dict[str, Any]:
    """Return the content of the JSON file."""
    return {
        "date": date.today().isoformat(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "jobs": options.jobs,
        "pins": "none" if options.unpinned else "constraints.txt without torch",
        "selected": list(options.select) or "all test files",
        "left_out": selection.left_out,
        "pinned": pinned_release(),
        "releases": [
            {**one, "seconds": round(sum(one["seconds"].values()))} if "seconds" in one else one for one in reports
        ],
    }


def tally(result: dict[str, Any]) -> str:
    return f"{result['passed']} passed, {len(result['failures'])} failed, {sum(result['skips'].values())} skipped"


def line(one: dict[str, Any]) -> str:
    """Return a one-line summary."""
    if "error" in one:
        return f"torch {one['release']}: cannot be tested: {one['error']}"
    failed = "".join(f"\n  {failure['test']}: {failure['why']}" for failure in one["failures"])
    counts = f"{one['passed']} passed, {one['failed']} failed, {one['skipped']} skipped"
    return f"torch {one['torch']}, Python {one['python']}: {counts} in {one['files']} files{failed}"


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # shells ignore Ctrl-C in background jobs
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
