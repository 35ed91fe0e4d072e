"""``fastfs reproduce``: compute and draw figures, compare them with published numbers, and write all to a folder."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fastfs._reproduce.paper.drawing import png
from fastfs._reproduce.paper.page import MADE_BY, page, summary, value_text
from fastfs._reproduce.paper.published import Check, check
from fastfs._reproduce.paper.studies import STUDIES
from fastfs._reproduce.paper.study import ComputedFigure, StudySettings
from fastfs._utils.json_output import check_json_output, is_stdout, strict_json, write_json
from fastfs._utils.output_files import check_output, write_whole

__all__ = ["chosen", "reproduce"]

_MARK = ".fastfs-reproduce-"


def chosen(only: str | None) -> list[str]:
    """Parse a list of figure names such as ``"a,c"``.

    Args:
        only: comma-separated names; None means all.

    Returns:
        The names, in the order of the paper.

    Raises:
        ValueError: a name is unknown, or none is given.
    """
    if only is None:
        return list(STUDIES)
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in STUDIES]
    if unknown or not wanted:
        known = "\n".join(f"  {study.name}  {study.title}" for study in STUDIES.values())
        what = f"no figure {', '.join(map(repr, unknown))}" if unknown else "no figure given"
        raise ValueError(f"{what}; available figures:\n{known}")
    return [name for name in STUDIES if name in wanted]


def reproduce(
    names: Sequence[str],
    settings: StudySettings,
    out: Path,
    *,
    console: Console | None = None,
    json: Path | None = None,
) -> list[Check]:
    """Compute and write figures, and print the published numbers beside ours.

    Each figure is written to ``<name>.png`` and ``<name>.csv`` as soon as it is computed. ``summary.html`` (one file
    with embedded figures) and ``summary.json`` describe the figures of this run. Every file is written atomically.

    Args:
        names: names of figures, as from :func:`chosen`.
        settings: sizes and seeds.
        out: folder, created if missing; files of these names in it are replaced.
        console: where to print; None means standard output, or standard error if the JSON goes to standard output.
        json: file for the content of ``summary.json``, ``-`` for standard output, or None.

    Returns:
        The published numbers of these figures, beside ours.

    Raises:
        OSError: the folder cannot be created or written to.
    """
    console = console or Console(stderr=is_stdout(json))
    check_json_output(json)
    _prepare(out)
    results: dict[str, ComputedFigure] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        bars = {name: progress.add_task(f"{name}  {STUDIES[name].title}", total=1.0, start=False) for name in names}
        for name in names:
            progress.start_task(bars[name])
            results[name] = _compute(name, settings, progress, bars[name])
            progress.update(bars[name], completed=1.0)
            write_whole(out / f"{name}.csv", results[name].outcome.table.to_csv(index=False).encode(), _MARK)
            write_whole(out / f"{name}.png", results[name].image, _MARK)
    checks = check({name: result.outcome.values for name, result in results.items()}, quick=settings.quick)
    content = summary(results, checks, settings)
    write_whole(out / "summary.json", strict_json(content).encode(), _MARK)
    write_whole(out / "summary.html", page(results, checks, settings).encode(), _MARK)
    _print(console, checks)
    console.print(f"Written to {out}: summary.html, summary.json, a PNG and a CSV for each figure", soft_wrap=True)
    if json is not None:
        write_json(json, content)
    return checks


def _compute(name: str, settings: StudySettings, progress: Progress, bar: object) -> ComputedFigure:
    begin = time.perf_counter()
    study = STUDIES[name]
    outcome = study.compute(settings, lambda part: progress.advance(bar, part))  # type: ignore[arg-type]
    image = png(study.draw(outcome.table))
    return ComputedFigure(outcome, image, time.perf_counter() - begin)


def _print(console: Console, checks: Sequence[Check]) -> None:
    table = Table(title="published numbers and ours", title_justify="left")
    table.add_column("")
    table.add_column("number")
    for column in ("published", "ours"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for entry in checks:
        verdict = {True: "[green]pass[/green]", False: "[red]FAIL[/red]", None: "[dim]--[/dim]"}[entry.passed]
        what = entry.published
        table.add_row(what.figure, what.what, what.text, value_text(entry.value), verdict)
    if checks:
        console.print(table)
    failed = sum(entry.passed is False for entry in checks)
    done = sum(entry.passed is not None for entry in checks)
    if failed:
        console.print(f"[red]{failed} of {done} numbers are outside of the accepted bands[/red]")
    elif done:
        console.print(f"all {done} compared numbers are within the accepted bands")


# The output folder


def _prepare(out: Path) -> None:
    """Create the folder, check that it is writable, and remove temporary files of killed runs.

    The summary of an earlier run is removed too, because this run may replace its figures before it has a summary of
    its own. Files of other figures are kept.

    Raises:
        NotADirectoryError: the path exists and is not a folder.
        OSError: the folder cannot be written to.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: exists and is not a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(f"{_MARK}*"):
            left.unlink()
        with tempfile.TemporaryFile(dir=out):
            pass
        for old in (out / "summary.html", out / "summary.json"):
            check_output(old)
            if old.is_file() and MADE_BY in old.read_text(encoding="utf-8", errors="replace"):
                old.unlink()
    except OSError as error:
        raise OSError(f"{out}: cannot be written to ({error.strerror or error})") from error
