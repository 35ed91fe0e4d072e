"""Measure how often ``fastfs.compare`` names a changed learning rate of one layer, and how often it is wrong.

    python -m benchmarks.compare.diff [--json FILE] [--seeds N]

For each model, optimizer and seed: a run, its twin, another seed of the same setting (with other data), and both again
with the learning rate of one layer times 1.1. Every 5th step is measured, 5 in all. Compared are:

* twins: the run and its twin; the records have to be equal in every number.
* twin, changed: a detection names the layer at one of the first two measured steps.
* seeds: nothing may part, in all layers, quantities and steps.
* seeds, changed: as above; nothing is promised here.
* late: seeds and twins of which the first measured step, before which twins are equal, is missing.
* 3 seeds: three runs of the setting against three others, and against three with the changed layer. Each run is in
  three such groups.

The exit status is 1 if fewer than 95 % of the changed twins are detected, or more than 5 % of comparisons of equal
settings raise an alarm.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare.study import Batches, command_line, resumable, train
from benchmarks.harness import print_table
from fastfs._compare.compare import compare_runs
from fastfs._compare.runs import RecordedRun, read_runs
from fastfs._reproduce.data import digits, minibatches, stdlib_text, windows
from fastfs.models import MLP, ResNet, Transformer

FACTOR = 1.1
EVERY, MEASURED = 5, 5
BLOCK = 5  # seeds in a task
OTHER = 10_000  # between a seed and the other one of the same setting
PLAIN = ("transformer", "resnet", "mlp")
MODELS = (*PLAIN, "transformer, all layers", "transformer, 16 rows")
OPTIMIZERS = ("SGD", "AdamW", "Muon")
RATES = {"SGD": 0.1, "AdamW": 2e-3, "Muon": 0.02}


def make(model: str, seed: int) -> tuple[Any, Batches, dict[str, Any]]:
    """Return a model with blocks, its data, and the monitor's settings."""
    torch.manual_seed(seed)
    if model.startswith("transformer"):
        data = windows(stdlib_text(400_000), 4, 32, seed)
        settings: dict[str, Any] = {"rows": 16} if "rows" in model else {}
        if "all" in model:
            settings["layers"] = r"^(token|position|norm|head|blocks\.\d+(\.(norm_mlp|mlp_in|mlp_out|attention))?)$"
        return Transformer(vocabulary=256, width=32, depth=4, heads=2, context=32), data, settings
    network = ResNet(64, 48, 6, 10) if model == "resnet" else MLP(64, 48, 7, 10, output_std=0.1)
    return network, minibatches(*digits(), 64, seed), {}


def run(model: str, optimizer: str, seed: int, path: Path, changed: int | None = None) -> RecordedRun:
    """Train, and read the record."""
    network, batches, settings = make(model, seed)
    own = [] if changed is None else [p for p in network.blocks[changed].parameters() if _takes(optimizer, p)]
    ids = {id(parameter) for parameter in own}
    rest = [p for p in network.parameters() if id(p) not in ids and _takes(optimizer, p)]
    lr = RATES[optimizer]
    groups: list[dict[str, Any]] = [{"params": rest}, *([{"params": own, "lr": lr * FACTOR}] if own else [])]
    if optimizer == "SGD":
        made: torch.optim.Optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    else:
        made = torch.optim.AdamW(groups, lr=lr) if optimizer == "AdamW" else torch.optim.Muon(groups, lr=lr)
    train(network, made, batches, EVERY * (MEASURED - 1) + 1, path, every=EVERY, **settings)
    return read_runs([path])[0]


def _takes(optimizer: str, parameter: torch.nn.Parameter) -> bool:
    return optimizer != "Muon" or parameter.dim() == 2


