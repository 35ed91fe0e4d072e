"""Optional packages, imported where they are used, with a word on how to get them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

__all__ = ["frame", "load"]


def load(module: str, extra: str, what: str) -> Any:
    """The module of that name.

    Args:
        module: to import.
        extra: of fastfs that brings it.
        what: needs it.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'{what} needs {package}: pip install "fastfs[{extra}]"') from error


def frame(data: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """A pandas table of columns, or of rows.

    Raises:
        ImportError: pandas is not installed.
    """
    table: pandas.DataFrame = load("pandas", "pandas", "a table").DataFrame(data)
    return table
