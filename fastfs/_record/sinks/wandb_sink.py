"""Records in a run of Weights & Biases. Needs the extra ``wandb``."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from fastfs._record.columns import QUANTITIES
from fastfs._record.record import Record
from fastfs._record.schema import row_names
from fastfs._record.sinks.alert_text import alert_texts
from fastfs._record.sinks.metrics import MAX_KEYS, Metrics, shown_values
from fastfs._record.sinks.wandb_rows import Run, Table, WandbRows, active_run

__all__ = ["WandbSink"]

_TABLE = ("step", "layer", "valid", *(column.name for column in QUANTITIES))
_LONGEST_TITLE = 63
_AT_ONCE = timedelta(milliseconds=1)  # 0 stands for a minute


class WandbSink:
    """Logs the metrics of measured steps to a run of W&B, with an axis of their own, and alerts as alerts.

    The keys are ``fastfs/<quantity>/<group>`` and ``fastfs/<quantity>/median``, see ``docs/trackers.md``; the axis of
    their charts is ``fastfs/step``. ``step=`` is never given to W&B. A record joins the row that the loop has open, at
    most one per row, so neither the loop's values nor the monitor's are ignored, whichever way the loop logs and
    however late a record comes. Records for which the loop opens no row wait, and follow when the run finishes, also
    if the monitor is closed by then. If the run finishes first, the monitor's records up to then are written.

    Args:
        run: of W&B; by default the active one (``wandb.run``) when the monitor attaches.
        max_keys: largest number of keys, with the axis.
        table: whether to log a table ``fastfs/layers`` of layers and steps at the end.
        alerts: whether to send alerts of the monitor as alerts of W&B, one for each rule and step.
        prefix: first part of the keys; different for monitors that are attached to one run at the same time.
        own_rows: whether records get rows of their own at once. For loops that never give ``step=`` to W&B: it ignores
            values whose step is smaller than the number of rows.

    Raises:
        ValueError: ``max_keys`` or ``prefix`` is out of range.
    """

    def __init__(
        self,
        run: Run | None = None,
        *,
        max_keys: int = MAX_KEYS,
        table: bool = False,
        alerts: bool = True,
        prefix: str = "fastfs",
        own_rows: bool = False,
    ) -> None:
        extra = 1 + table
        if type(max_keys) is not int or max_keys <= extra:
            raise ValueError(f"max_keys: expected an integer > {extra}, got {max_keys!r}")
        if not isinstance(prefix, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", prefix):
            raise ValueError(f"prefix: expected words separated by slashes, got {prefix!r}")
        self._given = run
        self._max_keys = max_keys - extra
        self._table = table
        self._alerts = alerts
        self._prefix = prefix
        self._own_rows = own_rows
        self._run: Run | None = None
        self._rows: WandbRows | None = None
        self._metrics = Metrics({}, 1)
        self._names: list[str] = []
        self._cells: list[list[Any]] = []
        self._raised: deque[tuple[str, str, int]] = deque()

    def open(self, header: Mapping[str, Any]) -> None:
        """Defines the axis, and stores the header in the run's configuration.

        Args:
            header: The header of the run.

        Raises:
            ValueError: There is no run, or another monitor uses the prefix.
        """
        run = self._given or active_run()
        if run is None:
            raise ValueError("WandbSink: expected an active run: call wandb.init() before attaching, or give run=")
        self._metrics = Metrics(header, self._max_keys)
        self._names = row_names(header)[0]
        if run.disabled:
            return
        rows = WandbRows.of(run, self._prefix)
        if rows.attached and rows is not self._rows:
            raise ValueError(
                f"WandbSink: another monitor logs to this run as {self._prefix!r}: give each a prefix, for example "
                f"sinks=[WandbSink(prefix={self._prefix + '_2'!r})]"
            )
        run.define_metric(f"{self._prefix}/step", hidden=True)
        run.define_metric(f"{self._prefix}/*", step_metric=f"{self._prefix}/step")
        left_out = [metric.key(self._prefix) for metric in self._metrics.left_out]
        configuration: Any = run.config
        configuration.update({f"{self._prefix}_record": {**header, "left_out": left_out}}, allow_val_change=True)
        rows.attached = True
        rows.own = self._own_rows or run.settings.mode == "shared"
        self._run, self._rows = run, rows

    def bind(self, flush: Any) -> None:
        """Receives what brings the monitor's records here, for the end of the W&B run.

        Args:
            flush: A function of a timeout in seconds.
        """
        if self._rows is not None:
            self._rows.flush, self._rows.last = flush, self._add_table

    def write(self, records: Sequence[Record]) -> None:
        """Takes the records; :meth:`flush` sends them.

        Args:
            records: The records, in order.

        Raises:
            ValueError: The W&B run has finished.
        """
        if self._run is None or self._rows is None:
            return
        if self._rows.finishing:
            raise ValueError("the W&B run has finished; close the monitor before wandb.finish()")
        for record in records:
            if values := self._metrics.of(record):
                keys = {metric.key(self._prefix): value for metric, value in values.items()}
                self._rows.add({f"{self._prefix}/step": record.step, **keys})
            if self._table and record.kind == "measured":
                self._cells += self._table_rows(record)
        if self._alerts:
            self._raised += alert_texts(records)

    def due(self) -> float | None:
        """Time of the next :meth:`flush`, by ``time.monotonic()``."""
        if self._raised:
            return 0.0
        return None if self._rows is None else self._rows.due()

    def flush(self) -> None:
        """Sends the alerts, and the records for which the run has rows. The others are sent when it finishes."""
        if self._run is None or self._rows is None:
            return
        while self._raised:
            title, text, _ = self._raised[0]
            self._run.alert(title[:_LONGEST_TITLE], text, "WARN", _AT_ONCE)
            self._raised.popleft()
        self._rows.write()

    def close(self) -> None:
        """Leaves what waits for rows to the run, which writes it when it finishes."""
        try:
            if self._rows is not None and not self._rows.finishing:
                self._add_table()
                self._rows.write()
        finally:
            self.discard()

    def discard(self) -> None:
        """Leaves the run."""
        if self._rows is not None:
            self._rows.attached, self._rows.flush, self._rows.last = False, None, None
        self._run = self._rows = None

    def _add_table(self) -> None:
        if self._rows is not None and self._cells:
            table = Table(list(_TABLE), self._cells)
            self._rows.add({f"{self._prefix}/step": self._cells[-1][0], f"{self._prefix}/layers": table})
            self._cells = []

    def _table_rows(self, record: Record) -> list[list[Any]]:
        columns = [shown_values(record, name) for name in _TABLE[3:]]
        valid = record.columns.get("valid", [])
        return [
            [record.step, name, bool(valid[at : at + 1] == [True])]
            + [column[at] if at < len(column) else None for column in columns]
            for at, name in enumerate(self._names)
        ]
