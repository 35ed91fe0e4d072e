"""Fuzz the monitor: random loops against a reference, writing forwards, failures and interrupts.

    python -m benchmarks.monitor.fuzz --loops 2000 --json benchmarks/results/fuzz-cpu.json
    python -m benchmarks.monitor.fuzz --loops 1 --first 1234       # one seed again, shrunk to the smallest failure

Counts loops, rows, valid rows and faults by ingredient. The exit status is 1 if there are faults. The tests run the
first hundred loops, and a sample of the calls and bytecodes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import count_option, file_option, print_table
from fastfs._bench.machine import environment
from fastfs._utils.json_output import write_json
from tests.fuzz.judge import judge
from tests.fuzz.recipe import Recipe, random_recipe, shrink
from tests.fuzz.setting import (
    MODES,
    Place,
    Run,
    Site,
    failing_at,
    faults_of_failure,
    faults_of_interrupt,
    interrupted_at,
    train,
)
from tests.fuzz.writing import altered, random_plan

SHRUNK = 50  # number of faults that are shrunk; further ones are reported as found


def loops(seeds: Iterable[int], say: Callable[[str], None]) -> dict[str, Any]:
    """Run random loops and compare them with the reference."""
    total: Counter[str] = Counter()
    by_ingredient: defaultdict[str, Counter[str]] = defaultdict(Counter)
    faults = []
    for seed in seeds:
        recipe = random_recipe(seed)
        verdict = judge(recipe)
        counts = verdict.counts + Counter(loops=1, **({"faulty loops": 1} if verdict.faults else {}))
        total += counts
        for ingredient in recipe.ingredients or ["nothing"]:
            by_ingredient[ingredient] += counts
        if verdict.faults:
            faults.append({"seed": seed, "recipe": str(recipe), "faults": verdict.faults[:3]})
            if len(faults) <= SHRUNK:
                kind = verdict.faults[0].split(":")[0]
                faults[-1]["smallest"] = str(shrink(recipe, lambda r, kind=kind: _of(kind, r)))  # type: ignore[misc]
            say(f"{faults[-1].get('smallest', recipe)}\n    {verdict.faults[0]}")
    parts = {name: dict(sorted(counts.items())) for name, counts in sorted(by_ingredient.items())}
    return {"total": dict(sorted(total.items())), "by ingredient": parts, "faults": faults}


def _of(kind: str, recipe: Recipe) -> bool:
    return any(fault.startswith(kind) for fault in judge(recipe).faults)


def writes(seeds: Iterable[int], say: Callable[[str], None]) -> dict[str, Any]:
    """Run random forwards that write to tensors of training."""
    done, faults = 0, []
    for seed in seeds:
        plan = random_plan(seed)
        done += 1
        if found := altered(plan):
            faults.append({"seed": seed, "plan": repr(plan), "faults": found[:1]})
            say(f"{plan}\n    {found[0]}")
    return {"total": {"modules": done, "altered": len(faults)}, "faults": faults}


def failures(stride: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Raise an error at the first execution of every call in the monitor's code."""
    result: dict[str, Any] = {"total": Counter(), "faults": []}
    for mode in MODES:
        seen: list[Site] = []
        train(mode, around=lambda _, seen=seen: failing_at(seen, None))  # type: ignore[misc]
        off, told = train(mode), set()
        for number, site in enumerate(seen):
            if site not in told:
                told.add(site)
                if len(told) % stride == 0:
                    _note(result, mode, faults_of_failure(mode, off, number), say)
    return result


def interrupts(stride: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Interrupt at every bytecode, at its first and last execution."""
    result: dict[str, Any] = {"total": Counter(), "faults": []}
    for mode in MODES:
        seen: dict[Place, int] = {}
        train(mode, around=lambda _, seen=seen: interrupted_at(seen, None))  # type: ignore[misc]
        plain: dict[Any, Run] = {}
        for at, times in list(seen.items())[::stride]:
            for nth in sorted({0, times - 1}):
                _note(result, mode, faults_of_interrupt(mode, at, nth, plain), say)
    return result


def _note(result: dict[str, Any], mode: str, found: list[str], say: Callable[[str], None]) -> None:
    result["total"][f"{mode}: points"] += 1
    if found:
        result["total"][f"{mode}: faults"] += 1
        result["faults"].append({"mode": mode, "faults": found})
        say(f"{mode}: {found[0]}")


def report(part: str, found: dict[str, Any]) -> None:
    """Print the counts, in total and by ingredient."""
    print_table(part, ["", "number"], [[name, str(number)] for name, number in found["total"].items()])
    if rows := found.get("by ingredient"):
        columns = ["loops", "measured rows", "valid", "predicted rows", "decreases", "refused", "faulty loops"]
        print_table(
            f"{part} by ingredient",
            ["", *columns],
            [[name, *(str(counts.get(column, 0)) for column in columns)] for name, counts in rows.items()],
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, default=2000, help="random training loops")
    parser.add_argument("--writes", type=int, default=0, help="number of random forwards that write")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--failures", type=count_option, help="let every N-th call of the monitor fail, one at a time")
    parser.add_argument("--interrupts", type=count_option, help="interrupt at every N-th bytecode, one at a time")
    parser.add_argument("--json", type=file_option, help="write the results to this file")
    options = parser.parse_args(arguments)

    def say(text: str) -> None:
        print(text, flush=True)

    seeds = range(options.first, options.first + options.loops)
    modules = range(options.first, options.first + options.writes)
    parts: dict[str, Callable[[], dict[str, Any]]] = {"loops": lambda: loops(seeds, say)} if options.loops else {}
    if options.writes:
        parts["writing forwards"] = lambda: writes(modules, say)
    if options.failures:
        parts["failures"] = lambda: failures(options.failures, say)
    if options.interrupts:
        parts["interrupts"] = lambda: interrupts(options.interrupts, say)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = []
    try:
        for part, take in parts.items():
            started = time.perf_counter()
            found = take()
            results.append({"part": part, "seconds": round(time.perf_counter() - started, 1), **found})
            report(part, found)
            _write(options.json, results)
    finally:
        torch.set_num_threads(threads)
    return 1 if any(result["faults"] for result in results) else 0


def _write(path: Path | None, results: list[dict[str, Any]]) -> None:
    if path is not None:
        write_json(path, {"environment": environment(torch.device("cpu")), "results": results})


if __name__ == "__main__":
    sys.exit(main())