def study(model: str, optimizer: str, block: int) -> dict[str, Any]:
    """Return what each comparison finds, for seeds of one block, which share the changed layer."""
    seeds = range(block * BLOCK, (block + 1) * BLOCK)
    layer = f"blocks.{block}"
    with tempfile.TemporaryDirectory() as folder:

        def runs(shift: int, changed: int | None = None) -> list[RecordedRun]:
            return [run(model, optimizer, s + shift, Path(folder, "record.jsonl"), changed) for s in seeds]

        first, twins, twins_changed = runs(0), runs(0), runs(0, block)
        others, others_changed = runs(OTHER), runs(2 * OTHER, block)
    found = {}
    for i, seed in enumerate(seeds):
        three = [(i + k) % BLOCK for k in range(3)]

        def group(of: list[RecordedRun], three: list[int] = three) -> list[RecordedRun]:
            return [of[k] for k in three]

        found[str(seed)] = {
            "twins": outcome([first[i], twins[i]], layer),
            "twin, changed": outcome([first[i], twins_changed[i]], layer),
            "seeds": outcome([first[i], others[i]], layer),
            "seeds, changed": outcome([first[i], others_changed[i]], layer),
            "late seeds": outcome(late([first[i], others[i]]), layer),
            "late twin, changed": outcome(late([first[i], twins_changed[i]]), layer),
            "3 seeds": outcome([*group(first), *group(others)], layer, against=3),
            "3 seeds, changed": outcome([*group(first), *group(others_changed)], layer, against=3),
        }
    return {"changed": layer, "found": found}


def late(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """Return the runs without their first measured step."""
    found = []
    for one in runs:
        grid = one.grid
        cut = {name: cells[:, 1:] for name, cells in grid.columns.items()}
        rest = dataclasses.replace(grid, steps=grid.steps[1:], loss=grid.loss[1:], invalid=grid.invalid[:, 1:])
        found.append(dataclasses.replace(one, grid=dataclasses.replace(rest, columns=cut)))
    return found


def outcome(runs: Sequence[RecordedRun], layer: str, against: int = 0) -> dict[str, Any]:
    """Return what parts first, and whether it is the changed layer at one of the first two steps."""
    comparison = compare_runs([dataclasses.replace(r, label=str(i)) for i, r in enumerate(runs)], against)
    first = comparison.first
    right = first is not None and first.layer.startswith(layer) and first.step <= comparison.steps[1]
    said = "" if first is None else str(first)
    return {
        "step": None if first is None else first.step,
        "parting": said,
        "detected": right,
        "equal": bool(comparison.equal),
    }


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the number of comparisons, alarms and detections, by comparison and by setting."""
    counts: dict[str, Any] = {}
    for result in results:
        each = [(name, one) for found in result["found"].values() for name, one in found.items()]
        for name, one in each:
            for key in (name, f"{name}: {result['model']}, {result['optimizer']}"):
                count = counts.setdefault(key, {"comparisons": 0, "parted": 0, "detected": 0, "equal": 0})
                count["comparisons"] += 1
                count["parted"] += one["step"] is not None
                count["detected"] += one["detected"]
                count["equal"] += one["equal"]
    return counts


def main() -> int:
    arguments = command_line(__doc__)
    torch.set_num_threads(1)
    tasks = [
        {"model": model, "optimizer": optimizer, "block": block}
        for block in range(-(-arguments.seeds // BLOCK))
        for model in MODELS
        for optimizer in OPTIMIZERS
        if model in PLAIN or optimizer == "AdamW"
    ]
    counts = resumable(arguments.json, tasks, study, summary)
    rows = [[name, *map(str, counts[name].values())] for name in sorted(counts)]
    print_table("Comparisons of runs", ["comparison", "number", "parted", "detected", "equal"], rows)
    null = [counts[name] for name in ("twins", "seeds", "late seeds", "3 seeds")]
    right = counts["twin, changed"]["detected"] >= 0.95 * counts["twin, changed"]["comparisons"]
    return int(not right or any(one["parted"] > 0.05 * one["comparisons"] for one in null))


if __name__ == "__main__":
    sys.exit(main())
