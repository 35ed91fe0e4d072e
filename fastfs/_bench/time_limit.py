"""A limit for what cannot be asked to end, such as a compiler."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["OutOfTimeError", "time_limit"]


class OutOfTimeError(BaseException):
    """The time is over. Not an Exception, which compilers catch to try something else."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTimeError` in the body of the ``with`` block after some time.

    There is no limit outside of the main thread and where the system has no timers for processes. A call of a library
    is interrupted when it returns to Python.

    Args:
        seconds: the limit.

    Yields:
        Nothing.

    Raises:
        OutOfTimeError: the time is over.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
