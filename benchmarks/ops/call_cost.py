"""Measure the host time of calls, beside that of another version of fastfs.

    python -m benchmarks.ops.call_cost [--device cuda] [--against FOLDER] [--json FILE] [--rounds N] [--predicted]

FOLDER holds a checkout of another version with its native core built in place (`python setup.py build_ext --inplace`).
Both versions run the same calls (benchmarks/ops/call_cost_cases.py), each in its own process, alternating; figures are
medians over the rounds, and ratios are medians of the ratios within a round. Tensors are tiny and one thread is used,
so that the overhead is measured rather than the sums. With --predicted, the benchmark measures what a predicted step
(`aligned_every=1`) adds to training: processor time of the training thread, medians over alternating blocks of steps
with and without a monitor.

On a GPU, the target of feature_stats on 100 layers is 40 us including the launch; exit status 1 if it is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import count_option, device_option, file_option, print_table, write_json

CASES = Path(__file__).with_name("call_cost_cases.py")
HERE = Path(__file__).resolve().parents[2]
TARGET = ("feature_stats, 100 layers", 40.0)

Costs = dict[str, float]


def run_cases(folder: Path, device: torch.device, *chosen: str) -> Costs:
    """Run the cases in one process with the fastfs of a folder.

    Raises:
        RuntimeError: the process fails, or imports fastfs from elsewhere.
    """
    found = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CASES), str(device), *chosen]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    if done.returncode != 0:
        raise RuntimeError(f"the calls failed with the fastfs of {folder}:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    if Path(found.pop("folder")).resolve() != folder.resolve():
        raise RuntimeError(f"expected the fastfs of {folder}: is it a checkout with its native core built in place?")
    return found


def measure(folders: dict[str, Path], device: torch.device, rounds: int, *chosen: str) -> dict[str, list[Costs]]:
    """Return the costs of every round per version, alternating between versions."""
    found: dict[str, list[Costs]] = {name: [] for name in folders}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} ...", file=sys.stderr, flush=True)
        for name, folder in folders.items():
            found[name].append(run_cases(folder, device, *chosen))
    return found


def rows(found: dict[str, list[Costs]]) -> list[dict[str, Any]]:
    """Return the median cost per call and version, and the ratio of this version to the other."""
    table = []
    for case in found["now"][0]:
        row: dict[str, Any] = {"call": case}
        for name, costs in found.items():
            row[f"{name}, us"] = round(statistics.median(c[case] for c in costs), 2)
        if "before" in found:
            ratios = (a[case] / b[case] for a, b in zip(found["now"], found["before"], strict=True))
            row["now / before"] = round(statistics.median(ratios), 3)
        table.append(row)
    return table


def markdown(table: list[dict[str, Any]]) -> list[str]:
    """Format the rows as lines of a Markdown table."""
    return ["| " + " | ".join(str(cell) for cell in row.values()) + " |" for row in table]


def main() -> int:
    """Run both versions and report their costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_option, default=torch.device("cpu"))
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another version of fastfs, built in place")
    parser.add_argument("--json", type=file_option, help="write the results to this file")
    parser.add_argument("--rounds", type=count_option, default=5)
    parser.add_argument("--predicted", action="store_true", help="measure only what a predicted step adds")
    arguments = parser.parse_args()
    folders = {"now": HERE}
    if arguments.against is not None:
        if not (arguments.against / "fastfs" / "__init__.py").is_file():
            parser.error(f"--against: expected a checkout of fastfs, got {arguments.against}")
        folders["before"] = arguments.against.resolve()

    chosen = ["predicted"] if arguments.predicted else []
    table = rows(measure(folders, arguments.device, arguments.rounds, *chosen))
    columns = list(table[0])
    print_table("Host time of a call", columns, [[str(row[c]) for c in columns] for row in table])
    if arguments.predicted:
        write_json(arguments.json, arguments.device, table)
        return 0
    case, most = TARGET
    cost = next(row["now, us"] for row in table if row["call"] == case)
    missed = arguments.device.type == "cuda" and cost > most
    if arguments.device.type == "cuda":
        print(f"{'FAIL' if missed else 'PASS'}  {case}: {cost:.1f} us, at most {most:.0f}")
    write_json(arguments.json, arguments.device, table)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
