"""Audit of the audit: scaling bugs that an alert has to name, and clean loops of which none may raise one.

    python -m benchmarks.parallel.audit [--json FILE] [--runs N] [--quick]

Bugs and loops on two ranks run in two processes (gloo). It exits with 1 if a bug was missed, its ratio is off by more
than 1 %, its likely cause is not named, or a clean loop has raised an alert.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.harness import count_option, environment, file_option, print_table
from benchmarks.parallel.clean_loops import clean_loop, run_clean, run_clean_loops
from benchmarks.parallel.scaling_bugs import BUGS, UNSEEN, run_loops
from fastfs._utils.json_output import write_json
from fastfs.monitor import GradientScale, Record
from tests.helpers.processes import run_ranks

PRECISION = 0.01
ON_TWO = 24  # of the clean loops
RATIOS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
FIRST = 5000  # seed: others than those with which thresholds were chosen


def run_bugs(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Runs loops by name and judges them."""
    every, found = BUGS | UNSEEN, {}
    for ranks in (1, 2):
        own = [name for name in names if every[name].ranks == ranks]
        options: dict[str, Any] = {"names": own, "alerts": [GradientScale()]}
        results = run_loops(**options) if ranks == 1 else _on_two("benchmarks.parallel.scaling_bugs:run_loops", options)
        for name, result in zip(own, results, strict=True):
            raised, bug = result["raised"], every[name]
            ratio, message = raised[0] if raised else (None, "")
            error = None if ratio is None else abs(ratio / bug.ratio - 1.0)
            if name in BUGS:
                passed = error is not None and error <= PRECISION and bug.said in message and len(raised) == 1
            else:
                passed = not raised
            found[name] = {
                "ranks": ranks,
                "ratio": bug.ratio,
                "found": ratio,
                "error": error,
                "scales": result["scales"],
                "message": message,
                "passed": passed,
            }
    return found


def run_clean_ones(seeds: Sequence[int], on_two: Sequence[int]) -> dict[str, Any]:
    """Runs clean loops and counts what was raised and judged."""
    alerts = [GradientScale()]
    records = run_clean_loops(seeds, alerts)
    if on_two:
        options = {"seeds": list(on_two), "alerts": alerts}
        records += _on_two("benchmarks.parallel.clean_loops:run_clean_loops", options)
    raised = []
    for seed, own in zip([*seeds, *on_two], records, strict=True):
        raised += [{"seed": seed, **record.scalars} for record in own if record.kind == "alert"]
    scales = [r.scalars["gradient_scale"] for own in records for r in own if r.kind == "measured"]
    known = [scale for scale in scales if isinstance(scale, float)]
    away = sum(abs(scale - 1.0) > GradientScale().tolerance for scale in known)
    return {
        "runs": len(records),
        "on two ranks": len(on_two),
        "measured steps": len(scales),
        "with a scale": len(known),
        "scale is off by more than 10 %": away,
        "alerts": len(raised),
        "raised": raised,
    }


def _on_two(place: str, options: dict[str, Any]) -> list[Any]:
    found: list[Any] = run_ranks(place, 2, timeout=900, **options)[0]
    return found


def run_power(seeds: Sequence[int]) -> dict[str, Any]:
    """Says in how many loops a wrong scale would be found: the records of clean ones, scaled, given to the rule."""
    found, small = dict.fromkeys(RATIOS, 0), dict.fromkeys(RATIOS, 0)
    number = 0
    for seed in seeds:
        loop = replace(clean_loop(seed), clip=None)
        slow = loop.speed <= (1e-3 if loop.optimizer == "adamw" else 0.03) and (loop.rows or 64) >= 64
        number += slow
        sink = run_clean(loop, ())
        for ratio in RATIOS:
            rule = GradientScale()
            checks = [rule.check(_scaled(r, ratio), sink.header) for r in sink.records if r.kind == "measured"]
            raised = any(finding is not None for check in checks for finding in check.values())
            found[ratio] += raised
            small[ratio] += raised and slow
    names = {ratio: f"{ratio:g}" for ratio in RATIOS}
    return {
        "runs": {"runs": len(seeds), "found": {names[ratio]: found[ratio] for ratio in RATIOS}},
        # At most a thirtieth of the largest stable rate, 1e-3 for AdamW, and 64 rows or more.
        "of these, with small steps": {"runs": number, "found": {names[ratio]: small[ratio] for ratio in RATIOS}},
    }


def _scaled(record: Record, ratio: float) -> Record:
    columns, scalars = dict(record.columns), dict(record.scalars)
    columns["residual"] = [None if x is None else 1.0 - ratio * (1.0 - x) for x in columns["residual"]]
    for name in ("residual_se", "aligned_decrease"):
        columns[name] = [None if x is None else ratio * x for x in columns[name]]
    if isinstance(scalars["gradient_scale"], float):
        scalars["gradient_scale"] *= ratio
    return replace(record, columns=columns, scalars=scalars)


def main() -> int:
    """Runs everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=file_option, help="write the results to this file")
    parser.add_argument("--runs", type=count_option, default=200, help="number of clean loops")
    parser.add_argument("--quick", action="store_true", help="12 clean loops")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = 12 if options.quick else options.runs
    on_two = min(ON_TWO, runs // 3)
    started = time.perf_counter()
    bugs = run_bugs([*BUGS, *UNSEEN])
    middle = time.perf_counter()
    clean = run_clean_ones(range(FIRST, FIRST + runs - on_two), range(FIRST + runs, FIRST + runs + on_two))
    power = run_power(range(FIRST + 1000, FIRST + 1000 + runs // 2))
    rows = [
        [name, f"{each['ratio']:.4g}", "-" if each["found"] is None else f"{each['found']:.4g}", str(each["passed"])]
        for name, each in bugs.items()
    ]
    print_table("scale of the gradients", ["loop", "made", "alert", "passed"], rows)
    print({key: value for key, value in clean.items() if key != "raised"})
    print(power)
    passed = not clean["alerts"] and all(each["passed"] for each in bugs.values())
    if options.json:
        result = {
            "environment": environment(torch.device("cpu")),
            "passed": passed,
            "seconds": {"bugs": middle - started, "clean": time.perf_counter() - middle},
            "bugs": {name: bugs[name] for name in BUGS},
            "not visible": {name: bugs[name] for name in UNSEEN},
            "clean": clean,
            "wrong scale in clean loops without clipping": power,
        }
        write_json(options.json, result)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
