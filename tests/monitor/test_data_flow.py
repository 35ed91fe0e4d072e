"""Features go one way from hook to file: no module of the monitor imports from one further down that way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastfs

PACKAGE = Path(fastfs.__file__).parent
MONITOR = PACKAGE / "_monitor"
SHARED = {"optimizers"}  # what users give: it imports nothing of the monitor
MAY_IMPORT = {
    "capture": SHARED | {"_record"},  # reasons
    "measure": SHARED | {"capture", "_record"},
    "ranks": {"pipeline", "_record"},
    "pipeline": set(),
    "payload": SHARED | {"measure", "_record"},
    "engine": SHARED | {"capture", "measure", "payload", "ranks", "_record"},
    "schedule": set(),
    "steps": SHARED,
    **{name: set() for name in SHARED},
}


def imported(path: Path) -> set[str]:
    """Rooms and modules of the monitor that a file imports from, and `_record`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[:2] == ["fastfs", "_monitor"] and len(parts) > 2:
                found.add(parts[2])
            elif parts[:2] == ["fastfs", "_record"]:
                found.add("_record")
    return found


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_imports_follow_the_data(name: str) -> None:
    files = [MONITOR / f"{name}.py"] if (MONITOR / f"{name}.py").exists() else sorted((MONITOR / name).glob("*.py"))
    for path in files:
        assert imported(path) <= MAY_IMPORT[name] | {name}, path.name
    assert files


def test_the_record_knows_nothing_of_the_monitor() -> None:
    for path in (PACKAGE / "_record").rglob("*.py"):
        assert imported(path) <= {"_record"}, path.name


def test_the_engine_and_the_runner_do_not_distinguish_modes() -> None:
    for name in ("engine", "step_runner", "monitor"):
        calls = [n for n in ast.walk(ast.parse((MONITOR / f"{name}.py").read_text())) if isinstance(n, ast.Call)]
        checked = [ast.unparse(c.args[1]) for c in calls if isinstance(c.func, ast.Name) and c.func.id == "isinstance"]
        assert not [cls for cls in checked if "Mode" in cls], name
