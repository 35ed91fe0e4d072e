"""Builds and installations in folders of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.helpers.source_tree import ROOT

SITE_PACKAGES = [path for path in sys.path if path.endswith("-packages")]
NOT_SOURCE = shutil.ignore_patterns(".git", ".venv", "*.so", "*.egg-info", "__pycache__", ".*_cache")
MADE_AT_THE_TOP = {"build", "dist", "runs"}

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the native core is for Linux")


def environment(**settings: str) -> dict[str, str]:
    """Return an environment for builds without variables that affect them, and without CUDA unless requested."""
    dropped = ("FASTFS_", "PYTHON", "CUDA_", "NVCC_", "CXX", "CPPFLAGS", "LDFLAGS", "MAX_JOBS")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**env, "FASTFS_CUDA": "0", **settings}


def run(*command: object, cwd: Path, env: dict[str, str] | None = None, code: int = 0) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(
        words, cwd=cwd, env=env or environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    return output


def copy_of_source(folder: Path) -> Path:
    def ignored(where: str, names: list[str]) -> set[str]:
        return NOT_SOURCE(where, names) | (MADE_AT_THE_TOP if Path(where) == ROOT else set())

    return Path(shutil.copytree(ROOT, folder / "source", ignore=ignored))


def environment_with_torch(folder: Path) -> Path:
    """Create a virtual environment with the packages of this one except fastfs, and return its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text("\n".join(SITE_PACKAGES) + "\n")
    return folder / "bin" / "python"


def install(python: Path, *what: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    # --ignore-installed keeps the fastfs of the borrowed packages unchanged.
    options = ("install", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    return run(sys.executable, "-m", "pip", "--python", python, *options, *what, cwd=cwd, env=env)
