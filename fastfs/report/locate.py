"""From what a person names - a file, or the folder of a run - to the record in it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["SUFFIXES", "find_record"]

SUFFIXES = (".jsonl", ".parquet")
"""Files of these kinds are looked for in a folder."""


def find_record(path: str | os.PathLike[str]) -> Path:
    """The record that ``path`` means: itself, or the only record (or the ``record.jsonl``) of that folder.

    Raises:
        FileNotFoundError: there is no such file or folder, or no record in the folder.
        ValueError: the folder holds several records.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_dir():
        return path
    if (path / "record.jsonl").is_file():
        return path / "record.jsonl"
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise FileNotFoundError(f"{path}: no record in this folder (expected a file *{', *'.join(SUFFIXES)})")
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:8]) + (", ..." if len(found) > 8 else "")
        raise ValueError(f"{path}: several records in this folder, name one of them: {names}")
    return found[0]
