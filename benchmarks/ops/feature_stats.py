"""Benchmark `fastfs.feature_stats` against a read of the same bytes, eager torch, torch.compile and Triton.

    python -m benchmarks.ops.feature_stats [--device cuda] [--json FILE] [--quick] [--only ladder,lists] [--match REGEX]

Parts: "ladder", one layer of 4 KiB to 4 GiB in four dtypes; "lists", 1 to 1000 layers; "rows", sums per row over the
width; "transformers", layer outputs of real shapes; "overhead", host time of a call.

Bandwidth counts the bytes of the three inputs, read once. The ceiling is a streaming read of the same tensors in the
same run; "copy" copies the features and counts the bytes of both sides. Inputs come from memory rather than the cache:
small inputs are copied until all copies are four times as large as the cache, and calls use the copies round-robin. The
sums of every implementation are checked against float64 before it is timed; errors are relative to the sum of the
absolute terms. On a GPU, implementations that launch many kernels are timed as replayed CUDA graphs. The result lists
excluded implementations with the reason. The exit status is 1 if a target is missed on a GPU at full size.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import fastfs
from benchmarks.harness import command_line, side_by_side, thread_counts, write_json
from benchmarks.ops.graphs import as_graphs
from benchmarks.ops.implementations import Implementation, select_implementations, triton_kernels
from benchmarks.ops.show import show
from benchmarks.ops.targets import show_targets, targets
from benchmarks.ops.workloads import DTYPES, LADDER, LISTS, PARTS, ROWS, TRANSFORMERS, Workload, size_name, workloads
from fastfs._bench import ceilings
from fastfs._bench.comparison import OURS, attempt, ranking
from fastfs._bench.expected import ALLOWED, ExpectedSums, expected_sums
from fastfs._bench.inputs import Inputs, RoundRobin, copies_for
from fastfs._bench.machine import cache_bytes, free_bytes

OVERHEAD = "overhead"
MOST_SECONDS = {"cpu": 1.0, "cuda": 0.5}  # largest duration of a call; slower implementations are excluded
SLOW = 0.02  # seconds per call on a GPU above which each call is timed by itself
BUDGET = 0.5  # seconds for the rounds of an implementation, after the third
COMPILE_SECONDS, QUICK_SECONDS = 90.0, 12.0
# Cumulative shares of the time for compiling; a part inherits what an earlier one has not used.
SHARES = {LADDER: 0.45, LISTS: 0.7, ROWS: 0.85, TRANSFORMERS: 1.0}


class Budget:
    """Time budget for compiling."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.allowed = seconds
        self.spent = 0.0

    def why_not(self) -> str | None:
        """Return why nothing more is compiled now, or None."""
        if self.spent < self.allowed:
            return None
        return f"the {self.allowed:.0f} s for compiling up to here are used up (--compile-seconds)"


def prepare(
    name: str,
    implementation: Implementation,
    copies: list[Inputs],
    expected: ExpectedSums,
    device: torch.device,
    budget: Budget,
) -> tuple[list[Callable[[], object]], dict[str, Any], str | None]:
    """Prepare and check an implementation.

    Returns:
        Its calls, one per copy; facts to report; and why it is excluded, or None.

    Raises:
        AssertionError: fastfs is wrong or cannot be called.
    """
    if implementation.compiles and (why := budget.why_not()):
        return [], {}, why
    began = time.perf_counter()
    call, _, why = attempt(lambda: implementation.prepare(copies[0]), device)
    first = None
    if why is None:
        first, _, why = attempt(call, device, MOST_SECONDS[device.type], compiles=implementation.compiles)
    seconds = time.perf_counter() - began
    if implementation.compiles:
        budget.spent += seconds
    if why is not None:
        if name == OURS:
            raise AssertionError(f"fastfs: {why}")
        return [], {}, why
    error: Any = expected.error(first) if implementation.checked and first is not None else None
    if name == OURS and not error <= ALLOWED:
        raise AssertionError(f"fastfs is off by {error:.1e}, allowed is {ALLOWED:.0e}")
    calls: Any = [call, *(implementation.prepare(inputs) for inputs in copies[1:])]
    timed_as = "calls"
    if device.type == "cuda" and implementation.graph:
        calls, timed_as = as_graphs(calls)
    return calls, {"error": error, "timed as": timed_as, "first call, s": round(seconds, 3)}, None


