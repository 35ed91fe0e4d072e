"""Who writes a file: a lock of the process, which ends with it, however it ends."""

from __future__ import annotations

import errno
import fcntl
import warnings
from pathlib import Path

__all__ = ["claim", "tell_if_taken"]

_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def claim(descriptor: int) -> bool:
    """Lock a file that is open for writing, for this process; False if another process has it.

    A POSIX lock, not that of ``flock``: monitors of one process may share a file, a forked child does not keep the
    lock of a killed parent, and network file systems know it. It goes when the process closes the file anywhere (after
    having read it, say), so it is asked for again with every write. Where there are no locks nobody is told.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _TAKEN
    return True


def tell_if_taken(descriptor: int, path: Path) -> None:
    """:func:`claim`, with a warning if another process has the file."""
    if not claim(descriptor):
        warnings.warn(
            f"fastfs.Monitor: {path} is being written by another process, too. Both go on, and each line says which "
            "run it is of; give each process (each rank) a path of its own.",
            RuntimeWarning,
            stacklevel=2,
        )
