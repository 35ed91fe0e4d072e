"""Measure the overhead of `fastfs.Monitor`: the same training loop with and without it, and a naive implementation.

    python -m benchmarks.monitor [--device cuda] [--compile] [--json FILE] [--quick]

Identical models are trained in one process and alternate in blocks of steps, in an order that is drawn anew in every
round. Reported times are medians, and ratios are medians of the ratios to the plain loop within a round. "plain, again"
is a second plain loop, whose ratio shows the accuracy of the others. Before timing, the benchmark checks that
parameters are bitwise equal with and without the monitor, and that the naive implementation finds the same angles. With
--compile, all models are compiled by torch.compile, including the plain one. The naive implementation then takes part
only in the check, in eager torch, and measured steps use only the default mode, because each training compiles its own
code.

Peak memory covers building the training and its first two steps, and is measured separately from time. On the CPU,
every storage that an operator of torch returns counts for its lifetime (a TorchDispatchMode observes them; temporary
memory inside of kernels is not observed), except those inside of compiled code. On CUDA, the allocator reports it. On
CUDA, the benchmark also counts how often a step waits for the device, and copies from it.

Targets are printed as PASS or FAIL; the exit status is 1 if one is missed at full size.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Times, command_line, median_ratio, print_table, write_json
from benchmarks.monitor.check import check
from benchmarks.monitor.cost import Traffic, compare, peak_bytes, traffic, window
from benchmarks.monitor.trainings import (
    AGAIN,
    ALIGNED,
    AMPLIFIED,
    AMPLIFIED_FEW,
    EVERY,
    JVP,
    JVP_FEW,
    MEASURED,
    MEASURED_FEW,
    NAIVE,
    OFF,
    PLAIN,
    PROBE,
    PROBE_FEW,
    WINDOW,
    Bench,
    Workload,
    workload,
)


def say(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


@dataclass
class Found:
    """The measurements so far, with the seconds per step of unmeasured (`cheap`) and measured steps (`dear`)."""

    errors: dict[str, float]
    peaks: dict[str, int | None] = field(default_factory=dict)
    flows: dict[str, Traffic] | None = None
    cheap: Times = field(default_factory=dict)
    dear: Times = field(default_factory=dict)
    window: tuple[float, float] | None = None


def run(
    load: Workload, device: torch.device, rounds: int, quick: bool, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """All rows of the table. `keep` is given what there is after each part, so that nothing is lost."""
    on_gpu = device.type == "cuda"
    few = [PLAIN, AGAIN, OFF, ALIGNED]
    eager = [MEASURED_FEW, AMPLIFIED, AMPLIFIED_FEW, JVP, JVP_FEW, PROBE, PROBE_FEW, NAIVE]
    many = [PLAIN, MEASURED, *([] if load.compiled else eager)]
    each = [name for name in dict.fromkeys(few + many) if name != AGAIN]
    with tempfile.TemporaryDirectory() as folder:
        say("checking that nothing changes, and the naive implementation")
        found = Found(check(Bench(load.smaller(4) if on_gpu else load, device, Path(folder))))
        torch.compiler.reset()  # what was compiled for other sizes, and without fused attention
        bench = Bench(load, device, Path(folder))

        def report() -> dict[str, Any]:
            result = table(bench, found, device, rounds)
            keep(result)
            return result

        say("memory")
        if on_gpu or not load.compiled:
            found.peaks = {name: peak_bytes(lambda n=name: bench.training(n), device) for name in each}  # type: ignore[misc]
        say("waits and copies")
        found.flows = traffic(bench, [name for name in each if name != NAIVE])
        say("steps that are not measured")
        found.cheap = compare(bench, few, 2 * rounds + 4, 20 if on_gpu else 3)
        report()
        say("measured steps")
        found.dear = compare(bench, many, rounds, 5 if on_gpu else 1)
        report()
        say("a window of 100 steps")
        found.window = window(bench, 100, 5 if quick else 4)
        return report()


def table(bench: Bench, found: Found, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the result with one row per implementation."""
    rows = []

    def add(name: str, seconds: float, ratio: float) -> None:
        rows.append({
            "implementation": name,
            "milliseconds": round(seconds * 1e3, 4),
            "ratio": round(ratio, 4),
            "overhead percent": round(100 * (ratio - 1), 2),
            **_memory(found.peaks.get(name), found.peaks.get(PLAIN)),
            **_flow(None if found.flows is None else found.flows.get(name)),
        })  # fmt: skip

    for name, times in found.cheap.items():
        add(name, statistics.median(times), median_ratio(found.cheap, name, PLAIN))
    if found.dear:
        ratio = (99 * median_ratio(found.cheap, OFF, PLAIN) + median_ratio(found.dear, MEASURED, PLAIN)) / 100
        add(EVERY, ratio * statistics.median(found.cheap[PLAIN]), ratio)
    if found.window:
        with_monitor, without = found.window
        add(WINDOW, with_monitor, with_monitor / without)
    for name, times in found.dear.items():
        if name != PLAIN:
            add(name, statistics.median(times), median_ratio(found.dear, name, PLAIN))
    by_name: dict[str, Any] = {str(row["implementation"]): row for row in rows}
    return {
        "workload": bench.load.name,
        "parameters": bench.parameters,
        "threads": None if device.type == "cuda" else torch.get_num_threads(),
        "rounds": rounds,
        "differences of naive implementation and monitor": found.errors,
        "rows": rows,
        "targets": targets(by_name, device),
    }


