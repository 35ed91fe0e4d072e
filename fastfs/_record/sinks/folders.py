"""Folders that a sink creates, and removes again if attaching fails."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

__all__ = ["make_folders", "remove_folders"]


def make_folders(folder: Path) -> list[Path]:
    """Creates a folder and its parents.

    Returns:
        Those that did not exist, innermost first.
    """
    missing = []
    for one in (folder, *folder.parents):
        if one.exists():
            break
        missing.append(one)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_folders(made: Sequence[Path]) -> None:
    """Removes folders that :func:`make_folders` created, except those that are no longer empty."""
    with contextlib.suppress(OSError):
        for folder in made:
            folder.rmdir()
