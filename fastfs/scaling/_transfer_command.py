"""The ``fastfs transfer`` command: table, text and exit status."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from fastfs._utils.json_output import check_json_output, is_stdout, write_json
from fastfs.scaling._command import CANNOT, STATUS
from fastfs.scaling._transfer import transfer

__all__ = ["run_transfer"]

_Given = tuple[float | None, float | None]


def run_transfer(records: Sequence[str], given: Sequence[str], *, json: Path | None, **arguments: Any) -> int:
    """Run the command.

    Args:
        records: records or folders of runs.
        given: ``RUN=WIDTH,DEPTH`` each, for records whose metadata lack them; either number may be left empty.
        json: file for the result as JSON, ``-`` for standard output, or None.
        **arguments: further arguments of :func:`fastfs.scaling.transfer`.

    Returns:
        The exit status: 0 if every quantity passes, 1 if one fails, 3 if none fails but some are unclear, 2 if the
        records cannot be judged.
    """
    console, errors = Console(stderr=is_stdout(json), emoji=False), Console(stderr=True, emoji=False)

    def say(text: str, where: Console = console) -> None:
        where.print(escape(text), highlight=False, soft_wrap=True)

    try:
        check_json_output(json)
        sizes = _sizes(records, given)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(f"fastfs transfer: {message}", errors)
            report = transfer(records, sizes=sizes, **arguments)
        say(str(report))
        console.print(report.table())
        if json is not None:
            write_json(json, report.to_dict())
    except (ImportError, OSError, ValueError) as error:
        say(f"fastfs transfer: {error}", errors)
        return CANNOT
    return STATUS[report.status]


def _sizes(records: Sequence[str], given: Sequence[str]) -> list[_Given | None] | None:
    """The size of each record, or None if none is given, so that a single record may stand for all of its runs.

    Args:
        records: as given on the command line.
        given: values of ``--size``.

    Returns:
        The sizes, None for a record of which none is given.

    Raises:
        ValueError: not in this form, or of a record that is not among the arguments.
    """
    if not given:
        return None
    found: dict[str, _Given] = {}
    for text in given:
        record, _, numbers = text.rpartition("=")
        parts = numbers.split(",")
        if record not in records:
            raise ValueError(f"--size {text}: expected RUN=WIDTH,DEPTH with one of the runs, got {record or text!r}")
        try:
            width, depth = (float(part) if part.strip() else None for part in parts)
        except ValueError:
            raise ValueError(f"--size {text}: expected RUN=WIDTH,DEPTH such as {record}=128,8") from None
        found[record] = width, depth
    return [found.get(record) for record in records]
