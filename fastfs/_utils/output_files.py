"""Output files of commands: written atomically, and only in place of regular files."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

__all__ = ["check_output", "write_whole"]

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def check_output(path: str | os.PathLike[str]) -> Path:
    """Return the path to write to, with symbolic links resolved so that links are kept.

    Args:
        path: requested path.

    Returns:
        The resolved path.

    Raises:
        OSError: the path cannot be inspected, or a parent is not a folder.
        ValueError: the path exists and is not a regular file.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:  # includes a dangling link, whose target is created
        mode = stat.S_IFREG
    for is_kind, what in _KINDS:
        if is_kind(mode):
            hint = "; name a file in it" if what == "a folder" else ""
            raise ValueError(f"{path}: is {what}, expected a regular file or a new one{hint}")
    return Path(os.path.realpath(path))


def write_whole(path: str | os.PathLike[str], content: bytes, mark: str = ".") -> Path:
    """Write a file atomically: readers see either the old or the complete new content.

    Parent folders are created. A replaced file keeps its permissions; a new one has those of the umask.

    Args:
        path: the file.
        content: its content.
        mark: prefix of the temporary file.

    Returns:
        ``path``.

    Raises:
        OSError: the file cannot be written. No temporary file is left, and an old file is unchanged.
        ValueError: ``path`` exists and is not a regular file.
    """
    target = check_output(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{mark}{target.name[:200]}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Path(path)
