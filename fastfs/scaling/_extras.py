"""Optional packages, imported where they are used, with a word on how to get them."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["pandas", "stats"]


def pandas() -> Any:
    """The pandas module.

    Raises:
        ImportError: it is not installed.
    """
    return _load("pandas", "pandas")


def stats() -> Any:
    """The scipy.stats module.

    Raises:
        ImportError: scipy is not installed.
    """
    return _load("scipy.stats", "scaling")


def _load(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'fastfs.scaling needs {package} here: pip install "fastfs[{extra}]"') from error
