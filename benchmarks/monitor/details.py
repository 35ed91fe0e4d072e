"""Measure what ``Monitor(details=True)`` adds to measured steps.

    python -m benchmarks.monitor.details [--device cuda] [--json FILE] [--rounds N] [--quick]

The workload is that of ``benchmarks.monitor``. A plain loop, one that is measured at every step and one that is
measured with details alternate in one process. What details add at ``every=100`` is the difference between the two
measured steps, as a share of 100 plain ones: the median over the rounds. The replay check, which runs at every measured
step with details, is a part of it. The target is printed as PASS or FAIL, and decides the exit status at full size.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import command_line, print_table, write_json
from benchmarks.monitor.cost import compare
from benchmarks.monitor.trainings import DETAILED, MEASURED, PLAIN, Bench, workload

EVERY = 100
MOST = 0.01
NAMES = (PLAIN, MEASURED, DETAILED)


def main() -> int:
    arguments = command_line(__doc__, quick="a small model and few rounds, to test the benchmark itself")
    load = workload(arguments.quick, arguments.device, compiled=False)
    rounds = 2 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(load, arguments.device, Path(folder))
        times = compare(bench, list(NAMES), rounds, 1)
    added = [
        (detailed - measured) / plain / EVERY
        for plain, measured, detailed in zip(*(times[name] for name in NAMES), strict=True)
    ]
    rows = [
        {
            "implementation": name,
            "milliseconds": round(statistics.median(times[name]) * 1e3, 3),
        }
        for name in NAMES
    ]
    share = statistics.median(added)
    result: dict[str, Any] = {
        "workload": load.name,
        "parameters": bench.parameters,
        "rounds": rounds,
        "rows": rows,
        f"added at every={EVERY}": round(share, 5),
        "rounds of it": [round(each, 5) for each in added],
        "target": {"most": MOST, "pass": share <= MOST},
    }
    write_json(arguments.json, arguments.device, [result])
    columns = list(rows[0])
    print_table(load.name, columns, [[str(row[column]) for column in columns] for row in rows])
    print(f"{'PASS' if share <= MOST else 'FAIL'}  details add {share:.2%} at every={EVERY}, at most {MOST:.0%}")
    return 0 if arguments.quick or share <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
