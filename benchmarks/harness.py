"""What the benchmarks share: side-by-side timing, the environment, tables and result files.

Contestants take turns inside each round, so a machine that slows down slows them all; what is reported is the median
over rounds, and ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fastfs
from fastfs import ops

Times = dict[str, list[float]]  # seconds per round, by contestant


def command_line(description: str | None, *, quick: str, flags: dict[str, str] | None = None) -> argparse.Namespace:
    """The options of every timed benchmark: ``device``, ``json``, ``rounds``, and ``quick`` with its help.

    ``flags`` are further ones without a value, and their help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--rounds", type=int, default=7)
    for flag, help_ in {"--quick": quick, **(flags or {})}.items():
        parser.add_argument(flag, action="store_true", help=help_)
    return parser.parse_args()


def thread_counts(device: torch.device) -> Iterator[int]:
    """Sets the number of threads to each that is to be measured, one and all; on a GPU it stays as it is."""
    every = torch.get_num_threads()
    try:
        for threads in sorted({1, every}) if device.type == "cpu" else [every]:
            torch.set_num_threads(threads)
            yield threads
    finally:
        torch.set_num_threads(every)


# More than any GPU's clock: a wait of so many cycles per second lasts at least as long as asked for.
CYCLES_PER_SECOND = 3e9


def time_call(call: Callable[[], object], device: torch.device, repeat: int = 1) -> float:
    """Seconds per call, the mean over `repeat` calls in a row: on CUDA the GPU's time, else wall time.

    On CUDA the GPU is kept waiting while the calls are queued, for longer than an untimed pass before took to queue
    them. So the time between the events is that of the kernels and the gaps between them, without the host's. A call
    that waits for the GPU, or launches more than the queue holds (about a thousand kernels), cannot be queued ahead
    in full: what the GPU then waits for the host counts.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeat):
            call()
        queueing = time.perf_counter() - begin
        torch.cuda.synchronize(device)
        torch.cuda._sleep(int((2 * queueing + 1e-3) * CYCLES_PER_SECOND))
        start.record()
        for _ in range(repeat):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3 / repeat
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - begin) / repeat


def wall_time(call: Callable[[], object], device: torch.device, repeat: int = 1) -> float:
    """Seconds per call, the mean over `repeat` calls in a row, host and device together: what a loop takes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / repeat


def side_by_side(
    contestants: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    repeat: int = 1,
    budget: float = 4.0,
    *,
    shuffle: random.Random | None = None,
    timer: Callable[[Callable[[], object], torch.device, int], float] | None = None,
) -> Times:
    """Times the contestants in turn, `rounds` times, after one call each that is not counted.

    One that has used up its `budget` of seconds sits out the later rounds, after three at least. With `shuffle` the
    order is drawn anew in every round. `timer` is :func:`time_call` if not given.
    """
    for call in contestants.values():
        call()
    times: Times = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(rounds):
        if shuffle is not None:
            shuffle.shuffle(order)
        for name in order:
            if len(times[name]) < 3 or sum(times[name]) * repeat < budget:
                times[name].append((timer or time_call)(contestants[name], device, repeat))
    return times


def median_ratio(times: Times, name: str, to: str) -> float:
    """Median of time(`name`) / time(`to`) over the rounds in which both took part."""
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=False))


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on, for the result file."""
    info: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "fastfs": fastfs.__version__,
        "core": ops.build_info(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info["device"] = properties.name
        info["multiprocessors"] = properties.multi_processor_count
        info["torch_cuda"] = torch.version.cuda
    return info


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, device: torch.device, results: list[dict[str, Any]]) -> None:
    """Writes the environment and the results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(device), "results": results}, indent=1)
    path.write_text(text + "\n")


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on the terminal, first column left, the others right."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
