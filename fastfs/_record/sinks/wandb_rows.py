"""How a monitor's records enter the history of a W&B run without costing the user a single value.

A W&B run has one open row. ``run.log(values)`` adds to it and begins the next one; ``run.log(values, step=i)`` begins
row i, and is ignored by W&B if the run is beyond it. So a row that the monitor began could cost the user the values
that follow with ``step=``. ``run.log(values, commit=False)`` begins no row, but a second value of a key in the same row
replaces the first.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from fastfs._record.exception_text import exception_text

try:
    import wandb
    from wandb import Table, termwarn
    from wandb.sdk.wandb_run import Run, TeardownHook, TeardownStage
except ImportError as missing:
    raise ImportError('fastfs: a W&B sink needs wandb: pip install "fastfs[wandb]"') from missing

__all__ = ["Run", "Table", "WandbRows", "active_run"]

_FINISH_SECONDS = 10.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
_MANY = 100


class WandbRows:
    """Adds one record to each row that the user's loop begins; the others wait, and follow when the run finishes.

    The run keeps this object until it finishes, for monitors that follow one another.

    Args:
        run: of W&B.
        prefix: of the keys.

    Attributes:
        own: whether records get rows of their own at once.
        attached: whether a monitor uses this object.
        flush: brings what the monitor has recorded to its sinks; None while no monitor is attached.
        last: called at the end, before the last rows are written.
        finishing: whether the run finishes or has finished.
    """

    def __init__(self, run: Run, prefix: str) -> None:
        self.prefix = prefix
        self.own = False
        self.attached = False
        self.flush: Callable[[float], bool] | None = None
        self.last: Callable[[], object] | None = None
        self.finishing = False
        self._run = run
        self._lock = threading.Lock()
        self._waiting: deque[dict[str, Any]] = deque()
        self._row: int | None = None  # the last row that may have one of these records
        self._pause = _SHORTEST_PAUSE
        self._due = 0.0
        self._pid = os.getpid()
        run._teardown_hooks.append(TeardownHook(self._finish, TeardownStage.EARLY))
        atexit.register(self._finish)  # without a call of finish, W&B ends the run later at exit, without its hooks

    @classmethod
    def of(cls, run: Run, prefix: str) -> WandbRows:
        """Returns the rows of a run, the same ones for each monitor with this prefix."""
        owners = [getattr(hook.call, "__self__", None) for hook in run._teardown_hooks]
        known = [owner for owner in owners if isinstance(owner, cls) and owner.prefix == prefix]
        return known[0] if known else cls(run, prefix)

    def add(self, values: Mapping[str, Any]) -> None:
        """Adds a record to those that wait."""
        self._waiting.append(dict(values))
        if len(self._waiting) == _MANY and not self.own:
            termwarn(
                f"fastfs: {_MANY} records wait for rows of this run, because it begins fewer than the monitor records. "
                "They follow when the run finishes. If the loop never gives step= to log, use "
                "WandbSink(own_rows=True).",
                repeat=False,
            )

    def due(self) -> float | None:
        """Time of the next :meth:`write`, by ``time.monotonic()``."""
        return self._due if self._waiting else None

    def write(self) -> None:
        """Writes what the run has rows for."""
        with self._lock:
            wrote = False
            while self._waiting and self._write_one():
                wrote = True
        self._pause = _SHORTEST_PAUSE if wrote else min(2 * self._pause, _LONGEST_PAUSE)
        self._due = time.monotonic() + self._pause

    def _write_one(self) -> bool:
        if self.own or self.finishing:
            if self._row is not None and self._row == self._run.step:
                self._run.log({}, commit=True)  # ends the row that has the last record
            self._run.log(self._waiting[0], commit=True)
            self._row = None
        elif self._run.step == self._row:
            return False
        else:
            self._run.log(self._waiting[0], commit=False)
            self._row = self._run.step  # the row that has the record, or one that the loop has begun since
        self._waiting.popleft()
        return True

    def _finish(self) -> None:
        """Called in the thread that finishes the run, while it can still be written to."""
        atexit.unregister(self._finish)
        if self.finishing or os.getpid() != self._pid:
            return
        try:
            if self.flush is not None:
                self.flush(_FINISH_SECONDS)
            with self._lock:
                if self.last is not None:
                    self.last()
                self.finishing = True
                while self._waiting:
                    self._write_one()
        except Exception as error:
            termwarn(f"fastfs: {len(self._waiting)} records could not be written: {exception_text(error)}")


def active_run() -> Run | None:
    """Returns the run that ``wandb.init`` started last and that has not finished."""
    run: Run | None = wandb.run
    return run
