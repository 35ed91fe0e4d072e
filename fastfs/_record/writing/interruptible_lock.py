"""A lock that a KeyboardInterrupt cannot leave locked."""

from __future__ import annotations

import threading

__all__ = ["InterruptibleLock"]


class InterruptibleLock:
    """A non-reentrant lock for ``with``.

    An interrupt may arrive after the last line of a ``with`` block and before the release of the lock. The thread that
    still holds the lock for that reason releases it when it acquires it again.

    Attributes:
        inner: the lock for a ``threading.Condition``.
    """

    def __init__(self) -> None:
        self.inner = threading.RLock()

    def __enter__(self) -> None:
        self._release_all()
        self.inner.acquire()

    def __exit__(self, *_: object) -> None:
        self._release_all()

    def _release_all(self) -> None:
        """Releases the lock as often as this thread has acquired it."""
        try:
            while True:
                self.inner.release()
        except RuntimeError:  # this thread does not hold it
            pass
