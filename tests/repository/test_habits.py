"""What keeps the repository in order: hooks, pins, and how files end."""

from __future__ import annotations

import re

from packaging.requirements import Requirement

from tests.helpers.source_tree import ROOT, source_files

BINARY = {".png", ".so"}


def requirements(extra: str) -> list[Requirement]:
    """The packages of an extra in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf"^{extra} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    assert found, extra
    return [Requirement(word) for word in re.findall(r'"([^"]+)"', re.sub(r"\[[\w,]+\]", "", found[1]))]


def test_hooks_are_the_linters_of_the_makefile() -> None:
    makefile, hooks = (ROOT / "Makefile").read_text(), (ROOT / ".pre-commit-config.yaml").read_text()
    found = re.search(r"^LINT := (.*)$", makefile, re.MULTILINE)
    assert found
    names = found[1].split()
    assert re.findall(r"- id: (\S+)", hooks) == names
    assert re.findall(r"entry: (.*)", hooks) == [f"make {name}" for name in names]
    for name in names:
        assert re.search(rf"^{name}:\n\t", makefile, re.MULTILINE), name


def test_every_tool_has_one_pin() -> None:
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    normal = [re.sub(r"[-_.]+", "-", pin.name).lower() for pin in pins]
    for pin in pins:
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), str(pin)
    for version in ("3.10", "3.11", "3.12", "3.13"):
        valid = [name for name, pin in zip(normal, pins, strict=True) if _holds(pin, version)]
        assert sorted(set(valid)) == sorted(valid), version
        for requirement in (*requirements("dev"), *requirements("test")):
            name = requirement.name.lower()
            assert name in valid or name in ("fastfs", "setuptools"), f"{name} on Python {version}"


def _holds(pin: Requirement, version: str) -> bool:
    return pin.marker is None or pin.marker.evaluate({"python_version": version})


def test_lines_end_as_editorconfig_says() -> None:
    for name in source_files():
        path = ROOT / name
        if path.suffix in BINARY:
            continue
        text = path.read_bytes().decode()
        assert "\r" not in text, name
        assert not text or text.endswith("\n"), name
        assert not re.search(r"[ \t]$", text, re.MULTILINE), name
