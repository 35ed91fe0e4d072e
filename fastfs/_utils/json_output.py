"""What commands write with ``--json FILE``: strict JSON, to a file or to standard output."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastfs._utils.output_files import check_output, write_whole

__all__ = ["check_json_output", "is_stdout", "strict_json", "write_json"]

_STDOUT = Path("-")


def is_stdout(path: Path | None) -> bool:
    """Whether ``--json`` stands for standard output, which then gets nothing else."""
    return path == _STDOUT


def check_json_output(path: Path | None) -> None:
    """Report a path that cannot be written to before the work rather than after it.

    Args:
        path: of ``--json``; None if it was not given.

    Raises:
        OSError: the path cannot be inspected, or a parent is not a folder.
        ValueError: the path exists and is not a regular file, or is ``-`` and standard output is closed.
    """
    if is_stdout(path) and sys.stdout is None:
        raise ValueError("--json -: standard output is closed")
    if path is not None and not is_stdout(path):
        check_output(path)


def strict_json(result: Mapping[str, Any]) -> str:
    """Return JSON with a final newline. Numbers that are not finite, which JSON does not have, are null.

    Args:
        result: content: mappings, lists, tuples, texts, numbers, booleans and None.

    Returns:
        The text.

    Raises:
        TypeError: it contains something else.
    """
    return json.dumps(_finite(result), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result: a file atomically, or standard output if the path is ``-``.

    Args:
        path: the file, or ``-``.
        result: content, see :func:`strict_json`.

    Raises:
        OSError: the file or its folder cannot be written.
        TypeError: the content has no JSON.
        ValueError: the path exists and is not a regular file.
    """
    text = strict_json(result)
    if is_stdout(path):
        sys.stdout.write(text)
    else:
        write_whole(path, text.encode())
