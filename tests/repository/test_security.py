"""What SECURITY.md says of the package: it unpickles nothing and evaluates no text."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.helpers.source_tree import ROOT

# Modules that execute what they read, or start programs, and calls that do.
MODULES = {"code", "codeop", "ctypes", "dill", "cloudpickle", "joblib", "marshal", "pickle", "pty", "runpy", "shelve"}
MODULES |= {"subprocess", "yaml"}
NAMES = {"__import__", "compile", "eval", "exec", "execfile"}
METHODS = {
    "torch": {"load"},
    "torch.jit": {"load"},
    "torch.package": {"PackageImporter"},
    "os": {"execv", "popen", "posix_spawn", "startfile", "system"},
    "numpy": {"load"},
    "np": {"load"},
    "pd": {"read_pickle", "eval"},
    "pandas": {"read_pickle", "eval"},
}
# The factory that the user names runs as the user's code.
ALLOWED = {"fastfs/scaling/_factory.py": {"spec.loader.exec_module"}}


def findings(code: str) -> set[str]:
    """The imports and calls in a module that SECURITY.md rules out."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] in MODULES:
                found.add(node.module)
            found |= {f"{node.module}.{a.name}" for a in node.names if a.name in METHODS.get(node.module, ())}
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            owner, _, method = name.rpartition(".")
            plain = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
            if name == "torch.load" and plain:  # tensors and plain values
                continue
            if name in NAMES or method in METHODS.get(owner, ()) or method == "exec_module":
                found.add(name)
            if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                found.add(f"{name}(allow_pickle=)")
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "fastfs").rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    assert findings(path.read_text()) == allowed


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "from torch import load",
        "def f(x):\n    return eval(x)",
        "np.load(path, allow_pickle=True)",
        "import subprocess as s",
        "import os\nos.system(line)",
    ],
)
def test_what_is_ruled_out_is_found(code: str) -> None:
    assert findings(code)


def test_what_is_not_ruled_out_is_not_found() -> None:
    assert findings("import re, json\nre.compile(x)\ntorch.compile(model)\nmodel.eval()\njson.load(file)") == set()
