"""Lines of a file, or parts of a folder, that do not conform to the schema."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

__all__ = ["RejectedLines"]

_SHOWN = 10
_MOST = 200


class RejectedLines:
    """Counts rejected lines, for a single warning.

    Args:
        path: the record.
        what: what it consists of, ``line`` or ``part``.
    """

    def __init__(self, path: Path, what: str = "line") -> None:
        self.path = path
        self.count = 0
        self._what = what
        self._first: list[tuple[str, str]] = []

    def add(self, where: Any, why: object) -> None:
        """Counts a line.

        Args:
            where: its number.
            why: reason for the rejection.
        """
        self.count += 1
        if len(self._first) < _SHOWN:
            text = " ".join(str(why).split())
            self._first.append((str(where), text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."))

    @property
    def reason(self) -> str:
        """The first rejection in parentheses, for an error message; empty if there is none."""
        return "" if not self._first else f" ({self._what} {self._first[0][0]}: {self._first[0][1]})"

    def warn(self, stacklevel: int) -> None:
        """Issues the warning, if a line was rejected."""
        if not self.count:
            return
        places = ", ".join(place for place, _ in self._first) + (", ..." if self.count > len(self._first) else "")
        if self.count == 1:
            text = f"{self._what} {places}: cannot be read and is left out ({self._first[0][1]})"
        else:
            text = f"{self._what} {places}: {self.count} {self._what}s cannot be read and are left out{self.reason}"
        warnings.warn(f"{self.path}, {text}", RuntimeWarning, stacklevel=stacklevel + 1)
