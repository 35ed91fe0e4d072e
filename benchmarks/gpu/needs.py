"""List what the steps of gpu.sh need and what is missing: `python benchmarks/gpu/needs.py STEP...`.

Prints the steps that cannot run, one per line; the exit status is 1 if nothing can be built. Imports only the standard
library.
"""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

# Distributions, with the oldest version where it matters.
BUILD = {"torch": (2, 11), "setuptools": (77,), "pybind11": (2, 13), "ninja": (), "numpy": ()}
DEMO = ("typer", "rich", "matplotlib", "pandas", "scikit-learn")  # and plotly for the page, if it is there
TESTS = ("pytest", "hypothesis", "scipy", *DEMO)  # and expecttest for opcheck
BENCHMARK = ("rich", "triton")
STEPS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("tests", "training_tests"), TESTS),
    **dict.fromkeys(("kernels", "lists", "rows", "updates", "tuning", "cost"), BENCHMARK),
    **dict.fromkeys(("monitor", "monitor_compiled", "timeline"), BENCHMARK),
    "demo": DEMO,
}
SANITIZER = ("memcheck", "racecheck", "synccheck", "initcheck")


def main(steps: list[str]) -> int:
    """Report missing parts to stderr, and print the steps that cannot run."""
    missing: dict[str, list[str]] = {}
    for name, oldest in BUILD.items():
        if found := lacks(name, oldest):
            missing.setdefault(found, []).append("build")
    if not shutil.which("nvcc"):
        missing["nvcc: not on PATH nor in CUDA_HOME"] = ["build"]
    for step in steps:
        for name in STEPS.get(step, ()):
            if found := lacks(name):
                missing.setdefault(found, []).append(step)
        if step in SANITIZER and not shutil.which("compute-sanitizer"):
            missing.setdefault("compute-sanitizer: not on PATH nor in CUDA_HOME", []).append(step)
    if not missing:
        print("everything is there", file=sys.stderr)
        return 0
    lines = [f"  {what} (for {', '.join(users)})" for what, users in missing.items()]
    print(f"gpu.sh: missing for {sys.executable}:\n" + "\n".join(lines), file=sys.stderr)
    print(
        "Without a network: on another machine `pip install --target DIR PACKAGES` for this Python, then here "
        "PYTHONPATH=DIR benchmarks/gpu.sh",
        file=sys.stderr,
    )
    lost = dict.fromkeys(step for users in missing.values() for step in users)
    if "build" in lost:
        return 1
    print("\n".join(lost))
    return 0


def lacks(name: str, oldest: tuple[int, ...] = ()) -> str | None:
    """Return what is wrong with a distribution, or None."""
    wanted = name + (">=" + ".".join(map(str, oldest)) if oldest else "")
    try:
        found = version(name)
    except PackageNotFoundError:
        return f"{wanted}: not installed"
    parts = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    return f"{wanted}: {found} is installed" if oldest and parts < oldest else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
