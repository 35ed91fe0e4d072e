"""``fastfs watch``: the latest numbers of a running run as a table in the terminal."""

from __future__ import annotations

import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fastfs._report.follow import Follower
from fastfs._report.locate import find_record
from fastfs._report.summary import number, since

__all__ = ["ORDERS", "RunState", "screen", "watch"]

ORDERS = ("worst", "layer")
_ALERT_LINES = 3
_OTHERS = "a larger window, --once or --layers shows others"
_WIDE = 76
_QUIET_AT_LEAST = 60.0  # seconds without a row before that is pointed at
_QUIET_GAPS = 10.0  # ... and this many times the usual gap
_RECENT_ALERTS = 500  # steps: a layer with a younger alert counts as worst


class RunState:
    """The last known numbers of the last run in a record."""

    def __init__(self) -> None:
        self.unreadable = 0
        self._reset({})

    def _reset(self, header: Mapping[str, Any]) -> None:
        self.header: dict[str, Any] = dict(header)
        self.names: list[str] = []
        self.layers = 0
        self.cut: list[bool | None] = []
        self.measured: dict[str, Any] | None = None
        self.predicted: dict[str, Any] | None = None
        self.times: deque[tuple[int, float]] = deque(maxlen=64)
        self.alerts: deque[dict[str, Any]] = deque(maxlen=200)
        self.alert_count: Counter[str] = Counter()
        self.skipped = 0

    def update(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take in new records. A header of another run starts afresh; lines of other runs are left out."""
        for record in records:
            kind = record["kind"]
            if kind == "header":
                if record.get("run") != self.header.get("run"):
                    self._reset(record)
                self.header = dict(record)
                layers, groups = record.get("layers") or [], record.get("groups") or {}
                self.names, self.layers = [*map(str, layers), *map(str, groups)], len(layers)
            elif record.get("run") != self.header.get("run"):
                continue
            elif kind in ("measured", "predicted"):
                setattr(self, kind, dict(record))
                step, when = record.get("step"), record.get("time")
                if isinstance(step, int) and isinstance(when, int | float):
                    if self.times and step <= self.times[-1][0]:  # resumed from an earlier step
                        self.times.clear()
                    self.times.append((step, float(when)))
            elif kind == "alert":
                self.alerts.append(dict(record))
                self.alert_count[str(record.get("rule"))] += 1
            elif kind == "skipped":
                self.skipped += 1
            elif kind == "structure":
                about = record.get("layers")
                self.cut = list(about.get("cut") or []) if isinstance(about, Mapping) else []

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest row."""
        found = [row for row in (self.measured, self.predicted) if row is not None]
        return max(found, key=lambda row: (row.get("step") or 0, row.get("time") or 0.0), default=None)

    @property
    def steps_per_second(self) -> float:
        """Over the last rows; NaN with fewer than two."""
        if len(self.times) < 2:
            return math.nan
        (first, start), (last, end) = self.times[0], self.times[-1]
        return (last - first) / (end - start) if end > start else math.nan

    def value(self, kind: str, column: str, row: int) -> Any:
        """The last value of a layer, or None."""
        record = self.measured if kind == "measured" else self.predicted
        values = ((record or {}).get("layers") or {}).get(column) or []
        return values[row] if row < len(values) else None

    def badness(self, row: int) -> tuple[Any, ...]:
        """Larger is worse: a recent alert, then not valid, then how near the angle is to (or beyond) 90 degrees."""
        last = self.last
        step = (last or {}).get("step") or 0
        alerted = any(
            a.get("layer") == self.names[row] and step - (a.get("step") or 0) <= _RECENT_ALERTS for a in self.alerts
        )
        angle = self.value("measured", "angle", row)
        return alerted, self.value("measured", "valid", row) is False, angle if _is_number(angle) else -1.0


def screen(
    state: RunState,
    *,
    now: float,
    width: int = 100,
    height: int | None = None,
    order: str = "worst",
    search: str = "",
    name: str = "",
) -> RenderableType:
    """Everything that is shown, as something that rich can print.

    Args:
        state: of the run.
        now: seconds since 1970, for the age of the last row.
        width: characters in a line; below 76 the numbers of the layers are left out, and the degrees.
        height: lines that there are; None for as many as it takes.
        order: ``worst``: where not all layers fit, those with a recent alert, then those not valid, then those with the
            largest angle; ``layer``: in the order of the network.
        search: shows only layers with this in their name.
        name: of the record.
    """
    lines = _heading(state, now, name)
    rows = [i for i, layer in enumerate(state.names) if search.lower() in layer.lower()]
    room = len(rows) if height is None else max(1, height - len(lines) - 3)
    shown = rows
    note = ""
    if len(rows) > room:
        if order == "worst":
            shown = sorted(rows, key=lambda row: (*(_minus(part) for part in state.badness(row)), row))[:room]
            note = f"the {room} worst of {len(rows)} (recent alert, not valid, largest angle); {_OTHERS}"
        else:
            shown = rows[:room]
            note = (
                f"the first {room} of {len(rows)} layers and groups; a larger window, --once or --layers shows others"
            )
    elif not rows and state.names:
        note = f"no layer has {search!r} in its name"
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    wide = width >= _WIDE
    if wide:
        table.add_column("#", justify="right", no_wrap=True, min_width=len(str(state.layers)))
    table.add_column("layer", no_wrap=True, overflow="ellipsis", ratio=2, min_width=12)
    table.add_column("angle", justify="right", no_wrap=True, min_width=11 if wide else 5)
    for title in ("speed", "relative", "predicted"):
        table.add_column(title, justify="right", no_wrap=True, min_width=9)
    table.add_column("valid", no_wrap=True, overflow="ellipsis", ratio=1, min_width=3)
    for row in shown:
        cells = _cells(state, row, degrees=wide)
        table.add_row(*(cells if wide else cells[1:]))
    caption = [Text(note, style="dim", no_wrap=True, overflow="ellipsis")] if note else []
    return Group(*lines, table, *caption)


def _heading(state: RunState, now: float, name: str) -> list[Text]:
    last = state.last
    header = state.header
    title = Text(no_wrap=True, overflow="ellipsis")
    title.append(_clean(header.get("model") or "waiting for a run"), style="bold")
    for word in (f"run {header.get('run', '-')}", header.get("optimizer", ""), header.get("device", ""), name):
        title.append(f"  {_clean(word)}")
    if last is None:
        return [title, Text(f"no step yet: the first measured one will show here{_unread(state)}", style="yellow")]
    numbers = Text(no_wrap=True, overflow="ellipsis")
    numbers.append(f"step {last.get('step'):,}", style="bold")
    numbers.append(f"  loss {number(last['loss'], 5) if _is_number(last.get('loss')) else '-'}")
    speed = state.steps_per_second
    numbers.append(f"  {number(speed)} steps/s" if math.isfinite(speed) else "  - steps/s")
    if _is_number(last.get("time")):
        age = max(0.0, now - last["time"])
        numbers.append(f"  last row {since(age)} ago", style="bold red" if age > _quiet(state) else "")
    measured, predicted = ((row or {}).get("step") for row in (state.measured, state.predicted))
    detail = Text(no_wrap=True, overflow="ellipsis", style="dim")
    detail.append(f"measured at step {measured:,}" if measured is not None else "not measured yet")
    detail.append(f", predicted at step {predicted:,}" if predicted is not None else ", no prediction")
    detail.append(f"; {state.skipped:,} steps skipped" if state.skipped else "")
    detail.append(_unread(state))
    lines = [title, numbers, detail]
    if state.alert_count:
        counts = ", ".join(f"{_clean(rule)} ({count:,})" for rule, count in state.alert_count.most_common(5))
        lines.append(Text(f"alerts: {counts}", style="bold red", no_wrap=True, overflow="ellipsis"))
        for alert in list(state.alerts)[-_ALERT_LINES:]:
            text = f"  step {alert.get('step')}: {_clean(alert.get('message') or alert.get('rule'))}"
            lines.append(Text(text, style="red", no_wrap=True, overflow="ellipsis"))
    else:
        lines.append(Text("no alerts", style="dim"))
    return lines


def _unread(state: RunState) -> str:
    lines = state.unreadable
    return f"; {lines:,} {'line' if lines == 1 else 'lines'} not readable" if lines else ""


def _quiet(state: RunState) -> float:
    """Seconds after which the absence of rows is remarkable."""
    if len(state.times) < 2:
        return _QUIET_AT_LEAST * _QUIET_GAPS
    gap = (state.times[-1][1] - state.times[0][1]) / (len(state.times) - 1)
    return max(_QUIET_AT_LEAST, _QUIET_GAPS * gap)


def _cells(state: RunState, row: int, degrees: bool) -> list[Text]:
    angle = state.value("measured", "angle", row)
    valid = state.value("measured", "valid", row)
    style = "yellow" if valid is False else ""
    predicted = state.value("predicted", "update_rms", row)
    if valid is False:
        verdict = Text(f"no: {_clean(state.value('measured', 'why', row) or 'no reason given')}", style="yellow")
    else:
        verdict = Text("yes" if valid else "-")
    no_cut = row < len(state.cut) and state.cut[row] is False
    return [
        Text(str(row) if row < state.layers else "", style="dim"),
        Text(_clean(state.names[row]), style="" if row < state.layers else "italic"),
        Text(_angle(angle, degrees), style=style),
        *(
            Text(_short(state.value("measured", column, row)), style=style)
            for column in ("update_rms", "relative_update")
        ),
        Text("no cut" if no_cut and not _is_number(predicted) else _short(predicted), style="dim" if no_cut else ""),
        verdict,
    ]


def watch(
    path: str | os.PathLike[str],
    *,
    console: Console | None = None,
    once: bool = False,
    interval: float = 1.0,
    order: str = "worst",
    search: str = "",
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> None:
    """Show the latest numbers of a run until interrupted, or once.

    Args:
        path: the record (JSONL), or the folder of the run; unless ``once``, it need not exist yet.
        console: to print to.
        once: print one table with all layers and return.
        interval: seconds between looks at the file.
        order, search: as of :func:`screen`.
        sleep, clock: for tests.

    Raises:
        FileNotFoundError: with ``once``, no such record.
        OSError: the record cannot be read.
        ValueError: not a record; not a terminal and not ``once``.
    """
    console = console or Console()
    state = RunState()
    if once:
        follower = _follower(path)
        news = follower.poll()
        state.update(news.records)
        state.unreadable = news.unreadable
        if not state.header:
            raise ValueError(f"{follower.path}: holds no run of fastfs.Monitor yet")
        console.print(
            screen(state, now=clock(), width=console.width, order="layer", search=search, name=follower.path.name)
        )
        return
    if not console.is_terminal:
        raise ValueError("the output is not a terminal: use --once")
    found: Follower | None = None
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                if found is None:
                    try:
                        found = _follower(path)
                    except FileNotFoundError as error:
                        live.update(Text(f"waiting: {error}", style="yellow"), refresh=True)
                        sleep(interval)
                        continue
                news = found.poll()
                if news.restarted:
                    state = RunState()
                state.update(news.records)
                state.unreadable += news.unreadable
                shown: RenderableType = Text(f"waiting: {found.path}: no such file", style="yellow")
                if news.exists:
                    shown = _fitted(state, console, clock(), order, search, found.path.name)
                live.update(shown, refresh=True)
                sleep(interval)
    except KeyboardInterrupt:
        pass  # how a person ends it
    console.print(_fitted(state, console, clock(), order, search, ""))


def _fitted(state: RunState, console: Console, now: float, order: str, search: str, name: str) -> RenderableType:
    return screen(state, now=now, width=console.width, height=console.height, order=order, search=search, name=name)


def _follower(path: str | os.PathLike[str]) -> Follower:
    record = find_record(path)
    if record.is_dir() or record.suffix == ".parquet":
        raise ValueError(f"{record}: only JSONL records can be followed while they grow; use fastfs report")
    return Follower(record)


def _clean(value: Any) -> str:
    """Text of a record without anything that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _angle(value: Any, degrees: bool) -> str:
    if not _is_number(value):
        return "-"
    return f"{value:.3f} {math.degrees(value):4.0f}°" if degrees else f"{value:.3f}"


def _short(value: Any) -> str:
    return f"{value:.2e}" if _is_number(value) else "-"


def _minus(value: Any) -> float:
    return -float(value)
