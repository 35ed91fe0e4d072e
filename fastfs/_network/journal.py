"""Undoing what a forward of fastfs's own has changed, also after an interrupt at any point of it.

An interrupt (Ctrl-C) may come between any two bytecodes, in a ``finally`` block too. So every undo is noted *before*
the change that it takes back, may run twice, and is struck off only after it has run. What an interrupt has left over
is undone at the next call.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

__all__ = ["Journal", "Undone"]


class Journal:
    """Undo functions, the last one first. Each has to be idempotent."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    @property
    def pending(self) -> bool:
        """Whether something has been left to undo."""
        return bool(self._undo)

    def note(self, undo: Callable[[], object]) -> None:
        """Note how to take back a change that is about to be made."""
        self._undo.append(undo)

    def restore(self) -> None:
        """Undo everything. Undo functions that fail do not keep the others from running.

        Raises:
            Exception: the first failure, after all have run.
        """
        failure: Exception | None = None
        while self._undo:
            undo = self._undo[-1]
            try:
                undo()
            except Exception:
                try:
                    undo()
                except Exception as error:
                    failure = failure or error
            self._undo.pop()  # only now: an interrupt before this line runs the function again
        if failure is not None:
            raise failure


class Undone:
    """A ``with`` block after which a journal is restored; a class, since generators may be closed much later."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def __enter__(self) -> Journal:
        self._journal.restore()  # what an interrupt has left
        return self._journal

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._journal.restore()
