"""Compare predicted speeds and their factors with speeds that were measured, on the trainings of ``fastfs demo``.

    python -m benchmarks.monitor.predictions [--json FILE] [--steps N] [--seeds N] [--quick]

Three monitors watch the same training: one measures every step, and two predict between measured steps that are 5 and
20 apart. The report shows a predicted speed with a factor, or withholds it (docs/validity.md). This counts how often
the speed was within the factor.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastfs
from benchmarks.harness import command_line, count_option, print_table, write_json
from fastfs._record.reading.confidence import LARGEST_FACTOR
from fastfs._report.grids import Grid, judge_predictions, make_grid
from fastfs._reproduce.demo import TASKS, Task

EVERY = (5, 20)


def run(task: Task, steps: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Train once, and judge the predictions of each distance of measured steps."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = task.optimizer(model)
    paths = {every: folder / f"{task.name}-{seed}-{every}.jsonl" for every in (1, *EVERY)}
    monitors = [
        fastfs.Monitor(model, optimizer, every=every, aligned_every=1, path=path, verbose=False, alerts=())
        for every, path in paths.items()
    ]
    batches, _ = task.batches()
    for inputs, targets in itertools.islice(batches, steps):
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        optimizer.step()
    for monitor in monitors:
        monitor.close()
    truth = _grid(fastfs.load(paths[1]), "measured", ("update_rms",))
    return [{"model": task.name, "seed": seed, "every": every, **_judge(paths[every], truth)} for every in EVERY]


def _grid(table: Any, kind: str, columns: tuple[str, ...]) -> Grid:
    return make_grid(table, int(table["layer"].max()) + 1, columns, (table["kind"] == kind).to_numpy())


def _judge(path: Path, truth: Grid) -> dict[str, Any]:
    table = fastfs.load(path)
    measured, predicted = _grid(table, "measured", ()), _grid(table, "predicted", ("update_rms",))
    judged = judge_predictions(table, measured, predicted, (table["kind"] == "measured").to_numpy())
    true = np.where(truth.invalid, np.nan, truth.columns["update_rms"])[:, predicted.steps]
    off = np.abs(np.log(true / predicted.columns["update_rms"]))
    known = judged.given & np.isfinite(off)
    shown = known & ~judged.withheld
    inside = off <= np.log(judged.factors, where=np.isfinite(judged.factors), out=np.zeros_like(judged.factors))
    withheld = known & judged.withheld
    return {
        "predictions": int(known.sum()),
        "shown": _rounded(shown.sum() / max(1, known.sum())),
        "within the factor": _rounded(inside[shown].mean()) if shown.any() else None,
        "median factor": _rounded(np.median(judged.factors[shown])) if shown.any() else None,
        "80 % of the shown are within": _within(off[shown]),
        "80 % of the withheld are within": _within(off[withheld]),
    }


def _within(off: Any) -> float | None:
    return _rounded(np.exp(np.quantile(off, 0.8))) if off.size else None


def _rounded(value: Any) -> float:
    return round(float(value), 3)


def main() -> int:
    arguments = command_line(
        __doc__,
        quick="few steps, to test the benchmark itself",
        options={
            "--steps": {"type": count_option, "help": "steps of each training; default is that of the demo"},
            "--seeds": {"type": count_option, "default": 2, "help": "trainings of each model"},
        },
    )
    torch.set_num_threads(1)  # as in the demo
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for task in TASKS.values():
            for seed in range(1 if arguments.quick else arguments.seeds):
                steps = 45 if arguments.quick else arguments.steps or task.steps
                results += run(task, steps, seed, Path(folder))
                write_json(arguments.json, arguments.device, results)
    columns = list(results[0])
    shown = [["" if row[key] is None else str(row[key]) for key in columns] for row in results]
    print_table(f"Predicted speeds, withheld above a factor of {LARGEST_FACTOR:g}", columns, shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
