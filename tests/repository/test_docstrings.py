"""Docstrings of the public interface: every argument, what is returned, and what is raised, in Google's format.

ruff checks the sections that are there. It takes a docstring of one line as it is, and it counts modules with an
underscore, in which most of the public interface is written, as private.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from fastfs.monitor import AlertRule, Schedule, Sink
from tests.repository.test_public_api import MODULES

SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):\n((?:[ \t]+.*\n|\n)*)", re.MULTILINE)
PROTOCOLS = (AlertRule, Schedule, Sink)


def public_objects() -> Iterator[tuple[str, Any]]:
    """The functions and classes of the public modules, and the methods and properties that these classes bring."""
    seen: set[int] = set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            thing = getattr(module, name)
            if id(thing) in seen or not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            seen.add(id(thing))
            yield f"{module_name}.{name}", thing
            for method, function in methods(thing) if inspect.isclass(thing) else ():
                if id(function) not in seen:
                    seen.add(id(function))
                    yield f"{module_name}.{name}.{method}", function


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods of a class, without those of a protocol or a base class, which are documented there."""
    for base in cls.__mro__:
        if not base.__module__.startswith("fastfs"):
            continue
        for name, value in vars(base).items():
            function = getattr(value, "__func__", value)
            elsewhere = any(hasattr(other, name) for other in (*base.__mro__[1:], *PROTOCOLS) if other is not base)
            if inspect.isfunction(function) and not name.startswith("_") and not (elsewhere and not function.__doc__):
                yield name, function


PUBLIC = dict(public_objects())


def sections(docstring: str) -> dict[str, str]:
    return {title: textwrap.dedent(body) for title, body in SECTION.findall(docstring + "\n")}


def entries(body: str) -> set[str]:
    """The names that a section explains: `name: ...`, `name (type): ...` or `first, second: ...`."""
    heads = [line.partition(": ")[0].rstrip(":") for line in body.splitlines() if line and not line.startswith(" ")]
    return {word.strip("*` ").partition(" ")[0] for head in heads for word in head.split(",")}


def raised(function: Any) -> set[str]:
    """The exceptions that the body of a function raises by name, without those of functions defined in it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    found, todo = set(), list(ast.iter_child_nodes(tree))
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found.add(node.exc.func.id)
        todo += ast.iter_child_nodes(node)
    return {name for name in found if name[0].isupper()}


def lacking(thing: Any) -> list[str]:
    """What the docstring of a public function or class does not say."""
    docstring = inspect.cleandoc(thing.__doc__ or "")
    if not docstring:
        return ["a docstring"]
    found = sections(docstring)
    is_class = inspect.isclass(thing)
    function = vars(thing).get("__init__") if is_class else thing
    if function is None or getattr(thing, "_is_protocol", False):
        return []
    signature = inspect.signature(function)
    parameters = [name for name in signature.parameters if name not in ("self", "cls") and not name.startswith("_")]
    if not parameters and "\n" not in docstring:
        return []
    explained = entries(found.get("Args", "")) | entries(found.get("Attributes", ""))
    gaps = [f"Args: {name}" for name in parameters if name not in explained]
    if not is_class and signature.return_annotation not in (None, "None", "NoReturn", inspect.Signature.empty):
        gaps += [] if {"Returns", "Yields"} & set(found) else ["Returns"]
    if not hasattr(thing, "__dataclass_fields__"):  # the constructor of a dataclass has no source
        gaps += [f"Raises: {name}" for name in sorted(raised(function) - entries(found.get("Raises", "")))]
    return gaps


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_are_complete(name: str) -> None:
    assert lacking(PUBLIC[name]) == []


def test_gaps_are_found() -> None:
    def undocumented(first: int, second: int) -> int:  # noqa: D417
        """Adds.

        Args:
            first: A number.
        """
        if first < 0:
            raise ValueError("negative")
        return first + second

    assert lacking(undocumented) == ["Args: second", "Returns", "Raises: ValueError"]
