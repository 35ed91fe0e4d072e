"""Inject faults into trainings of several ranks, and see whether training and record bear them.

    python -m benchmarks.parallel.faults [--count N] [--fatal N] [--meshes ddp:2,fsdp:2,...] [--json FILE] [--first N]

Each fault hits one rank: an exception in any part of the monitor, an interrupt, a full disk, a stop of the process for
longer than the monitor waits, no rows; or all of them, a step that the optimizer skips. Training has to be that without
the monitor, bit by bit, no case may hang, and the record has to load, to call no row valid that differs from that of an
undisturbed run, and to say what is missing. Many faults share a group of processes; a group that ends is started again
after the case that ended it. Others, in processes of their own: a rank is killed, or the server of the store; the
ranks that are left have to end, or go on, as they would without the monitor. The exit status is 1 if something was
wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastfs
from benchmarks.harness import file_option, write_json
from tests.helpers.fatal_cases import draw_fatal, run_fatal
from tests.helpers.fault_cases import LIMIT, Case, draw, judge, run_cases
from tests.helpers.processes import RankError, run_ranks

MESHES = "ddp:2,ddp:3,fsdp:2,fsdp:4,tp:2,tp_fsdp:4"
TOGETHER = 25  # cases of one group of processes


def undisturbed(mesh: str, world: int, folder: Path) -> Any:
    """Returns the table of a run without a fault."""
    folder.mkdir()
    case = Case(0, "none", mesh, "store", 0, 0)
    run_ranks(run_cases, world, cases=[asdict(case)], folder=str(folder), timeout=120)
    table = fastfs.load(folder / "0" / "record.jsonl")
    table = table[table["kind"] == "measured"]
    if not table["valid"].astype(bool).all():
        raise RuntimeError(f"{mesh}: the undisturbed run has rows that are not valid")
    return table


def run_group(cases: list[Case], world: int, folder: Path, expected: Any) -> list[dict[str, Any]]:
    """Runs cases of one mesh; returns what became of each."""
    results: list[dict[str, Any]] = []
    while cases:
        own = folder / f"from{cases[0].number}"
        own.mkdir()
        failure = ""
        try:
            run_ranks(run_cases, world, cases=[asdict(case) for case in cases], folder=str(own), timeout=600)
        except RankError as error:
            failure = str(error)
        done = [_lines(own / f"done.{rank}") for rank in range(world)]
        finished = min(map(len, done))
        for number, case in enumerate(cases[:finished]):
            reports = [lines[number] for lines in done]
            wrong = judge(own / str(case.number) / "record.jsonl", case, world, expected)
            wrong += ["training differs"] if not all(report["same"] for report in reports) else []
            fired = sum(report["fired"] for report in reports) > 0
            seconds = max(report["seconds"] for report in reports)
            results.append({**asdict(case), "world": world, "fired": fired, "seconds": seconds, "wrong": wrong})
        if failure and finished < len(cases):
            lost = asdict(cases[finished])
            results.append({**lost, "world": world, "fired": True, "seconds": LIMIT, "wrong": [failure[-6000:]]})
        cases = cases[finished + 1 :]
    return results


def _report(path: Path | None, meshes: str, results: list[dict[str, Any]]) -> None:
    """Prints and writes what has been found so far."""
    fired = [each for each in results if each["fired"]]
    wrong = [each for each in results if each["wrong"]]
    print(f"{len(results)} cases, {len(fired)} faults happened, {len(wrong)} wrong", flush=True)
    summary = {
        "meshes": meshes,
        "cases": len(results),
        "faults": len(fired),
        "wrong": len(wrong),
        "longest_seconds": max(each["seconds"] for each in results),
        "kinds": dict(Counter(each["kind"] for each in fired)),
        "places": dict(Counter(each["where"] for each in fired if each["kind"] in ("exception", "interrupt"))),
        "by_mesh": dict(Counter(f"{each['mesh']}:{each['world']}" for each in fired)),
    }
    write_json(path, torch.device("cpu"), [summary, *wrong])


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="number of faults")
    parser.add_argument("--fatal", type=int, default=40, help="number of faults after which a process is gone")
    parser.add_argument("--first", type=int, default=1, help="number of the first case, from which it is drawn")
    parser.add_argument("--meshes", default=MESHES, help="meshes of tests/helpers/parallel_cases.py, with ranks")
    parser.add_argument("--json", type=file_option, help="file of the results")
    given = parser.parse_args()
    meshes = [(name, int(world)) for name, _, world in (each.partition(":") for each in given.meshes.split(","))]
    results: list[dict[str, Any]] = []
    number, last = given.first, given.first + given.count
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = {each: undisturbed(*each, folder / f"undisturbed-{each[0]}{each[1]}") for each in meshes}
        for mesh, world in itertools.cycle(meshes):
            if number >= last:
                break
            cases = [draw(each, mesh, world) for each in range(number, min(last, number + TOGETHER))]
            results += run_group(cases, world, folder, expected[mesh, world])
            number += len(cases)
            _report(given.json, given.meshes, results)
        for number, (mesh, world) in zip(range(given.first, given.first + given.fatal), itertools.cycle(meshes)):
            case, own, began = draw_fatal(number, mesh, world), folder / f"fatal{number}", time.monotonic()
            own.mkdir()
            wrong = run_fatal(own, case, world, expected[mesh, world])
            seconds = time.monotonic() - began
            results.append({**asdict(case), "world": world, "fired": True, "seconds": seconds, "wrong": wrong})
            _report(given.json, given.meshes, results)
    failures = [each for each in results if each["wrong"]]
    for each in failures:
        print(json.dumps({k: v for k, v in each.items() if k != "wrong"}), *each["wrong"], sep="\n  ")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
