"""The documentation site, built by ``make docs`` into ``build/site``. Sphinx reads this file."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastfs import __version__  # noqa: E402

project = "fastfs"
author = "The fastfs authors"
copyright = "the fastfs authors; Apache-2.0"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
nitpicky = True  # every reference to a Python object has to resolve
# Other packages' pages are not read while building, so that a build needs no network.
_OTHERS = (
    r"(collections|contextlib|lightning|matplotlib|numpy|opentelemetry|os|pandas|pathlib|prometheus_client|rich|scipy"
    r"|torch|transformers|typing|wandb)(\..+)?"
)
_SHORT = r"DataFrame|LossFunction|Optimizer|nn\.Module|dict\[str|ProcessGroup|Run"  # as annotations name them
_INTERNAL = r"fastfs\.(\w+\.)?_.+"
nitpick_ignore_regex = [(r"py:.*", pattern) for pattern in (_OTHERS, _SHORT, _INTERNAL)]

# Pages are Markdown and read well as files: headings have the anchors that GitHub gives them, and links to files
# outside of docs/ become downloads.
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline", "colon_fence"]

_FOREIGN_BASES = (
    "BaseException, Callback, Exception, Module, OSError, TrainerCallback, int, tuple"  # without their members
)
autodoc_default_options = {"members": True, "inherited-members": _FOREIGN_BASES}
autodoc_member_order = "groupwise"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Warns", "Raises")]

html_theme = "furo"
html_title = f"fastfs {__version__}"
html_copy_source = False
html_show_sphinx = False

_LITERAL = re.compile(r"(``.*?``)")
_COLON = "\0"


def prepare_docstring(_app: Any, what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Escapes what reStructuredText and napoleon would read in another way than it is meant.

    Bars and stars are norms and products in our docstrings, and a colon in the summary of a property does not separate
    its type.
    """
    literal = -1  # indentation of the paragraph that introduces a literal block
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent <= literal:
            literal = -1
        if literal < 0:
            parts = _LITERAL.split(line)
            parts[::2] = [re.sub(r"[|*]", r"\\\g<0>", part) for part in parts[::2]]
            lines[number] = "".join(parts)
            if line.rstrip().endswith("::"):
                literal = indent
    if what in ("attribute", "property") and lines:
        lines[0] = lines[0].replace(":", _COLON)


def restore_colons(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Restores what :func:`prepare_docstring` hid."""
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def skip_aliases(_app: Any, _what: str, _name: str, member: Any, _skip: bool, _options: Any) -> bool | None:
    """Leaves out "Alias for field number 0" of named tuples, whose fields the docstring of the class describes."""
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    """Connects the functions; those of docstrings before and after napoleon, whose priority is 500."""
    app.connect("autodoc-skip-member", skip_aliases)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)
    app.connect("autodoc-process-docstring", restore_colons, priority=600)
