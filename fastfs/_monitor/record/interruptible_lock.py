"""A lock that an interrupt cannot leave held for ever."""

from __future__ import annotations

import threading

__all__ = ["Lock"]


class Lock:
    """A lock for ``with``, not reentrant.

    An interrupt may come between the last line of a ``with`` block and the release of its lock, in the thread that
    holds it. That thread lets go of it when it takes it the next time.

    Attributes:
        inner: for a ``threading.Condition``.
    """

    def __init__(self) -> None:
        self.inner = threading.RLock()

    def __enter__(self) -> None:
        self._let_go()
        self.inner.acquire()

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """As often as this thread has taken it."""
        try:
            while True:
                self.inner.release()
        except RuntimeError:  # it has not
            pass
