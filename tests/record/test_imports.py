"""Which packages the record and the report import: readers need neither the monitor nor the sinks."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastfs

PACKAGE = Path(fastfs.__file__).parent
FORBIDDEN = {
    "_record": ("fastfs._monitor", "fastfs._report"),
    "_record/reading": ("fastfs._record.writing", "fastfs._record.sinks"),
    "_record/sinks": ("fastfs._record.writing", "fastfs._record.reading"),
    "_record/writing": ("fastfs._record.reading",),
    "_report": ("fastfs._monitor", "fastfs._record.writing", "fastfs._record.sinks"),
}


def imported(path: Any) -> Iterator[Any]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_packages_import_only_what_they_may(folder: Any) -> None:
    paths = sorted((PACKAGE / folder).rglob("*.py"))
    assert paths
    for path in paths:
        for name in imported(path):
            for package in FORBIDDEN[folder]:
                assert not f"{name}.".startswith(f"{package}."), f"{path} imports {name}"


def test_reading_a_record_does_not_import_the_monitor() -> None:
    script = (
        "import sys, fastfs; fastfs.load; import fastfs._report.watch; "
        "print([name for name in sys.modules if name.startswith('fastfs._monitor')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
