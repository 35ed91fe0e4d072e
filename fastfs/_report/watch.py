"""``fastfs watch``: the latest values of a run as a table in the terminal."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fastfs._record.ranks.part_files import rank_files
from fastfs._record.reading.confidence import LARGEST_FACTOR, SHARE
from fastfs._record.reading.follow import Follower
from fastfs._record.reading.follow_parts import PartsFollower
from fastfs._record.reading.latest import LatestRun
from fastfs._record.reading.locate import find_record
from fastfs._report.ranks import apart_text
from fastfs._report.summary import WITHHELD, number, predicted_text, since
from fastfs._utils.json_output import check_json_output, is_stdout, write_json

__all__ = ["ORDERS", "screen", "watch"]

ORDERS = ("worst", "layer")
_ALERT_LINES = 3
_OTHERS = "a larger window, --once or --layers shows others"
_WIDE = 76
_PREDICTED = (
    f"predicted: {100 * SHARE:.0f} % of speeds are within the factor x/÷; withheld where it is above "
    f"{LARGEST_FACTOR:g} or not known yet"
)
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
    widths = {
        "#": len(str(state.layers)),
        "layer": 12,
        "angle": 11 if wide else 5,
        "speed": 9,
        "relative": 9,
        "predicted": 16,
        "valid": 5,
    }
    fitting = dict(widths)
    for title in ("#", "predicted", "relative", "speed"):  # left out rather than cut: 1.5e-0 reads like a number
        if (not wide and title == "#") or sum(fitting.values()) + 2 * (len(fitting) - 1) > width:
            del fitting[title]
    for title, least in fitting.items():
        if title in ("layer", "valid"):
            ratio = 2 if title == "layer" else 1
            table.add_column(title, no_wrap=True, overflow="ellipsis", ratio=ratio, min_width=least)
        else:
            table.add_column(title, justify="right", no_wrap=True, min_width=least)
    for row in shown:
        cells = dict(zip(widths, _cells(state, row, degrees=wide), strict=True))
        table.add_row(*(cells[title] for title in fitting))
    shown_predictions = (
        "predicted" in fitting
        and state.step("predicted") is not None
        and any(_predicted(state, row) != "-" for row in shown)
    )
    notes = [note, *([_PREDICTED] if shown_predictions and height is None else [])]
    caption = [Text(one, style="dim", overflow="ellipsis", no_wrap=one == note) for one in notes if one]
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
    lines = [title, numbers, detail, *_ranks(state)]
    if state.alert_count:
        counts = ", ".join(f"{_clean(rule)} ({count:,})" for rule, count in state.alert_count.most_common(5))
        lines.append(Text(f"alerts: {counts}", style="bold red", no_wrap=True, overflow="ellipsis"))
        for alert in list(state.alerts)[-_ALERT_LINES:]:
            text = f"  step {alert.step}: {_clean(alert.message or alert.rule)}"
            lines.append(Text(text, style="red", no_wrap=True, overflow="ellipsis"))
    else:
        lines.append(Text("no alerts", style="dim"))
    return lines


def _ranks(state: LatestRun) -> list[Text]:
    """Says of a run of several ranks whether all are there, and which one stands apart from the others."""
    if state.ranks == 1:
        return []
    since = state.ranks_missing_since
    said = Text(f"{state.ranks:,} ranks", style="dim", no_wrap=True, overflow="ellipsis")
    if since is not None:
        text = f"{state.present_ranks:,} of {state.ranks:,} ranks since step {since:,}"
        said = Text(text, style="bold yellow", no_wrap=True, overflow="ellipsis")
    if apart := apart_text(state.names, state.apart):
        return [said, Text(f"{_clean(apart)} (last 3 measured steps)", style="bold red", overflow="ellipsis")]
    return [said]


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
    if valid is False:
        verdict = Text(f"no: {_clean(state.why(row) or 'no reason given')}", style="yellow")
    else:
        verdict = Text("yes" if valid else "-")
    predicted = _predicted(state, row)
    no_cut = row < len(state.cut) and state.cut[row] is False
    return [
        Text(str(row) if row < state.layers else "", style="dim"),
        Text(_clean(state.names[row]), style="" if row < state.layers else "italic"),
        Text(_angle(state.number("measured", "angle", row), degrees), style=style),
        *(
            Text(_short(state.number("measured", column, row)), style=style)
            for column in ("update_rms", "relative_update")
        ),
        Text(
            "no cut" if no_cut and predicted == "-" else predicted,
            style="dim" if no_cut or predicted == WITHHELD else "",
        ),
        verdict,
    ]


def watch(
    path: str | os.PathLike[str],
    *,
    console: Console | None = None,
    once: bool = False,
    json: Path | None = None,
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
        json: file for what the table shows, as JSON, with ``once``; ``-`` is standard output, which then has no table.
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
    console = console or Console(stderr=is_stdout(json))
    state = LatestRun()
    if once:
        check_json_output(json)
        follower = _follower(path)
        new = follower.poll()
        state.update(new.lines)
        state.unreadable = new.unreadable
        if not state.header:
            raise ValueError(f"{follower.path}: holds no run of fastfs.Monitor yet")
        console.print(
            screen(state, now=clock(), width=console.width, order="layer", search=search, name=follower.path.name)
        )
        if json is not None:
            write_json(json, _as_json(state, search))
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


def _as_json(state: LatestRun, search: str) -> dict[str, Any]:
    """What the table shows, with the names of the record's columns. Missing numbers are null."""
    last = state.last
    return {
        "run": state.header.get("run"),
        "model": state.header.get("model"),
        "step": None if last is None else last.step,
        "time": None if last is None else last.time,
        "loss": None if last is None else last.loss,
        "steps_per_second": state.steps_per_second,
        "measured_step": state.step("measured"),
        "predicted_step": state.step("predicted"),
        "gradient_scale": state.scalar("measured", "gradient_scale"),
        "skipped": state.skipped,
        "unreadable_lines": state.unreadable,
        "ranks": state.ranks,
        "alerts": dict(state.alert_count),
        "layers": [_row_as_json(state, row) for row, name in enumerate(state.names) if search.lower() in name.lower()],
    }


def _row_as_json(state: LatestRun, row: int) -> dict[str, Any]:
    factor = state.factor(row)
    predicted = state.number("predicted", "update_rms", row)
    measured = ("angle", "update_rms", "relative_update")
    return {
        "name": state.names[row],
        "group": row >= state.layers,
        "cut": state.cut[row] if row < len(state.cut) else None,
        **{column: state.number("measured", column, row) for column in measured},
        "valid": state.valid(row),
        "why": state.why(row),
        "predicted_update_rms": predicted if factor <= LARGEST_FACTOR else None,
        "predicted_factor": factor,
    }


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


def _predicted(state: LatestRun, row: int) -> str:
    return predicted_text(state.number("predicted", "update_rms", row), state.factor(row))


def _angle(value: float, degrees: bool) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f} {math.degrees(value):4.0f}°" if degrees else f"{value:.3f}"


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2e}"
