"""The files of the repository, in a clone and in an unpacked source distribution."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_MADE = {".git", ".venv", ".hypothesis", "__pycache__"}
_MADE_AT_THE_TOP = {"build", "dist", "runs"}
_OF_DISTRIBUTIONS = {"PKG-INFO", "setup.cfg"}


@cache
def source_files() -> tuple[str, ...]:
    """Every file that is tracked, or would be: relative to the root, with slashes."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return tuple(sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file()))
    found = []
    for folder, folders, names in os.walk(ROOT):
        made = _MADE | (_MADE_AT_THE_TOP if Path(folder) == ROOT else set())
        folders[:] = [name for name in folders if name not in made and not name.endswith(("_cache", ".egg-info"))]
        found += [(Path(folder) / name).relative_to(ROOT).as_posix() for name in names if name not in _OF_DISTRIBUTIONS]
    return tuple(sorted(found))
