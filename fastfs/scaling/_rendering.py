"""Render numbers, names and tables as text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

__all__ = ["number", "render", "some"]


def number(value: float) -> str:
    """Format a number with four digits."""
    return f"{value:.4g}"


def some(names: Sequence[str], most: int = 4) -> str:
    """Return the first names, followed by their total number if some are omitted."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def render(*parts: Any, width: int = 120) -> str:
    """Render text and rich tables, one after the other, without colors."""
    console = Console(
        file=io.StringIO(), width=width, color_system=None, highlight=False, emoji=False, legacy_windows=False
    )
    for part in parts:
        console.print(escape(part) if isinstance(part, str) else part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()
