"""What the steps of gpu.sh need, and what is missing."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from benchmarks.gpu.steps import BUILD, Step

__all__ = ["BUILD_NEEDS", "lacks", "missing", "report"]

# Distributions, with the oldest version where it matters.
BUILD_NEEDS = {"torch": (2, 11), "setuptools": (77,), "pybind11": (2, 13), "ninja": (), "numpy": ()}


def missing(steps: Sequence[Step], *, build: bool) -> dict[str, list[str]]:
    """Return what is missing, with the names of the steps that need it.

    Args:
        steps: the steps to be run.
        build: whether the core is to be compiled.

    Returns:
        The names of steps by what is missing; "build" stands for the core.
    """
    found: dict[str, list[str]] = {}
    for name, oldest in BUILD_NEEDS.items() if build else ():
        if problem := lacks(name, oldest):
            found.setdefault(problem, []).append(BUILD.name)
    for step in steps:
        problems = [lacks(name) for name in step.needs]
        problems += [_lacks_program(name) for name in step.programs]
        for problem in filter(None, problems):
            found.setdefault(problem, []).append(step.name)
    if build and (problem := _lacks_program("nvcc")):
        found.setdefault(problem, []).append(BUILD.name)
    return found


def report(found: dict[str, list[str]]) -> None:
    """Print what is missing to stderr."""
    if not found:
        print("everything is there", file=sys.stderr)
        return
    lines = [f"  {what} (for {', '.join(users)})" for what, users in found.items()]
    print(f"gpu.sh: missing for {sys.executable}:\n" + "\n".join(lines), file=sys.stderr)
    print(
        "Without a network: on another machine `pip install --target DIR PACKAGES` for this Python, then here "
        "PYTHONPATH=DIR benchmarks/gpu.sh",
        file=sys.stderr,
    )


def lacks(name: str, oldest: tuple[int, ...] = ()) -> str | None:
    """Return what is wrong with a distribution, or None."""
    wanted = name + (">=" + ".".join(map(str, oldest)) if oldest else "")
    try:
        found = version(name)
    except PackageNotFoundError:
        return f"{wanted}: not installed"
    parts = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    return f"{wanted}: {found} is installed" if oldest and parts < oldest else None


def _lacks_program(name: str) -> str | None:
    return None if shutil.which(name) else f"{name}: not on PATH nor in CUDA_HOME"
