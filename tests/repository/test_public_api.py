"""The public interface: what `__all__` of the public modules lists, what `dir` shows, and all signatures."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import fastfs

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = ("fastfs", "formula", "integrations", "models", "monitor", "reference", "scaling", "spectrum")
MODULES = tuple(name if name == "fastfs" else f"fastfs.{name}" for name in PUBLIC)
PINNED = Path(__file__).with_name("public_api.txt")


def signature(thing: Any) -> str:
    try:
        # The addresses of default values differ between runs.
        return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(thing)))
    except (TypeError, ValueError):
        return ""


def members(cls: type) -> list[str]:
    """Returns the public methods and properties that classes of fastfs define on `cls`, with their signatures."""
    found = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("fastfs"):
            found.update({name: value for name, value in vars(base).items() if not name.startswith("_")})
    lines = []
    for name, value in sorted(found.items()):
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        lines.append(f"    {name}{signature(function) if inspect.isfunction(function) else ''}")
    return lines


def public_api() -> str:
    lines = []
    for name in MODULES:
        module = importlib.import_module(name)
        lines.append(f"{name}")
        for exported in module.__all__:
            thing = getattr(module, exported)
            if inspect.ismodule(thing) or isinstance(thing, str):
                lines.append(f"  {exported}")
                continue
            lines.append(f"  {exported}{signature(thing)}")
            if inspect.isclass(thing):
                lines += members(thing)
    return "\n".join(lines) + "\n"


def test_names_and_signatures_are_the_pinned_ones() -> None:
    """To change the public interface, write the pinned file anew with `python -m tests.repository.test_public_api`."""
    assert public_api() == PINNED.read_text()


@pytest.mark.parametrize("name", MODULES)
def test_dir_shows_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    assert dir(module) == sorted(module.__all__)
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    for exported in module.__all__:
        getattr(module, exported)


def test_everything_else_has_an_underscore() -> None:
    package = Path(fastfs.__file__).parent
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        if parts == ("__init__",) or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        assert parts[0] in PUBLIC, f"{path}: expected a public module or a name that starts with an underscore"
        assert parts[1:] in ((), ("__init__",)), f"{path}: a module in a public package must start with an underscore"


def test_no_two_public_classes_share_a_name() -> None:
    seen: dict[str, type] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for exported in module.__all__:
            thing = getattr(module, exported)
            if inspect.isclass(thing):
                assert seen.setdefault(exported, thing) is thing, f"{exported} names both {seen[exported]} and {thing}"


def test_no_two_classes_of_the_package_share_a_name() -> None:
    seen: dict[str, Path] = {}
    for path in sorted(Path(fastfs.__file__).parent.rglob("*.py")):
        for found in re.findall(r"(?m)^class ([A-Za-z]\w*)", path.read_text()):
            assert found not in seen, f"class {found} is defined in {seen[found]} and in {path}"
            seen[found] = path


DOTTED = re.compile(r"\bfastfs(?:\.\w+)+")


@pytest.mark.parametrize(
    "name", ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_documents_name_only_what_is_public(name: str) -> None:
    for word in DOTTED.findall((ROOT / name).read_text()):
        parts = word.split(".")
        for part in parts:
            assert not part.startswith("_") or part == "__version__", f"{name}: {word} is internal"
        thing: Any = fastfs
        for index, part in enumerate(parts[1:]):
            exported = getattr(thing, "__all__", None)
            if exported is not None:
                assert part in exported, f"{name}: {word} is not public"
            elif inspect.ismodule(thing):
                raise AssertionError(f"{name}: {word}: {'.'.join(parts[: index + 1])} is not public")
            if not hasattr(thing, part):
                break  # an attribute of instances only
            thing = getattr(thing, part)


if __name__ == "__main__":
    PINNED.write_text(public_api())
