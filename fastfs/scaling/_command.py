"""The ``fastfs scaling-check`` command: progress bar, table, text and exit status."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastfs._utils.json_output import check_json_output, is_stdout, write_json
from fastfs.scaling._check import check
from fastfs.scaling._factory import load_factory
from fastfs.scaling._fit import Status

__all__ = ["CANNOT", "STATUS", "run_check"]

CANNOT = 2
"""Exit status if the measurement failed."""

STATUS = {Status.PASS: 0, Status.FAIL: 1, Status.UNCLEAR: 3}
"""Exit status by verdict."""


def run_check(
    factory: str, *, widths: str, depths: str, out: Path | None, verbose: bool, json: Path | None, **arguments: Any
) -> int:
    """Run the command.

    Args:
        factory: ``module:attribute`` or ``path/to/file.py:attribute``.
        widths: comma-separated widths.
        depths: comma-separated depths.
        out: folder for the files, or None.
        verbose: whether to print the exponents and all advice below the verdict.
        json: file for the result as JSON, ``-`` for standard output, or None.
        **arguments: further arguments of :func:`fastfs.scaling.check`.

    Returns:
        The exit status: 0 if all desiderata pass, 1 if one fails, 3 if none fails but some are unclear, 2 if the
        measurement failed.
    """
    console = Console(stderr=is_stdout(json), emoji=False)
    errors = Console(stderr=True, emoji=False)
    try:
        sizes = _integers("--widths", widths), _integers("--depths", depths)
        check_json_output(json)
        if out is not None:
            _check_output(out)
        made = load_factory(factory)
        with _bar(errors) as bar:
            task = bar.add_task("measuring", total=None)

            def progress(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            report = check(made, widths=sizes[0], depths=sizes[1], progress=progress, **arguments)
        console.print(escape(str(report)), highlight=False, soft_wrap=True)
        if verbose:
            console.print(report.table())
            console.print(escape(report.words()), highlight=False, soft_wrap=True)
        if json is not None:
            write_json(json, report.to_dict())
        if out is not None:
            written = ", ".join(path.name for path in report.write(out))
            console.print(escape(f"Written to {out}: {written}"), highlight=False, soft_wrap=True)
    except (ImportError, OSError, ValueError) as error:
        errors.print(escape(f"fastfs scaling-check: {error}"), highlight=False, soft_wrap=True)
        return CANNOT
    return STATUS[report.status]


def _check_output(out: Path) -> None:
    """Report a missing matplotlib or an unusable folder before the runs rather than after."""
    importlib.import_module("fastfs.scaling._plots")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} exists and is not a folder")


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: expected integers such as 64,128,256, got {text!r}") from None