def _memory(peak: int | None, plain: int | None) -> dict[str, float]:
    if peak is None or plain is None:
        return {}
    return {"peak MiB": round(peak / 2**20, 1), "more than plain MiB": round((peak - plain) / 2**20, 1)}


def _flow(flow: Traffic | None) -> dict[str, float | None]:
    return {
        "host synchronizations per step": None if flow is None else flow.waits,
        "copies to the host per step": None if flow is None else flow.copies,
    }


def targets(rows: dict[str, dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Return the limits of the overhead, and whether they are met."""
    most = {EVERY: 1.01, ALIGNED: 1.02, MEASURED: 1.5}
    if device.type == "cuda":
        # A predicted step reads a sample of the parameters; with aligned_fraction=1, which is not timed here, 1.017.
        most = {EVERY: 1.01, ALIGNED: 1.006, MEASURED: 1.3, MEASURED_FEW: 1.1}
        most |= {AMPLIFIED_FEW: 1.6, JVP_FEW: 1.8, PROBE_FEW: 2.5}
    found = [_target(name, "ratio", rows[name]["ratio"], x) for name, x in most.items() if name in rows]
    if device.type == "cuda":
        waits = "host synchronizations per step"
        found += [
            _target(name, "more " + waits, rows[name][waits] - rows[PLAIN][waits], 0)
            for name in (OFF, ALIGNED, MEASURED)
            if name in rows
        ]
    return found


def _target(implementation: str, what: str, value: float, most: float) -> dict[str, Any]:
    return {"implementation": implementation, "most": most, what: value, "pass": value <= most}


def show(result: dict[str, Any]) -> None:
    columns = ["", "ms a step", "ratio to plain", "peak MiB", "more than plain MiB", "waits", "copies to host"]
    keys = ["peak MiB", "more than plain MiB", "host synchronizations per step", "copies to the host per step"]
    rows = [
        [
            row["implementation"],
            f"{row['milliseconds']:.2f}",
            f"{row['ratio']:.4f}",
            *("" if row.get(key) is None else f"{row[key]:.1f}" for key in keys),
        ]
        for row in result["rows"]
    ]
    threads = f", threads: {result['threads']}" if result["threads"] else ""
    print_table(f"{result['workload']}, {result['parameters'] / 1e6:.1f}M parameters{threads}", columns, rows)
    for target in result["targets"]:
        (what,) = target.keys() - {"implementation", "most", "pass"}
        verdict = "PASS" if target["pass"] else "FAIL"
        print(f"{verdict}  {target['implementation']}: {what} {target[what]:.4g}, at most {target['most']}")


def main() -> int:
    arguments = command_line(
        __doc__,
        quick="a tiny model, to test the benchmark itself; targets do not apply",
        flags={"--compile": "models compiled by torch.compile"},
    )
    device = arguments.device
    load = workload(arguments.quick, device, arguments.compile)
    keep = lambda result: write_json(arguments.json, device, [result])  # noqa: E731
    result = run(load, device, arguments.rounds, arguments.quick, keep)
    show(result)
    return int(not arguments.quick and not all(target["pass"] for target in result["targets"]))


if __name__ == "__main__":
    sys.exit(main())
