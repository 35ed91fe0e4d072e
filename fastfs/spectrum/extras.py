"""Tables for pandas, which is imported when one is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

__all__ = ["frame", "text_table"]


def frame(columns: Mapping[str, Sequence[Any]]) -> pandas.DataFrame:
    """A table of these columns.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError('to_frame needs pandas: pip install "fastfs[pandas]"') from error
    return pandas.DataFrame(dict(columns))


def text_table(columns: Mapping[str, Sequence[Any]]) -> str:
    """The columns as aligned text, with four digits."""
    body = [[_cell(value) for value in values] for values in columns.values()]
    widths = [max(map(len, (name, *cells))) for name, cells in zip(columns, body, strict=True)]
    lines = [list(columns), *zip(*body, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
