"""Run the steps of gpu.sh: `python -m benchmarks.gpu [short | STEP...]`. See benchmarks/gpu.sh for the options."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu import needs
from benchmarks.gpu.collect import add
from benchmarks.gpu.runner import Places, Runner
from benchmarks.gpu.steps import BUILD, LONG, SHORT, SHORT_SECONDS, Step, find

ROOT = Path(__file__).resolve().parents[2]
FIRST = ("needs", "machine", "build")
"""What comes before the steps; as the only argument, the last thing that is done."""


def main(arguments: Sequence[str]) -> int:
    """Run the steps that the arguments name.

    Returns:
        The exit status: 0 if all steps are ok, 1 if not, 2 if a step is unknown.
    """
    began = time.monotonic()
    short = list(arguments) == ["short"]
    names = [step.name for step in LONG]
    wanted = [name for name in arguments if name not in FIRST]
    if not short and (unknown := [name for name in wanted if name not in names]):
        known = " ".join((*FIRST, *names))
        print(f"gpu.sh: unknown step {' '.join(unknown)}; steps: short, or some of {known}", file=sys.stderr)
        return 2
    last = arguments[0] if len(arguments) == 1 and arguments[0] in FIRST else None
    steps: Sequence[Step] = SHORT if short else find(LONG, wanted) if arguments else LONG
    parts, out = (Path(os.environ.get(k, v)) for k, v in (("PARTS", "build/gpu"), ("OUT", "benchmarks/results")))
    variants = Path(os.environ.get("VARIANTS", "build/variants"))
    places = Places(
        os.environ.get("PYTHON", sys.executable),
        parts,
        variants if variants.is_dir() else None,
        os.environ.get("QUICK") == "1",
        ROOT,
    )

    print("\n== needs", flush=True)
    missing = needs.missing(steps, build=not short)
    needs.report(missing)
    lacking = {name: what for what, users in missing.items() for name in users}
    if BUILD.name in lacking:
        return 1
    if last == "needs":
        return 0

    print("\n== machine", flush=True)
    found = subprocess.run(
        [places.python, "-m", "benchmarks.gpu.collect"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if found.returncode != 0:
        return 1
    facts: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    print(json.dumps(facts, indent=1))
    target = out / "gpu.json"
    try:
        add(target, {}, facts)
    except ValueError as error:
        print(f"gpu.sh: {target}: {error}; choose another folder with OUT, or move the file", file=sys.stderr)
        return 1
    if last == "machine":
        return 0
    parts.mkdir(parents=True, exist_ok=True)
    seconds = float(os.environ.get("LIMIT", SHORT_SECONDS)) if short else math.inf
    runner = Runner(places, lambda entries: add(target, entries, facts), facts, began + seconds)
    signal.signal(signal.SIGTERM, _interrupt)

    loads = bool(facts["core"] and facts["core"]["cuda"])
    made_of, fingerprint = parts / "made_of", "" if short else _made_of()
    if loads and (short or (made_of.exists() and made_of.read_text() == fingerprint)):
        print(
            "\n== build\nthe core is used as it was built" if short else "\n== build\nnothing has changed", flush=True
        )
    elif runner.run([BUILD], {}):
        return 1
    elif not short:
        made_of.write_text(fingerprint)
    if last == "build":
        return 0

    failed = runner.run(steps, lacking)
    print(f"\n== results in {target}")
    if failed:
        print(f"gpu.sh: not ok: {' '.join(failed)}", file=sys.stderr)
        return 1
    print("all steps passed")
    return 0


def _made_of() -> str:
    """Return what the core is made of: digests of the sources, and the versions of the interpreter and of nvcc."""
    files = [ROOT / "setup.py", *(p for folder in ("csrc", "build_backend") for p in (ROOT / folder).rglob("*"))]
    lines = [
        f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(files)
        if path.is_file() and path.suffix != ".pyc"
    ]
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return "\n".join([*lines, sys.version, nvcc])


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End with the processes that the steps have started."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