def repeats(workload: Workload, device: torch.device, slowest: float) -> int:
    """Return the calls per measurement: enough for the clock, and few enough for the GPU's queue."""
    if device.type == "cuda":
        return 1 if slowest > SLOW else 10 if workload.bytes < 2**25 else 5
    return max(1, min(100, 2**25 // workload.bytes))


def bandwidth(workload: Workload, device: torch.device, rounds: int, budget: Budget, triton: Any) -> dict[str, Any]:
    """Time one workload: milliseconds, GB/s, fraction of the ceiling and speedup of fastfs for every implementation."""
    copies = workload.inputs(device, copies_for(workload.bytes, cache_bytes(device)))
    rotation = RoundRobin(len(copies))
    expected = expected_sums(copies[0], per_row=workload.per_row)
    torch._dynamo.reset()  # otherwise the graphs of all workloads count towards one recompilation limit
    calls: dict[str, Callable[[], object]] = {
        ceilings.READ: rotation.over([ceilings.streaming_read(inputs) for inputs in copies])
    }
    moved, about, slowest = {}, {}, 0.0
    if workload.part == LADDER:
        made = [ceilings.copy(inputs) for inputs in copies]
        calls[ceilings.COPY], moved[ceilings.COPY] = rotation.over([call for call, _ in made]), made[0][1]
    found, left_out = select_implementations(workload, device, triton)
    for name, implementation in found.items():
        ready, told, why = prepare(name, implementation, copies, expected, device, budget)
        if why is not None:
            left_out[name] = why
        else:
            calls[name], about[name] = rotation.over(ready), told
            slowest = slowest if implementation.compiles else max(slowest, told["first call, s"])
    for name in set(calls) & set(found) - {OURS}:  # again, now that all have allocated their memory
        _, _, why = attempt(calls[name], device)
        if why is not None:
            left_out[name] = why
            del calls[name], about[name]
    repeat = repeats(workload, device, slowest)
    times = side_by_side(calls, device, rounds, repeat, BUDGET)
    rows = [{**row, **about.get(row["implementation"], {})} for row in ranking(times, workload.bytes, moved)]
    return {
        "part": workload.part,
        "workload": workload.name,
        "dtype": workload.dtype,
        "layers": len(workload.shapes),
        "shapes": sorted(set(workload.shapes)),
        "per row": workload.per_row,
        "bytes": workload.bytes,
        "cut": workload.cut,
        "copies": len(copies),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "rounds": rounds,
        "calls per round": repeat,
        "rows": rows,
        "left out": left_out,
    }


def overhead(device: torch.device, rounds: int) -> dict[str, Any]:
    """Microseconds of host time for a call on tiny tensors: one layer, and 100 layers."""
    result: dict[str, Any] = {"part": OVERHEAD, "workload": "call overhead, 8 x 8 float32", "microseconds": {}}
    for layers in (1, 100):
        x = [torch.randn(8, 8, device=device) for _ in range(layers)]
        arguments = x[0] if layers == 1 else x
        call = lambda a=arguments: fastfs.feature_stats(a, a, a)  # noqa: E731
        repeat = 2000 // layers
        times = side_by_side({OURS: call}, torch.device("cpu"), rounds, repeat)[OURS]
        result["microseconds"][f"{layers} layer" + "s" * (layers > 1)] = round(statistics.median(times) * 1e6, 2)
    return result


def measure_part(
    part: str,
    device: torch.device,
    rounds: int,
    largest: int,
    quick: bool,
    match: re.Pattern[str],
    budget: Budget,
    triton: Any,
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Measure the workloads of a part whose "name, dtype" matches, sorted by dtype and size.

    On the CPU, some are also measured with one thread.

    `keep` receives the results so far after each workload, so that none is lost.
    """
    results: list[dict[str, Any]] = []
    budget.allowed = budget.seconds * SHARES[part]
    for workload in workloads(part, device, largest=largest, free=free_bytes(device), quick=quick):
        if match.search(f"{workload.name}, {workload.dtype}") is None:
            continue
        both = part == LADDER and workload.bytes in range(2**27, 2**29) and workload.dtype in ("float32", "bfloat16")
        for _ in thread_counts(device) if both else [None]:
            print(f"{part}: {workload.name}, {workload.dtype}", file=sys.stderr, flush=True)
            results.append(bandwidth(workload, device, rounds, budget, triton))
            keep(results)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if part == LADDER:
        results.sort(key=lambda r: (list(DTYPES).index(r["dtype"]), r["bytes"]))
    return results


def chosen(only: str | None) -> list[str]:
    """Parse a list of parts such as "ladder,rows"; None means all.

    Raises:
        argparse.ArgumentTypeError: a part is unknown.
    """
    parts = [OVERHEAD, *PARTS]
    wanted = parts if only is None else only.split(",")
    if unknown := [name for name in wanted if name not in parts]:
        raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}; expected {', '.join(parts)}")
    return [name for name in parts if name in wanted]


def main() -> int:
    """Run the parts that the command line requests.

    Returns:
        The exit status.
    """
    options: dict[str, dict[str, Any]] = {
        "--only": {"type": chosen, "default": chosen(None), "help": "parts, such as ladder,rows"},
        "--match": {"type": re.compile, "default": "", "help": "regular expression for the workload and its dtype"},
        "--largest": {"type": int, "help": "bytes of the largest inputs; 4 GiB on a GPU, 1 GiB on the CPU"},
        "--compile-seconds": {"type": float, "help": "approximate seconds for compiling; 90, or 12 with --quick"},
    }
    arguments = command_line(__doc__, quick="tiny workloads, to test the benchmark itself", options=options)
    device = arguments.device
    wanted = arguments.largest or (2**32 if device.type == "cuda" else 2**30)
    largest = min(wanted, free_bytes(device) // 10)
    if largest < 2**32 and not arguments.quick:
        why = "a tenth of the free memory" if largest < wanted else "--largest"
        print(f"inputs of more than {size_name(largest)} are skipped ({why})")

    began = time.perf_counter()
    seconds = QUICK_SECONDS if arguments.quick else COMPILE_SECONDS
    budget, triton = Budget(arguments.compile_seconds or seconds), triton_kernels(device)
    results: list[dict[str, Any]] = []

    def keep(more: list[dict[str, Any]]) -> None:
        write_json(arguments.json, device, results + more)

    for part in arguments.only:
        if part == OVERHEAD:
            results.append(overhead(device, arguments.rounds))
            print(f"call overhead: {results[0]['microseconds']} (microseconds)")
        else:
            measured = measure_part(
                part, device, arguments.rounds, largest, arguments.quick, arguments.match, budget, triton, keep
            )
            show(part, measured)
            results += measured
        keep([])
    asked = device.type == "cuda" and not arguments.quick
    found = targets(results)
    show_targets(found, asked)
    print(f"{time.perf_counter() - began:.0f} s, {budget.spent:.0f} of them compiling")
    return 1 if asked and any(target.passed is False for target in found) else 0


if __name__ == "__main__":
    sys.exit(main())
