"""The ``fastfs diff`` command, and ``fastfs report`` of several runs: text, table, page and exit status."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fastfs._compare.compare import compare_runs
from fastfs._compare.runs import read_runs
from fastfs._utils.json_output import check_json_output, is_stdout, write_json
from fastfs._utils.output_files import check_output

__all__ = ["run_diff", "run_report"]

_CANNOT = 2


def run_report(runs: Sequence[str], *, out: Path, json: Path | None) -> int:
    """Run ``fastfs report`` of several runs: ``fastfs diff --out``, of which only an error counts for the exit status.

    Args:
        runs: records; each is compared with the first one.
        out: the page to write.
        json: see :func:`run_diff`.

    Returns:
        The exit status: 0, or 1 if the records cannot be compared.
    """
    return int(run_diff(runs, [], out=out, json=json, command="report") == _CANNOT)


def run_diff(
    runs: Sequence[str],
    against: Sequence[str],
    *,
    out: Path | None,
    confidence: float = 0.95,
    json: Path | None,
    command: str = "diff",
) -> int:
    """Run the command.

    Args:
        runs: records of the first side.
        against: records of the second side.
        out: the page to write, or None.
        confidence: probability of no false alarm.
        json: file for the result as JSON, ``-`` for standard output, or None.
        command: name of the command in messages.

    Returns:
        The exit status: 0 if nothing parts, 1 if something does or one run has no more numbers, 2 if the records cannot
        be compared.
    """
    console, errors = Console(stderr=is_stdout(json), emoji=False), Console(stderr=True, emoji=False)

    def say(text: str, where: Console = console) -> None:
        where.print(escape(text), highlight=False, soft_wrap=True)

    try:
        check_json_output(json)
        if out is not None:
            check_output(out)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(f"fastfs {command}: {message}", errors)
            found = read_runs([*runs, *against])
        comparison = compare_runs(found, len(against), confidence)
        say(str(comparison))
        for note in comparison.notes:
            say(f"Note: {note}.")
        if comparison.partings:
            console.print(comparison.table())
        if out is not None:
            from fastfs._report.several import write_comparison

            size = write_comparison(found, comparison, out)
            say(f"{out} ({size / 1e6:.1f} MB)")
        if json is not None:
            write_json(json, comparison.to_dict())
    except (ImportError, OSError, ValueError) as error:
        say(f"fastfs {command}: {error}", errors)
        return _CANNOT
    return int(comparison.parted)
