"""Records in a run of trackio. Needs the extra ``trackio``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastfs._record.record import Record
from fastfs._record.sinks.alert_text import alert_texts
from fastfs._record.sinks.metrics import MAX_KEYS, Metrics

if TYPE_CHECKING:
    from trackio.run import Run

__all__ = ["TrackioSink"]


class TrackioSink:
    """Logs the metrics of measured steps to a run of trackio, with their own step, and alerts as alerts.

    The keys are ``fastfs/<quantity>/<group>`` and ``fastfs/<quantity>/median``, see ``docs/trackers.md``. trackio takes
    steps in any order. In a loop that does not give ``step=`` to it, its own count goes on after the monitor's step.

    Args:
        run: of trackio; by default the active one in the thread that attaches the monitor.
        max_keys: largest number of keys.
        prefix: first part of the keys; different for monitors that write to the same run.

    Raises:
        ImportError: trackio is not installed. (Here, not when this module is imported: environments in which the public
            interface is checked need not have it.)
        ValueError: ``max_keys`` is out of range.
    """

    def __init__(self, run: Run | None = None, *, max_keys: int = MAX_KEYS, prefix: str = "fastfs") -> None:
        try:
            from trackio import AlertLevel
            from trackio.context_vars import current_run
        except ImportError as missing:
            raise ImportError('fastfs: a trackio sink needs trackio: pip install "fastfs[trackio]"') from missing
        Metrics({}, max_keys)
        self._current, self._level = current_run, AlertLevel.WARN
        self._given = run
        self._run: Any = None
        self._max_keys = max_keys
        self._prefix = prefix
        self._metrics = Metrics({}, 1)

    def open(self, header: Mapping[str, Any]) -> None:
        """Takes the run.

        Args:
            header: The header of the run.

        Raises:
            ValueError: There is no active run in this thread, and no ``run`` was given.
        """
        self._run = self._given or self._current.get()
        if self._run is None:
            raise ValueError("TrackioSink: expected an active run: call trackio.init() before attaching, or give run=")
        self._metrics = Metrics(header, self._max_keys)

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            if values := self._metrics.of(record):
                keys = {metric.key(self._prefix): value for metric, value in values.items()}
                self._run.log(keys, step=record.step)
        for title, text, step in alert_texts(records):
            self._run.alert(title, text, self._level, step=step)

    def close(self) -> None:
        self._run = None
