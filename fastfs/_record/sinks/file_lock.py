"""A lock on a file that is being written, so that a second process can be warned."""

from __future__ import annotations

import errno
import fcntl
import warnings
from pathlib import Path

__all__ = ["try_lock", "warn_if_locked"]

_LOCKED = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def try_lock(descriptor: int) -> bool:
    """Locks a file that is open for writing, for this process.

    This is a POSIX lock rather than one by ``flock``: several monitors of a process may share a file, a forked child
    does not keep the lock of a parent that was killed, and network file systems support it. The kernel releases it when
    the process closes any descriptor of the file, for example after reading it, so sinks lock again with every write.

    Returns:
        False if another process holds the lock. True also where the file system has no locks.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _LOCKED
    return True


def warn_if_locked(descriptor: int, path: Path) -> None:
    """Locks a file, and warns if another process holds the lock."""
    if not try_lock(descriptor):
        warnings.warn(
            f"fastfs.Monitor: {path} is also being written by another process. Both continue, and every line has the "
            "id of its run; give each process (rank) its own path.",
            RuntimeWarning,
            stacklevel=2,
        )
