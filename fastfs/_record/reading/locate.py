"""Finds the record that a path stands for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fastfs._record.ranks.part_files import base_of, rank_files

__all__ = ["find_record"]

_SHOWN = 8


def find_record(path: str | os.PathLike[str]) -> Path:
    """Finds the record that ``path`` stands for.

    A file, and a folder of Parquet parts, stands for itself; the file of one rank of a run (``record.rank3.jsonl``) for
    the record of all of them, ``record.jsonl``, which need not exist. Any other folder stands for its ``record.jsonl``,
    otherwise for the only record in it, otherwise for the only record in its subfolders. If there are several
    candidates, only those that begin like a record, or are still empty, count.

    Returns:
        The path of the record.

    Raises:
        FileNotFoundError: there is no such file or folder, or no record in the folder or one level down.
        ValueError: neither a file nor a folder, or there are several records, which the message lists.
    """
    path = Path(path)
    if not path.exists():
        if rank_files(path):
            return path
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file():
        return base_of(path) or path
    if _is_parquet(path):
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: is neither a file nor a folder")
    found = _records(path)
    if not found:
        found = [record for folder in _folders(path) for record in _records(folder)]
    if len(found) > 1:
        found = [record for record in found if _starts_as_record(record)] or found
    if not found:
        raise FileNotFoundError(
            f"{path}: no record in this folder or one level down (expected a file *.jsonl or a folder of Parquet)"
        )
    if len(found) > 1:
        names = ", ".join(str(record.relative_to(path)) for record in found[:_SHOWN])
        raise ValueError(
            f"{path}: several records in this folder, name one of them: {names}{', ...' if len(found) > _SHOWN else ''}"
        )
    return found[0]


def _records(folder: Path) -> list[Path]:
    if (folder / "record.jsonl").is_file() or rank_files(folder / "record.jsonl"):
        return [folder / "record.jsonl"]
    found = {one for one in folder.iterdir() if (one.suffix == ".jsonl" and one.is_file()) or _is_parquet(one)}
    return sorted({base_of(one) or one for one in found})


def _folders(path: Path) -> Iterator[Path]:
    """Yields the visible, readable subfolders."""
    for one in sorted(path.iterdir()):
        if one.is_dir() and not one.name.startswith(".") and os.access(one, os.R_OK | os.X_OK):
            yield one


def _starts_as_record(path: Path) -> bool:
    if path.is_dir() or not path.exists():
        return True
    with path.open("rb") as file:
        start = file.read(4096)
    return not start or (b'"kind"' in start and b'"header"' in start)


def _is_parquet(path: Path) -> bool:
    """Whether this is a folder that the Parquet sink wrote."""
    return path.is_dir() and os.access(path, os.R_OK | os.X_OK) and any(path.glob("part-*.parquet"))
