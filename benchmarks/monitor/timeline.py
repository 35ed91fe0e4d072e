"""Where the time of a step goes: torch's profiler over plain, predicted and measured steps, as a small summary.

    python -m benchmarks.monitor.timeline [--device cuda] [--compile] [--json FILE] [--quick]

The workload is that of `benchmarks.monitor`. On CUDA: kernels and those of fastfs among them, copies, calls in which
the host waits for the device, and for how long the device has nothing to do. On a CPU: operators. Times are those under
the profiler, which takes its share of the host's; `benchmarks.monitor` has the cost. `--rounds` is the number of steps.
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
    """One summary by kind of step, each of so many steps (the rounds of the command line)."""
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
        __doc__, quick="a tiny model: does it run", flags={"--compile": "models compiled by torch.compile"}
    )
    device = arguments.device
    result = run(workload(arguments.quick, device, arguments.compile), device, arguments.rounds)
    show(result, device.type == "cuda")
    write_json(arguments.json, device, [result])
    return 0


if __name__ == "__main__":
    sys.exit(main())
