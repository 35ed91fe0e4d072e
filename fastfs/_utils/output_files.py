"""Files that commands write: whole or not at all, and in the place of regular files only."""

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
    """Where a file of this name is to be written: behind symbolic links, so that they stay.

    Raises:
        OSError: it cannot be looked at; a folder above it is none.
        ValueError: it is there, and no regular file.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:  # also a link to nothing: its file is made
        mode = stat.S_IFREG
    for is_kind, what in _KINDS:
        if is_kind(mode):
            hint = f"; name a file, such as {path / 'report.html'}" if what == "a folder" else ""
            raise ValueError(f"{path}: is {what}, expected a regular file or a new one{hint}")
    return Path(os.path.realpath(path))


def write_whole(path: str | os.PathLike[str], content: bytes, mark: str = ".") -> Path:
    """Write a file in one move: a reader sees the old one or all of the new one. Folders above it are made.

    A file that is replaced keeps its permissions; a new one has those of the umask.

    Args:
        path: of the file.
        content: of it.
        mark: how the name of the file starts while it is written.

    Returns:
        ``path``.

    Raises:
        OSError: it cannot be written; then nothing is left behind, and an old file is as it was.
        ValueError: ``path`` is there and no regular file.
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
