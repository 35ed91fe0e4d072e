"""Summarize where the time of a step goes, from torch's profiler over plain, predicted and measured steps.

    python -m benchmarks.monitor.timeline [--device cuda] [--compile] [--json FILE] [--quick]

The workload is that of `benchmarks.monitor`. On CUDA: kernels in total and of fastfs, copies, calls in which the host
waits for the device, and idle time of the device. On a CPU: operators. Times include the overhead of the profiler;
`benchmarks.monitor` measures the actual cost. `--rounds` is the number of steps.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import command_line, print_table, write_json
from benchmarks.monitor.profiles import record
from benchmarks.monitor.trainings import ALIGNED, MEASURED, OFF, PLAIN, Bench, Workload, workload

KINDS = (PLAIN, OFF, ALIGNED, MEASURED)


def run(load: Workload, device: torch.device, steps: int) -> dict[str, Any]:
    """Return one summary per kind of step, each over the given number of steps."""
    result: dict[str, Any] = {"workload": load.name, "steps": steps, "times are": "microseconds per step"}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(load, device, Path(folder))
        for kind in KINDS:
            training = bench.training(kind)
            for _ in range(4):
                training.step()
            result[kind] = record(training.step, device, steps)
            training.close()
    return result


def show(result: dict[str, Any], on_gpu: bool) -> None:
    def cells(found: dict[str, Any]) -> list[float]:
        ours = [found["fastfs"]["us"], found["fastfs"]["count"]]
        if not on_gpu:
            return [found["host us"], *ours]
        counts = [found["copies"]["count"], found["waits"]["count"]]
        return [found["host us"], *ours, found["device"]["us"], found["idle us"], *counts]

    columns = ["", "host us", "fastfs us", "fastfs calls", "device us", "idle us", "copies", "waits"]
    rows = [[kind, *(f"{cell:.1f}" for cell in cells(result[kind]))] for kind in KINDS]
    print_table(f"{result['workload']}: {result['times are']}", columns[: len(rows[0])], rows)


def main() -> int:
    arguments = command_line(
        __doc__,
        quick="a tiny model, to test the benchmark itself",
        flags={"--compile": "compile models with torch.compile"},
    )
    device = arguments.device
    result = run(workload(arguments.quick, device, arguments.compile), device, arguments.rounds)
    show(result, device.type == "cuda")
    write_json(arguments.json, device, [result])
    return 0


if __name__ == "__main__":
    sys.exit(main())
