"""Undo log for the changes of an extra forward, which also works after an interrupt at any point.

An interrupt (Ctrl-C) may arrive between any two bytecodes, including those of a ``finally`` block. Every undo function
is therefore recorded *before* the change, must be idempotent, and is removed only after it has run. The next call
undoes whatever an interrupt has left.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Journal"]


class Journal:
    """A stack of undo functions, run from the last to the first. Each has to be idempotent."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    @property
    def pending(self) -> bool:
        """Whether changes remain to be undone."""
        return bool(self._undo)

    def note(self, undo: Callable[[], object]) -> None:
        """Record how to undo a change that is about to be made."""
        self._undo.append(undo)

    def restore(self) -> None:
        """Undo all changes. A failing undo function does not prevent the others from running.

        Raises:
            Exception: the first failure, after all undo functions have run.
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
            self._undo.pop()  # only now, so that an interrupt before this line runs the function again
        if failure is not None:
            raise failure
