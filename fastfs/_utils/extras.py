"""Optional packages, imported on use, with an error that says how to install them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

__all__ = ["frame", "load"]


def load(module: str, extra: str, what: str) -> Any:
    """Import an optional module.

    Args:
        module: name of the module.
        extra: extra of fastfs that installs it.
        what: description of what needs it, for the error message.

    Returns:
        The module.

    Raises:
        ImportError: the module is not installed. The message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'{what} needs {package}: pip install "fastfs[{extra}]"') from error


def frame(data: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """Create a pandas DataFrame from columns or from rows.

    Args:
        data: name -> column, or one mapping per row.

    Returns:
        The DataFrame.

    Raises:
        ImportError: pandas is not installed.
    """
    table: pandas.DataFrame = load("pandas", "pandas", "a table").DataFrame(data)
    return table
