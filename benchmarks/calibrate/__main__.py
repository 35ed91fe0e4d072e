"""Train eight small models with calibrated rates and with each rate of a grid, at three sizes.

    python -m benchmarks.calibrate --json benchmarks/results/calibrate-cpu.json

The file is replaced after each run, and a second call continues it. The loss of a run is the mean over the last tenth
of its steps, null if it diverged. The rule has one set of constants for all tasks. They were chosen on the same kinds
of models with other seeds (100, 101, 200 and 201) and mostly other sizes and numbers of steps: 64 wide, and to see how
rates depend on width also 32 wide; transformers of two blocks; 60 to 200 steps.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.calibrate.tasks import TASKS, Task
from fastfs import scaling
from fastfs._utils.output_files import write_whole

STEPS = 150
SEEDS = 5
SIZES = {"base": (1, 1), "wide": (4, 1), "deep": (1, 4)}
_DATA = 10_000  # offset of the seeds of the batches that trials see


def trained(task: Task, model: nn.Module, optimizers: list[Optimizer], seed: int) -> float | None:
    """Return the mean loss over the last tenth of the steps, or None if a loss is not finite."""
    torch.manual_seed(seed + 1)
    losses: list[float] = []
    for batch, _ in zip(task.batches(seed), range(STEPS), strict=False):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = task.loss(model, batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return None
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return statistics.mean(losses[-STEPS // 10 :])


def calibrated(task: Task, model: nn.Module, seed: int) -> tuple[list[Optimizer], dict[str, Any]]:
    """Return optimizers with calibrated rates, and what the calibration found and cost."""
    stream, seen = task.batches(seed + _DATA), list[Any]()

    def batch(step: int) -> Any:
        while len(seen) <= step:
            seen.append(next(stream))
        return seen[step]

    given = task.optimizers(model, 1e-3)
    found = scaling.calibrate(model, task.loss, batch, optimizer=given)
    for optimizer in given:
        optimizer.param_groups = found.groups(optimizer)
    about = {"rate": found.rate, "factor": found.factor, "largest_rate": found.largest_rate, "steps": found.steps}
    trials = [[t.rate, t.factor, t.steps, t.loss if math.isfinite(t.loss) else t.reason] for t in found.trials]
    return given, {**about, "trials": trials}


def runs(seeds: int) -> Iterator[tuple[str, str, int, float | None]]:
    """Yield what to run: task, size, seed, and a rate of the grid or None for the calibrated run."""
    for sizes in (["base"], [name for name in SIZES if name != "base"]):
        for seed in range(seeds):
            for task in TASKS.values():
                for size in sizes:
                    for rate in (None, *task.grid):
                        yield task.name, size, seed, rate


def run(name: str, size: str, seed: int, rate: float | None) -> dict[str, Any]:
    """Return the entry of one run."""
    task = TASKS[name]
    torch.manual_seed(seed)
    model = task.model(*SIZES[size])
    entry: dict[str, Any] = {"task": name, "size": size, "seed": seed, "lr": rate}
    if rate is not None:
        return {**entry, "loss": trained(task, model, task.optimizers(model, rate), seed)}
    optimizers, found = calibrated(task, model, seed)
    return {**entry, "loss": trained(task, model, optimizers, seed), "calibration": found}


def summary(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per task and size, over the seeds of which all runs are done; a diverged run has infinite loss."""
    rows = []
    for task in TASKS.values():
        for size in SIZES:
            mine = [r for r in done if (r["task"], r["size"]) == (task.name, size)]
            loss = {(r["seed"], r["lr"]): math.inf if r["loss"] is None else r["loss"] for r in mine}
            rates = (None, *task.grid)
            seeds = [s for s in sorted({r["seed"] for r in mine}) if all((s, lr) in loss for lr in rates)]
            if not seeds:
                continue
            means = {lr: statistics.mean(loss[s, lr] for s in seeds) for lr in rates}
            best = min(task.grid, key=lambda lr: means[lr])
            ours, theirs = ([loss[s, lr] for s in seeds] for lr in (None, best))
            steps = [r["calibration"]["steps"] for r in mine if r["lr"] is None and r["seed"] in seeds]
            rows.append(
                {
                    "task": task.name,
                    "size": size,
                    "seeds": len(seeds),
                    "calibrated": _finite(means[None]),
                    "calibrated_spread": _spread(ours),
                    "best_grid_lr": best,
                    "best_grid": _finite(means[best]),
                    "best_grid_spread": _spread(theirs),
                    "wins": sum(a <= b for a, b in zip(ours, theirs, strict=True)),
                    "at_least_as_low": means[None] <= means[best],
                    "calibration_steps": statistics.mean(steps),
                    "grid_steps": STEPS * len(task.grid),
                }
            )
    return rows


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path: Path = arguments.json
    done = json.loads(path.read_text())["runs"] if path.exists() else []
    keys = {(r["task"], r["size"], r["seed"], r["lr"]) for r in done}
    for key in runs(arguments.seeds):
        if key in keys:
            continue
        start = time.perf_counter()
        done.append({**run(*key), "seconds": round(time.perf_counter() - start, 2)})
        print(*key, done[-1]["loss"], flush=True)
        rows = summary(done)
        about = {"torch": str(torch.__version__), "steps": STEPS, "sizes": SIZES}
        lines = ",\n".join(json.dumps(r) for r in done)
        head = json.dumps({**about, "summary": rows}, indent=1)
        write_whole(path, (head[:-2] + f',\n "runs": [\n{lines}\n]}}\n').encode())
    for row in summary(done):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
