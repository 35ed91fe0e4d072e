"""The layout of the source tree: the size of files, and imports without cycles."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.helpers.source_tree import ROOT, source_files

MOST_LINES = 400
GENERATED = ("tests/repository/public_api.txt", "constraints.txt")
CODE = {".py", ".js", ".css", ".html", ".sh", ".h", ".cuh", ".cpp", ".cu", ".md", ".toml"}


def test_no_file_is_longer_than_400_lines() -> None:
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in source_files() if Path(name).suffix in CODE}
    assert len(lines) > 300
    assert {name: count for name, count in lines.items() if count > MOST_LINES and name not in GENERATED} == {}


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: str) -> dict[str, set[str]]:
    """Returns the modules of a package that each of them imports, anywhere in its code.

    The package itself is left out: its ``__init__`` imports on demand, and importing any module runs it first.
    """
    paths = modules(package)
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                targets.update(target if target in paths else node.module for target in names)
            elif isinstance(node, ast.Import):
                targets.update(alias.name for alias in node.names)
        graph[name] = {target for target in targets if target in paths and target not in (name, package)}
    graph.pop(package, None)
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Returns what is left of a graph after nodes that import nothing are removed again and again, if anything."""
    left = {name: set(targets) for name, targets in graph.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    used = {target for targets in left.values() for target in targets}
    return [[name, *sorted(targets & left.keys())] for name, targets in sorted(left.items()) if name in used]


def test_a_cycle_is_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()})
    assert not cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_no_module_imports_one_that_imports_it() -> None:
    for package in ("fastfs", "build_backend", "benchmarks", "tests"):
        graph = imports(package)
        assert graph
        assert cycles(graph) == []
