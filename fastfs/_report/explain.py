"""``fastfs explain``: the three things that matter most about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markdown import Markdown
from rich.padding import Padding
from rich.text import Text

from fastfs._record.reading.load import load_compact
from fastfs._record.reading.locate import find_record
from fastfs._report.guide import Guide
from fastfs._report.run_numbers import RunNumbers
from fastfs._report.signs import CHANGE, WRONG, Sign, signs
from fastfs._utils.json_output import check_json_output, is_stdout, write_json

__all__ = ["MOST", "explain", "explain_run"]

MOST = 3
"""How many things are said about a run."""


def explain_run(path: Path, *, run: str | None = None, json: Path | None = None) -> None:
    """Prints the three things that matter most about a run, and writes them as JSON.

    Args:
        path: a record, or the folder of a run.
        run: id of the run; the last one by default.
        json: file for the same as JSON; ``-`` is standard output, and the text goes to standard error.

    Raises:
        ImportError: pandas is not installed.
        OSError: the record cannot be read, or the JSON not written.
        ValueError: not a record, without that run, or without a measured step.
    """
    check_json_output(json)
    numbers, found = explain(path, run=run)
    Console(highlight=False, stderr=is_stdout(json)).print(_rendered(numbers, found))
    if json is not None:
        write_json(
            json, {"run": numbers.header["run"], "record": str(path), "findings": [_as_json(one) for one in found]}
        )


def explain(path: Path, *, run: str | None = None) -> tuple[RunNumbers, list[Sign]]:
    """Finds the three things that matter most about a run. For arguments and errors see :func:`explain_run`."""
    numbers = RunNumbers.of(load_compact(find_record(path)), run)
    return numbers, signs(numbers, Guide.read())[:MOST]


def _rendered(run: RunNumbers, found: list[Sign]) -> RenderableType:
    healthy = all(sign.severity < CHANGE for sign in found)
    steps = run.grid.steps
    head = f"{run.header.get('model', 'run')} ({run.header['run']}), {len(steps):,} measured steps up to {steps[-1]:,}"
    parts: list[RenderableType] = [Text(f"{head}: nothing stands out" if healthy else head, style="bold")]
    for place, sign in enumerate(found, 1):
        style = "red" if sign.severity >= WRONG else "yellow" if sign.severity >= CHANGE else "green"
        parts += [Text(), Text(f"{place}. {sign.text}", style=style)]
        if sign.paragraph is not None:
            text = f"**{sign.paragraph.title}.** {sign.paragraph.text}"
            parts.append(Padding(Markdown(text), (0, 0, 0, 3)))
    return Group(*parts)


def _as_json(sign: Sign) -> dict[str, Any]:
    paragraph = sign.paragraph
    return {
        "severity": sign.severity,
        "text": sign.text,
        "numbers": {name: float(x) if hasattr(x, "dtype") else x for name, x in sign.numbers.items()},
        "anchor": None if paragraph is None else paragraph.anchor,
        "title": None if paragraph is None else paragraph.title,
        "paragraph": None if paragraph is None else paragraph.text,
    }
