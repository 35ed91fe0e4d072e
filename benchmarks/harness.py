"""What the benchmarks share: the command line, tables and result files; timing and environment are those of fastfs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastfs._bench import machine
from fastfs._bench.machine import environment
from fastfs._bench.timing import Times, median_ratio, side_by_side, time_call, wall_time
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
    """The options of every timed benchmark: ``device``, ``json``, ``rounds``, and ``quick`` with its help.

    ``flags`` are further ones without a value, and their help; ``options`` those with one, as argparse describes them.
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
    """The value of ``--device``.

    Raises:
        argparse.ArgumentTypeError: no such device, or torch does not see it.
    """
    try:
        return named_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def file_option(text: str) -> Path:
    """The value of ``--json``: a file, told before anything is measured.

    Raises:
        argparse.ArgumentTypeError: a folder.
    """
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text}")
    return path


def count_option(text: str) -> int:
    """The value of ``--rounds``.

    Raises:
        argparse.ArgumentTypeError: no number, or below 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def thread_counts(device: torch.device) -> Iterator[int]:
    """Sets the number of threads to each that is to be measured, one and all; on a GPU it stays as it is."""
    every = torch.get_num_threads()
    try:
        for threads in sorted({1, every}) if device.type == "cpu" else [every]:
            torch.set_num_threads(threads)
            yield threads
    finally:
        torch.set_num_threads(every)


def write_json(path: Path | None, device: torch.device, results: list[dict[str, Any]]) -> None:
    """Writes the environment and the results so far, unless path is None; after each, so that none is lost."""
    if path is None:
        return
    machine.write_json(path, {"environment": environment(device), "results": results})


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on the terminal, first column left, the others right."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
