"""``fastfs watch``: the latest values of a run as a table in the terminal."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fastfs._record.ranks.part_files import rank_files
from fastfs._record.reading.follow import Follower
from fastfs._record.reading.follow_parts import PartsFollower
from fastfs._record.reading.latest import LatestRun
from fastfs._record.reading.locate import find_record
from fastfs._report.summary import number, since

__all__ = ["ORDERS", "screen", "watch"]

ORDERS = ("worst", "layer")
_ALERT_LINES = 3
_OTHERS = "a larger window, --once or --layers shows others"
_WIDE = 76
_QUIET_AT_LEAST = 60.0  # seconds without a row before the age of the last row turns red
_QUIET_GAPS = 10.0  # ... and this many times the usual time between rows


def screen(
    state: LatestRun,
    *,
    now: float,
    width: int = 100,
    height: int | None = None,
    order: str = "worst",
    search: str = "",
    name: str = "",
) -> RenderableType:
    """Lays out the table for the terminal.

    Args:
        state: what to show.
        now: seconds since 1970, for the age of the last row.
        width: characters per line; below 76, indices of layers and degrees are left out.
        height: number of lines; None for as many as needed.
        order: which layers to show if not all fit. ``worst``: those with a recent alert, then those that are not valid,
            then those with the largest angle; ``layer``: the first ones of the network.
        search: show only layers whose name contains this.
        name: of the record.

    Returns:
        What rich can print.
    """
    lines = _heading(state, now, name)
    rows = [i for i, layer in enumerate(state.names) if search.lower() in layer.lower()]
    room = len(rows) if height is None else max(1, height - len(lines) - 3)
    shown = rows
    note = ""
    if len(rows) > room:
        if order == "worst":
            shown = sorted(rows, key=lambda row: (*(-float(part) for part in state.badness(row)), row))[:room]
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


def _heading(state: LatestRun, now: float, name: str) -> list[Text]:
    last = state.last
    header = state.header
    title = Text(no_wrap=True, overflow="ellipsis")
    title.append(_clean(header.get("model") or "waiting for a run"), style="bold")
    for word in (f"run {header.get('run', '-')}", header.get("optimizer", ""), header.get("device", ""), name):
        title.append(f"  {_clean(word)}")
    if last is None:
        return [title, Text(f"no step yet: the first measured one will show here{_unread(state)}", style="yellow")]
    numbers = Text(no_wrap=True, overflow="ellipsis")
    numbers.append(f"step {last.step:,}", style="bold")
    numbers.append(f"  loss {number(last.loss, 5)}")
    speed = state.steps_per_second
    numbers.append(f"  {number(speed)} steps/s" if math.isfinite(speed) else "  - steps/s")
    age = max(0.0, now - last.time)
    numbers.append(f"  last row {since(age)} ago", style="bold red" if age > _quiet(state) else "")
    measured, predicted = state.step("measured"), state.step("predicted")
    detail = Text(no_wrap=True, overflow="ellipsis", style="dim")
    detail.append(f"measured at step {measured:,}" if measured is not None else "not measured yet")
    detail.append(f", predicted at step {predicted:,}" if predicted is not None else ", no prediction")
    scale = state.scalar("measured", "gradient_scale")
    detail.append("" if math.isnan(scale) else f"; gradient scale {scale:#.4g}")
    detail.append(f"; {state.skipped:,} steps skipped" if state.skipped else "")
    detail.append(_unread(state))
    lines = [title, numbers, detail]
    if state.alert_count:
        counts = ", ".join(f"{_clean(rule)} ({count:,})" for rule, count in state.alert_count.most_common(5))
        lines.append(Text(f"alerts: {counts}", style="bold red", no_wrap=True, overflow="ellipsis"))
        for alert in list(state.alerts)[-_ALERT_LINES:]:
            text = f"  step {alert.step}: {_clean(alert.message or alert.rule)}"
            lines.append(Text(text, style="red", no_wrap=True, overflow="ellipsis"))
    else:
        lines.append(Text("no alerts", style="dim"))
    return lines


def _unread(state: LatestRun) -> str:
    lines = state.unreadable
    return f"; {lines:,} {'line' if lines == 1 else 'lines'} not readable" if lines else ""


def _quiet(state: LatestRun) -> float:
    """Seconds without a row after which something may be wrong."""
    gap = state.seconds_between_rows
    return _QUIET_GAPS * _QUIET_AT_LEAST if math.isnan(gap) else max(_QUIET_AT_LEAST, _QUIET_GAPS * gap)


def _cells(state: LatestRun, row: int, degrees: bool) -> list[Text]:
    valid = state.valid(row)
    style = "yellow" if valid is False else ""
    predicted = state.number("predicted", "update_rms", row)
    if valid is False:
        verdict = Text(f"no: {_clean(state.why(row) or 'no reason given')}", style="yellow")
    else:
        verdict = Text("yes" if valid else "-")
    no_cut = row < len(state.cut) and state.cut[row] is False
    return [
        Text(str(row) if row < state.layers else "", style="dim"),
        Text(_clean(state.names[row]), style="" if row < state.layers else "italic"),
        Text(_angle(state.number("measured", "angle", row), degrees), style=style),
        *(
            Text(_short(state.number("measured", column, row)), style=style)
            for column in ("update_rms", "relative_update")
        ),
        Text("no cut" if no_cut and math.isnan(predicted) else _short(predicted), style="dim" if no_cut else ""),
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
    """Shows the latest values of a run until interrupted, or once.

    Args:
        path: of the record (JSONL), or of the folder of the run. Unless ``once``, it need not exist yet.
        console: of rich.
        once: whether to print one table with all layers and return.
        interval: seconds between polls of the file.
        order: see :func:`screen`.
        search: see :func:`screen`.
        sleep: waits between polls.
        clock: seconds since 1970, for the age of the last row.

    Raises:
        FileNotFoundError: no such record, with ``once``.
        OSError: the record cannot be read.
        ValueError: not a record, or the output is not a terminal, without ``once``.
    """
    console = console or Console()
    state = LatestRun()
    if once:
        follower = _follower(path)
        new = follower.poll()
        state.update(new.lines)
        state.unreadable = new.unreadable
        if not state.header:
            raise ValueError(f"{follower.path}: holds no run of fastfs.Monitor yet")
        console.print(
            screen(state, now=clock(), width=console.width, order="layer", search=search, name=follower.path.name)
        )
        return
    if not console.is_terminal:
        raise ValueError("the output is not a terminal: use --once")
    found: Follower | PartsFollower | None = None
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
                new = found.poll()
                if new.restarted:
                    state = LatestRun()
                state.update(new.lines)
                state.unreadable += new.unreadable
                shown: RenderableType = Text(f"waiting: {found.path}: no such file", style="yellow")
                if new.exists:
                    shown = _fitted(state, console, clock(), order, search, found.path.name)
                live.update(shown, refresh=True)
                sleep(interval)
    except KeyboardInterrupt:
        pass  # the usual way to end it
    console.print(_fitted(state, console, clock(), order, search, ""))


def _fitted(state: LatestRun, console: Console, now: float, order: str, search: str, name: str) -> RenderableType:
    return screen(state, now=now, width=console.width, height=console.height, order=order, search=search, name=name)


def _follower(path: str | os.PathLike[str]) -> Follower | PartsFollower:
    record = find_record(path)
    if record.is_dir() or record.suffix == ".parquet":
        raise ValueError(f"{record}: only JSONL records can be followed while they grow; use fastfs report")
    if rank_files(record) and not record.exists():
        return PartsFollower(record)
    return Follower(record)


def _clean(value: Any) -> str:
    """Replaces characters that a terminal would interpret."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def _angle(value: float, degrees: bool) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f} {math.degrees(value):4.0f}°" if degrees else f"{value:.3f}"


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2e}"
