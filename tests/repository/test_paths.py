"""Paths in prose exist: those that CONTRIBUTING.md, the documentation and the docstrings of packages name."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from functools import cache
from importlib.metadata import metadata
from pathlib import PurePosixPath

import pytest

from tests.helpers.source_tree import ROOT, source_files

DOCUMENTS = ("README.md", *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")))
PACKAGES = tuple(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("fastfs/**/__init__.py")))

SUFFIXES = "c|cfg|cpp|cu|cuh|css|h|html|js|json|md|png|py|sh|toml|txt|yaml|yml"
PATH = re.compile(rf"[\w.*{{}},-]+(?:/[\w.*{{}},-]+)*(?:/|(?<=[\w*])\.(?:{SUFFIXES}))")
# Documents for users also name the files of users; only paths below these folders are of the repository.
FOLDERS = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir())
# Made by commands, and therefore not in a clone.
GENERATED = re.compile(
    r"(?:\.venv|build|dist|run|runs|wheelhouse)/.*|benchmarks/results/gpu.*|docs/figures/.*-gpu\.png"
)


@cache
def files_and_folders() -> tuple[str, ...]:
    """The paths of the source tree; folders end in a slash."""
    names = source_files()
    folders = {f"{parent.as_posix()}/" for name in names for parent in PurePosixPath(name).parents if parent.name}
    return (*names, *sorted(folders))


def alternatives(text: str) -> list[str]:
    """The texts that braces stand for: `a.{h,cpp}` is `a.h` and `a.cpp`."""
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None:
        return [text]
    return [name for part in found[1].split(",") for name in alternatives(text.replace(found[0], part.strip(), 1))]


def is_there(name: str) -> bool:
    """Whether a file or folder of the tree has this path, or ends with it: prose may leave out the first folders."""
    pattern = re.escape(name.removeprefix("./")).replace(r"\*", "[^/]*")
    return any(re.search(rf"(?:^|/){pattern}$", path) for path in files_and_folders())


def paths_in(text: str) -> list[str]:
    """What looks like a path in the code spans and code blocks of a text, and what its links lead to."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$|((?:^ {4}[^\n]*\n)+)", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`+([^`\n]+)`+", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    words = [word for span in [*spans, *(part for block in blocks for part in block)] for word in span.split()]
    names = [name for word in words for name in alternatives(word.strip("()[]\"',;:"))]
    return [name for name in names if PATH.fullmatch(name) and not GENERATED.fullmatch(name) and "NAME" not in name]


def missing(text: str) -> list[str]:
    return sorted({name for name in paths_in(text) if not is_there(name)})


def test_paths_of_contributing_exist() -> None:
    assert missing((ROOT / "CONTRIBUTING.md").read_text()) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_of_documents_exist(name: str) -> None:
    assert [path for path in missing((ROOT / name).read_text()) if path.startswith(FOLDERS)] == []


@pytest.mark.parametrize("name", PACKAGES)
def test_paths_and_modules_of_package_docstrings_exist(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / name).read_text())) or ""
    assert missing(docstring) == []
    folder = (ROOT / name).parent
    package = importlib.import_module(".".join(folder.relative_to(ROOT).parts))
    names = re.findall(r"``(\w+)``", docstring)
    known = {path.stem for path in folder.iterdir()} | {package.__name__.partition(".")[0], *vars(package)}
    known |= set(metadata("fastfs").get_all("Provides-Extra", []))
    assert [word for word in names if word not in known and not hasattr(builtins, word)] == []


def test_a_path_that_is_not_there_is_found() -> None:
    text = "`csrc/nowhere.h`, `fastfs/_core/` and `setup.{py,toml}`\n\n    scripts/nothing.py --json FILE\n"
    assert missing(text) == ["csrc/nowhere.h", "scripts/nothing.py", "setup.toml"]
