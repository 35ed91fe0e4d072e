"""From what a person names - a file, or the folder of a run - to the record in it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["find_record"]


def find_record(path: str | os.PathLike[str]) -> Path:
    """The record that ``path`` means: itself, or the ``record.jsonl`` or else the only record of that folder.

    A record is a JSONL file, or a folder of Parquet parts.

    Raises:
        FileNotFoundError: there is no such file or folder, or no record in the folder.
        ValueError: the folder holds several records.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file() or _is_parquet(path):
        return path
    if (path / "record.jsonl").is_file():
        return path / "record.jsonl"
    found = sorted(one for one in path.iterdir() if (one.suffix == ".jsonl" and one.is_file()) or _is_parquet(one))
    if not found:
        raise FileNotFoundError(f"{path}: no record in this folder (expected a file *.jsonl or a folder of Parquet)")
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:8]) + (", ..." if len(found) > 8 else "")
        raise ValueError(f"{path}: several records in this folder, name one of them: {names}")
    return found[0]


def _is_parquet(path: Path) -> bool:
    """Whether this is a folder as the Parquet sink writes it."""
    return path.is_dir() and any(path.glob("part-*.parquet"))
