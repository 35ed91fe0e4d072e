"""The locks of the tools: complete, with hashes alone, and in the versions of constraints.txt."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.lock_tools import TOOLS, locked
from scripts.pyproject import ROOT, read_pyproject

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
LOCKS = {name: (ROOT / "locks" / f"{name}.txt").read_text() for name in ("build", "tools")}
# Releases of torch bound it in different ways, so it has no pin for development.
NOT_CONSTRAINED = {"setuptools"}


def pins(text: str, python: str) -> dict[str, str]:
    """The versions that hold for a version of Python on Linux, by normal name."""
    environment = {"python_version": python, "python_full_version": f"{python}.1", "os_name": "posix"}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_python_implementation": "CPython"}
    found: dict[str, str] = {}
    for line in re.findall(r"^[A-Za-z].*?(?= \\$|$)", text, re.MULTILINE):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert canonicalize_name(requirement.name) not in found, line
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_pins_and_hashes_and_nothing_else(lock: str) -> None:
    blocks = re.split(r"^(?=\S)", LOCKS[lock], flags=re.MULTILINE)[1:]
    assert len(blocks) >= len(locked()[lock])
    for block in blocks:
        assert re.fullmatch(r"[\w.-]+==[\w.]+( ; [^\\\n]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n", block), block


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("python", PYTHONS)
def test_a_lock_has_the_versions_of_the_constraints(lock: str, python: str) -> None:
    constraints = pins((ROOT / "constraints.txt").read_text(), python)
    of_lock = {name: pin for name, pin in pins(LOCKS[lock], python).items() if name not in NOT_CONSTRAINED}
    assert of_lock == {name: constraints.get(name) for name in of_lock}


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("python", PYTHONS)
def test_a_lock_has_what_it_is_for(lock: str, python: str) -> None:
    present = pins(LOCKS[lock], python)
    for requirement in map(Requirement, locked()[lock]):
        if requirement.marker is not None and not requirement.marker.evaluate({"python_version": python}):
            continue
        assert requirement.specifier.contains(present[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_is_closed(lock: str) -> None:
    """With --require-hashes, pip refuses what a package of the lock needs and the lock lacks."""
    present = pins(LOCKS[lock], "{}.{}".format(*sys.version_info))
    seen = 0
    for name, pin in present.items():
        try:
            if version(name) != pin:
                continue
        except PackageNotFoundError:
            continue
        seen += 1
        for requirement in map(Requirement, requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed = canonicalize_name(requirement.name)
                assert needed in present, f"{name} needs {needed}"
                assert requirement.specifier.contains(present[needed]), f"{name} needs {requirement}"
    assert seen


def test_locked_tools_are_those_of_the_extras() -> None:
    extras = read_pyproject()["project"]["optional-dependencies"]
    names = {Requirement(word).name for extra in ("dev", "test") for word in extras[extra]}
    assert set(TOOLS) <= names
    # What is left out: the packages under test, and those whose right files depend on the machine.
    left_out = names - {Requirement(word).name for word in locked()["tools"]}
    assert left_out == {"fastfs", "nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm", "peft"}
