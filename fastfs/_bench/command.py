"""The ``fastfs bench`` command: measure, print a table and a verdict, write a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastfs._bench.ceilings import COPY
from fastfs._bench.comparison import COMPILE, EAGER, HAND, NORMS, OURS
from fastfs._bench.quick import measure
from fastfs._bench.verdict import conclusion, troubles, verdict
from fastfs._utils.devices import fastest_device, named_device
from fastfs._utils.json_output import check_json_output, is_stdout, write_json

__all__ = ["CANNOT", "run_bench", "show"]

CANNOT = 2
"""Exit status if the measurement failed."""


def run_bench(device: str | None, *, out: Path | None, seconds: float) -> int:
    """Run the command.

    Args:
        device: device such as "cuda:0"; None selects a GPU that torch can use, or else the CPU.
        out: file for the result, ``-`` for standard output, or None.
        seconds: approximate duration.

    Returns:
        The exit status: 0, or 2 if the measurement failed.
    """
    console, errors = Console(stderr=is_stdout(out), emoji=False), Console(stderr=True, emoji=False)
    try:
        where = fastest_device() if device is None else named_device(device)
        check_json_output(out)
        with errors.status("measuring") as status:
            result = measure(where, seconds, lambda what: status.update(f"measuring: {escape(what)}"))
        result["verdict"], result["troubles"] = verdict(result), troubles(result)
        result["conclusion"] = conclusion(result)
        show(console, result)
        if out is not None:
            write_json(out, result)
        if out is not None and not is_stdout(out):
            console.print(escape(f"Written to {out}"), highlight=False, soft_wrap=True)
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        errors.print(escape(f"fastfs bench: {error}"), highlight=False, soft_wrap=True)
        return CANNOT
    return 0


def show(console: Console, result: dict[str, Any]) -> None:
    """Print the table and the verdict of a measurement, in 80 columns."""
    environment = result["environment"]
    cores = f"{environment['processor']}, threads: {environment['threads']}"
    console.print(escape(environment.get("device") or cores), highlight=False, soft_wrap=True)
    console.print("GB/s, and speedup of fastfs over the others", highlight=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("inputs", "memory", "copy", "fastfs", "of\nmemory", "eager", "by\nhand", "compile", "3\nnorms"):
        table.add_column(column, justify="left" if column == "inputs" else "right", no_wrap=True)
    for case in result["results"]:
        rows = {row["implementation"]: row for row in case["rows"]}
        cells = [f"{case['kind']}, {case['dtype']}"]
        cells += [_cell(rows, name, "GB/s", ".1f") for name in (case["rows"][0]["implementation"], COPY, OURS)]
        cells.append(_cell(rows, OURS, "of ceiling", ".2f"))
        cells += [_cell(rows, name, "fastfs is faster by", ".1f", "x") for name in (EAGER, HAND, COMPILE, NORMS)]
        table.add_row(*cells)
    console.print(table)
    for line in result["verdict"]:
        console.print(escape(line), highlight=False, soft_wrap=True)
    for line in result["troubles"]:
        console.print(escape(f"! {line}"), style="yellow", highlight=False, soft_wrap=True)
    console.print(escape(result["conclusion"]), style="bold", highlight=False, soft_wrap=True)


def _cell(rows: dict[str, dict[str, Any]], name: str, column: str, form: str, unit: str = "") -> str:
    value = rows.get(name, {}).get(column)
    return "-" if value is None else f"{value:{form}}{unit}"
