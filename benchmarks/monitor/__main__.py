"""What does `fastfs.Monitor` cost: the same training loop with the monitor and without, and the naive way beside it.

    python -m benchmarks.monitor [--device cuda] [--compile] [--json FILE] [--quick]

Identical models are trained in one process and take turns in blocks of steps, in an order that is drawn anew in every
round; what is reported are medians, and medians of the ratios to the plain loop within a round. "plain, again" is a
second plain loop: its ratio says how well the others are known. Before anything is timed it is checked that parameters
are bitwise equal with the monitor and without, and that the naive way finds the same angles. With --compile all models
are compiled by torch.compile, the plain one too; the naive way is then in the check alone, in eager torch.

Peak memory is that of building the training and its first two steps, outside of the timing. On the CPU every storage
that an operator of torch returns is counted for as long as it lives (a TorchDispatchMode sees them; what kernels take
for themselves while they run is not seen), but not those inside compiled code. On CUDA it is what the allocator says.
There, too, are counted: how often a step waits for the device, and copies from it.

Targets are printed as PASS or FAIL; exit status 1 if one is missed at full size.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import command_line, median_ratio, print_table, write_json
from benchmarks.monitor.check import check
from benchmarks.monitor.cost import Traffic, compare, peak_bytes, traffic, window
from benchmarks.monitor.trainings import (
    AGAIN,
    ALIGNED,
    AMPLIFIED,
    EVERY,
    JVP,
    MEASURED,
    NAIVE,
    OFF,
    PLAIN,
    PROBE,
    WINDOW,
    Bench,
    Workload,
    workload,
)


def say(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


def run(load: Workload, device: torch.device, rounds: int, quick: bool) -> dict[str, Any]:
    """All rows of the table."""
    on_gpu = device.type == "cuda"
    few = [PLAIN, AGAIN, OFF, ALIGNED]
    many = [PLAIN, MEASURED, AMPLIFIED, JVP, PROBE, *([] if load.compiled else [NAIVE])]
    with tempfile.TemporaryDirectory() as folder:
        say("checking that nothing changes, and the naive way")
        errors = check(Bench(load.smaller(4) if on_gpu else load, device, Path(folder)))
        torch.compiler.reset()  # what was compiled for other sizes, and without fused attention
        bench = Bench(load, device, Path(folder))
        say("memory")
        peaks: dict[str, int | None] = dict.fromkeys(few + many)
        if on_gpu or not load.compiled:
            peaks = {name: peak_bytes(lambda n=name: bench.training(n), device) for name in peaks}  # type: ignore[misc]
        say("waits and copies")
        flows = traffic(bench, [name for name in dict.fromkeys(few + many) if name != NAIVE])
        say("steps that are not measured")
        cheap = compare(bench, few, 2 * rounds + 4, 20 if on_gpu else 3)
        say("measured steps")
        dear = compare(bench, many, rounds, 5 if on_gpu else 1)
        say("a window of 100 steps")
        with_monitor, without = window(bench, 100, 5 if quick else 4)

    rows = []

    def add(name: str, seconds: float, ratio: float) -> None:
        rows.append({
            "contestant": name,
            "milliseconds": round(seconds * 1e3, 4),
            "ratio": round(ratio, 4),
            "overhead percent": round(100 * (ratio - 1), 2),
            **_memory(peaks.get(name), peaks[PLAIN]),
            **_flow(None if flows is None else flows.get(name)),
        })  # fmt: skip

    for name in few:
        add(name, statistics.median(cheap[name]), median_ratio(cheap, name, PLAIN))
    ratio = (99 * median_ratio(cheap, OFF, PLAIN) + median_ratio(dear, MEASURED, PLAIN)) / 100
    add(EVERY, ratio * statistics.median(cheap[PLAIN]), ratio)
    add(WINDOW, with_monitor, with_monitor / without)
    for name in many[1:]:
        add(name, statistics.median(dear[name]), median_ratio(dear, name, PLAIN))
    return {
        "workload": load.name,
        "parameters": bench.parameters,
        "threads": None if on_gpu else torch.get_num_threads(),
        "rounds": rounds,
        "naive way and monitor differ by": errors,
        "rows": rows,
        "targets": targets({row["contestant"]: row for row in rows}, device),
    }


def _memory(peak: int | None, plain: int | None) -> dict[str, float]:
    if peak is None or plain is None:
        return {}
    return {"peak MiB": round(peak / 2**20, 1), "more than plain MiB": round((peak - plain) / 2**20, 1)}


def _flow(flow: Traffic | None) -> dict[str, float | None]:
    return {
        "host synchronisations per step": None if flow is None else flow.waits,
        "copies to the host per step": None if flow is None else flow.copies,
    }


def targets(rows: dict[str, dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """What the monitor may cost, and whether it keeps to it."""
    most = {EVERY: 1.01, ALIGNED: 1.01 if device.type == "cuda" else 1.02, MEASURED: 1.5}
    found = [_target(name, "ratio", rows[name]["ratio"], x) for name, x in most.items()]
    if device.type == "cuda":
        waits = "host synchronisations per step"
        found += [
            _target(name, "more " + waits, rows[name][waits] - rows[PLAIN][waits], 0)
            for name in (OFF, ALIGNED, MEASURED)
        ]
    return found


def _target(contestant: str, what: str, value: float, most: float) -> dict[str, Any]:
    return {"contestant": contestant, "most": most, what: value, "pass": value <= most}


def show(result: dict[str, Any]) -> None:
    columns = ["", "ms a step", "ratio to plain", "peak MiB", "more than plain MiB", "waits", "copies to host"]
    keys = ["peak MiB", "more than plain MiB", "host synchronisations per step", "copies to the host per step"]
    rows = [
        [
            row["contestant"],
            f"{row['milliseconds']:.2f}",
            f"{row['ratio']:.4f}",
            *("" if row.get(key) is None else f"{row[key]:.1f}" for key in keys),
        ]
        for row in result["rows"]
    ]
    threads = f", threads: {result['threads']}" if result["threads"] else ""
    print_table(f"{result['workload']}, {result['parameters'] / 1e6:.1f}M parameters{threads}", columns, rows)
    for target in result["targets"]:
        (what,) = target.keys() - {"contestant", "most", "pass"}
        verdict = "PASS" if target["pass"] else "FAIL"
        print(f"{verdict}  {target['contestant']}: {what} {target[what]:.4g}, at most {target['most']}")


def main() -> int:
    arguments = command_line(
        __doc__,
        quick="a tiny model: does the benchmark run; targets mean nothing",
        flags={"--compile": "models compiled by torch.compile"},
    )
    device = arguments.device
    result = run(workload(arguments.quick, device, arguments.compile), device, arguments.rounds, arguments.quick)
    show(result)
    if arguments.json:
        write_json(arguments.json, device, [result])
    return int(not arguments.quick and not all(target["pass"] for target in result["targets"]))


if __name__ == "__main__":
    sys.exit(main())
