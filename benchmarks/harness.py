"""Command line, tables and result files of all benchmarks; timing and environment come from fastfs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastfs._bench.machine import environment
from fastfs._bench.timing import Times, median_ratio, side_by_side, time_call, wall_time
from fastfs._utils import json_output
from fastfs._utils.devices import named_device

__all__ = [
    "Times",
    "command_line",
    "count_option",
    "device_option",
    "environment",
    "file_option",
    "median_ratio",
    "print_table",
    "side_by_side",
    "thread_counts",
    "time_call",
    "wall_time",
    "write_json",
]


def command_line(
    description: str | None,
    *,
    quick: str,
    flags: dict[str, str] | None = None,
    options: dict[str, dict[str, Any]] | None = None,
) -> argparse.Namespace:
    """Parse the options of every timed benchmark: ``device``, ``json``, ``rounds`` and ``quick``.

    Args:
        description: text of ``--help``.
        quick: help of ``--quick``.
        flags: further options without a value, and their help.
        options: further options with a value, as argparse describes them.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_option, default=torch.device("cpu"))
    parser.add_argument("--json", type=file_option, help="write the results to this file")
    parser.add_argument("--rounds", type=count_option, default=7)
    for flag, help_ in {"--quick": quick, **(flags or {})}.items():
        parser.add_argument(flag, action="store_true", help=help_)
    for option, described in (options or {}).items():
        parser.add_argument(option, **described)
    return parser.parse_args()


def device_option(text: str) -> torch.device:
    """Parse the value of ``--device``.

    Args:
        text: the value.

    Returns:
        The device.

    Raises:
        argparse.ArgumentTypeError: there is no such device, or torch does not see it.
    """
    try:
        return named_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def file_option(text: str) -> Path:
    """Parse the value of ``--json``, so that an unusable path is reported before anything is measured.

    Args:
        text: the value.

    Returns:
        The path.

    Raises:
        argparse.ArgumentTypeError: the path is a folder.
    """
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text}")
    return path


def count_option(text: str) -> int:
    """Parse the value of ``--rounds``.

    Args:
        text: the value.

    Returns:
        The number.

    Raises:
        argparse.ArgumentTypeError: the value is not a number, or below 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def thread_counts(device: torch.device) -> Iterator[int]:
    """Iterate over the numbers of threads to measure, one and all on the CPU, and set each; unchanged on a GPU."""
    every = torch.get_num_threads()
    try:
        for threads in sorted({1, every}) if device.type == "cpu" else [every]:
            torch.set_num_threads(threads)
            yield threads
    finally:
        torch.set_num_threads(every)


def write_json(path: Path | None, device: torch.device, results: list[dict[str, Any]]) -> None:
    """Write the environment and the results so far, unless path is None. Call it after each result."""
    if path is None:
        return
    json_output.write_json(path, {"environment": environment(device), "results": results})


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table, with the first column left-aligned and the others right-aligned."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
