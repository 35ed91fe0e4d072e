"""Results with one row per layer, as a DataFrame and as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastfs._utils.extras import frame
from fastfs._utils.formatting import columns

if TYPE_CHECKING:
    import pandas

__all__ = ["LayerTable"]


class LayerTable:
    """Base of results with one row per layer. Subclasses implement ``_columns``."""

    def _columns(self) -> dict[str, list[Any]]:
        raise NotImplementedError

    def to_frame(self) -> pandas.DataFrame:
        """Return one row per layer.

        Returns:
            A DataFrame with the columns that ``str()`` shows, and ``reason``. Angles are in radians.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame(self._columns())

    def __str__(self) -> str:
        return "\n".join(columns({name: column for name, column in self._columns().items() if name != "reason"}))
