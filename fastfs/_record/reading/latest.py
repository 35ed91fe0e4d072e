"""The latest values of a record that is followed."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastfs._record.detail_columns import DETAILS
from fastfs._record.reading.confidence import Backtest
from fastfs._record.schema import CheckedLine, row_names

__all__ = ["LatestRun", "LatestStep", "RaisedAlert"]

_RECENT_ALERTS = 500
"""Number of steps for which a layer counts as alerted."""

_APART_STEPS = 3
"""Number of measured steps in a row in which a rank has to stand apart, as the alert rule has it."""


class RaisedAlert(NamedTuple):
    """A line of kind alert; ``layer`` is None for the whole model."""

    step: int
    rule: str
    layer: str | None
    message: str


class LatestStep(NamedTuple):
    """The newest measured or predicted step; ``loss`` is NaN if it is not known."""

    step: int
    time: float
    loss: float


class LatestRun:
    """The latest values of the last run in a record.

    Attributes:
        unreadable: number of lines that could not be read.
        header: of the run; empty before the first one.
        names: of the layers, then of the groups.
        layers: number of layers.
        cut: whether each layer is a cut; empty if not known.
        alerts: the last 200.
        alert_count: number of alerts by rule.
        skipped: number of skipped steps.
        ranks_missing_since: the step since which rows lack some of the ranks; None if the last one has all.
    """

    def __init__(self) -> None:
        self.unreadable = 0
        self._reset({})

    def _reset(self, header: Mapping[str, Any]) -> None:
        self.header: dict[str, Any] = dict(header)
        self.names: list[str] = []
        self.layers = 0
        self.cut: list[bool | None] = []
        self.alerts: deque[RaisedAlert] = deque(maxlen=200)
        self.alert_count: Counter[str] = Counter()
        self.skipped = 0
        self._rows: dict[str, CheckedLine] = {}
        self._times: deque[tuple[int, float]] = deque(maxlen=64)
        self.ranks_missing_since: int | None = None
        self._ranks = 0
        self._backtest = Backtest()
        self._factors: list[float] | None = []
        self._apart: deque[dict[int, int]] = deque(maxlen=_APART_STEPS)  # layer -> rank, of the last measured steps

    def update(self, lines: Sequence[CheckedLine]) -> None:
        """Adds new lines. The header of another run starts afresh; lines of other runs are ignored."""
        for checked in lines:
            line, kind = checked.line, checked.kind
            if kind == "header":
                if line["run"] != self.header.get("run"):
                    self._reset(line)
                self.header = dict(line)
                self.names, self.layers = row_names(line)
            elif line["run"] != self.header.get("run"):
                continue
            elif kind == "alert":
                self.alerts.append(RaisedAlert(line["step"], line["rule"], line.get("layer"), line["message"]))
                self.alert_count[line["rule"]] += 1
            elif kind == "skipped":
                self.skipped += 1
            elif kind == DETAILS:
                continue
            elif kind == "structure":
                self.cut = list(line["layers"]["cut"])
            else:
                self._rows[kind] = checked
                self._note_ranks(checked)
                self._compare(checked)
                if self._times and line["step"] <= self._times[-1][0]:  # resumed from an earlier step
                    self._times.clear()
                self._times.append((line["step"], float(line["time"])))

    def _note_ranks(self, checked: CheckedLine) -> None:
        ranks = checked.scalars.get("ranks", math.nan)
        if math.isfinite(ranks):
            self._ranks = int(ranks)
            if self._ranks >= self.ranks:
                self.ranks_missing_since = None
            elif self.ranks_missing_since is None:
                self.ranks_missing_since = checked.line["step"]
        if checked.kind == "measured":
            column = checked.columns.get("rank_apart", ())
            self._apart.append({i: int(rank) for i, rank in enumerate(column) if math.isfinite(rank)})

    def _compare(self, checked: CheckedLine) -> None:
        """Compares a measured step with what would have been predicted there."""
        if checked.kind != "measured" or self.header["schema"] == 1:
            return
        missing = np.full(checked.length, np.nan)
        cosine, residual = (checked.columns.get(name, missing) for name in ("cos_angle", "residual"))
        valid, linear = (checked.columns.get(name, missing) == 1 for name in ("valid", "linear"))
        self._backtest.add(cosine, residual, valid, linear)
        self._factors = None

    def factor(self, row: int) -> float:
        """The factor of a layer's predictions by :mod:`fastfs._record.reading.confidence`; NaN if it is not known."""
        if self._factors is None:
            self._factors = self._backtest.factors().tolist()
        return self._factors[row] if row < len(self._factors) else math.nan

    @property
    def ranks(self) -> int:
        """Number of ranks of the run."""
        value = self.header.get("ranks")
        return value if type(value) is int and value > 0 else 1

    @property
    def present_ranks(self) -> int:
        """Number of ranks whose numbers the last row has."""
        return self._ranks

    @property
    def apart(self) -> list[tuple[int, int]]:
        """Layers and the rank that has stood apart there in the last three measured steps, in the order of layers."""
        if len(self._apart) < _APART_STEPS:
            return []
        return [(i, rank) for i, rank in self._apart[-1].items() if all(each.get(i) == rank for each in self._apart)]

    @property
    def last(self) -> LatestStep | None:
        """The newest row; None without rows."""
        found = max(self._rows.values(), key=lambda row: (row.line["step"], row.line["time"]), default=None)
        if found is None:
            return None
        return LatestStep(found.line["step"], float(found.line["time"]), found.scalars.get("loss", math.nan))

    @property
    def steps_per_second(self) -> float:
        """Speed of training over the last rows; NaN with fewer than two."""
        if len(self._times) < 2:
            return math.nan
        (first, start), (last, end) = self._times[0], self._times[-1]
        return (last - first) / (end - start) if end > start else math.nan

    @property
    def seconds_between_rows(self) -> float:
        """Average time between the last rows; NaN with fewer than two."""
        return (self._times[-1][1] - self._times[0][1]) / (len(self._times) - 1) if len(self._times) > 1 else math.nan

    def step(self, kind: str) -> int | None:
        """The last step with a row of this kind."""
        return self._rows[kind].line["step"] if kind in self._rows else None

    def scalar(self, kind: str, name: str) -> float:
        """The last value for the whole step; NaN if there is none."""
        value = self._rows[kind].scalars.get(name) if kind in self._rows else None
        return float(value) if isinstance(value, (int, float)) else math.nan

    def number(self, kind: str, column: str, row: int) -> float:
        """The last value of a layer or group; NaN if there is none."""
        value = self._value(kind, column, row)
        return math.nan if value is None else float(value)

    def valid(self, row: int) -> bool | None:
        """Whether the last measured row is valid; None if that is not known."""
        value = self._value("measured", "valid", row)
        return None if value is None or value < 0 else bool(value)

    def why(self, row: int) -> str | None:
        """Why the last measured row is not valid."""
        value = self._value("measured", "why", row)
        return None if value is None else str(value)

    def badness(self, row: int) -> tuple[bool, bool, float]:
        """A sort key: a recent alert counts most, then a row that is not valid, then the angle (-1 if unknown)."""
        last = self.last
        step = 0 if last is None else last.step
        alerted = any(a.layer == self.names[row] and step - a.step <= _RECENT_ALERTS for a in self.alerts)
        angle = self.number("measured", "angle", row)
        return alerted, self.valid(row) is False, angle if math.isfinite(angle) else -1.0

    def _value(self, kind: str, column: str, row: int) -> Any:
        found = self._rows.get(kind)
        if found is None or self.header["schema"] == 1:  # a line of schema 1 says nothing about other layers
            return None
        values = found.columns.get(column, ())
        return values[row] if row < len(values) else None
