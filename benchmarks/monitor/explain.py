"""Count missed signs and false alarms of ``fastfs explain``: the trainings of the guide, and healthy ones, over seeds.

    python -m benchmarks.monitor.explain [--json FILE] [--seeds N]

A sign is missed if what ``fastfs explain`` says first of the training with something wrong is another paragraph than
that of its case. Everything that it says to change in a healthy training is a false alarm: the guide's trainings after
the change, and residual networks, MLPs and the transformer of the demo under other optimizers, widths and depths.
"""

from __future__ import annotations

import functools
import itertools
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fastfs
from benchmarks.harness import command_line, count_option, print_table, write_json
from fastfs._report.explain import explain
from fastfs._report.signs import CHANGE
from fastfs._reproduce.demo import TASKS

EXAMPLES = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples/diagnosis.py"))
Net, Variant = EXAMPLES["Net"], EXAMPLES["Variant"]
# A single record does not show what is missing between widths.
EXPECTED = {name: case.paragraph for name, case in EXAMPLES["CASES"].items() if isinstance(case.before, Variant)}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd 0.05": lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
    "momentum 0.02": lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4),
    "adamw 3e-4": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-4),
    "adamw 2e-3": lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1),
    "rmsprop 3e-4": lambda model: torch.optim.RMSprop(model.parameters(), lr=3e-4),
    "adafactor 1e-3": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-3),
}
MODELS = {
    "4 blocks of 128": functools.partial(Net, width=128, depth=4),
    "16 blocks of 32": functools.partial(Net, width=32, depth=16),
    "12 blocks without norm": functools.partial(Net, depth=12, scale=12**-0.5, norm=False),
}


def changes(record: Path) -> list[dict[str, Any]]:
    """Return what is to be changed in a run, the most severe first."""
    return [
        {"paragraph": sign.paragraph and sign.paragraph.anchor, "text": sign.text}
        for sign in explain(record)[1]
        if sign.severity >= CHANGE
    ]


def of_the_guide(seeds: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Train the cases of the guide, before and after the change."""
    for seed, (case, expected) in itertools.product(range(seeds), EXPECTED.items()):
        EXAMPLES["run"](case, folder, seed)
        before, after = (changes(folder / case / f"{which}.jsonl") for which in ("before", "after"))
        found = bool(before) and before[0]["paragraph"] == expected
        yield {"training": case, "seed": seed, "expected": expected, "found": found, "said": before}
        yield {"training": f"{case}, after the change", "seed": seed, "expected": None, "said": after}


def healthy(seeds: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Train healthy models."""
    for seed, (model, make), (optimizer, step) in itertools.product(range(seeds), MODELS.items(), OPTIMIZERS.items()):
        record = folder / "healthy.jsonl"
        EXAMPLES["train"](Variant(make, step), record, seed)
        yield {"training": f"{model}, {optimizer}", "seed": seed, "expected": None, "said": changes(record)}
    for seed, task in itertools.product(range(seeds), TASKS.values()):
        record = folder / f"{task.name}-{seed}.jsonl"
        torch.manual_seed(seed)
        network = task.model()
        rule = task.optimizer(network)
        with fastfs.Monitor(network, rule, every=5, path=record, verbose=False) as monitor:
            for inputs, targets in itertools.islice(task.batches()[0], 100):
                rule.zero_grad()
                loss = task.loss(network(inputs), targets)
                loss.backward()
                monitor.log(loss=loss)
                rule.step()
        yield {"training": f"demo, {task.name}", "seed": seed, "expected": None, "said": changes(record)}


def main() -> int:
    arguments = command_line(
        __doc__,
        quick="one seed, to test the benchmark itself",
        options={"--seeds": {"type": count_option, "default": 5, "help": "trainings of each kind"}},
    )
    torch.set_num_threads(1)
    seeds = 1 if arguments.quick else arguments.seeds
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for result in itertools.chain(of_the_guide(seeds, Path(folder)), healthy(seeds, Path(folder))):
            results.append(result)
            write_json(arguments.json, arguments.device, results)
    names = list(dict.fromkeys(result["training"] for result in results))
    rows = []
    for name in names:
        own = [result for result in results if result["training"] == name]
        right = sum(result["found"] if result["expected"] else not result["said"] for result in own)
        said = next((result["said"][0]["text"] for result in own if result["said"] and not result["expected"]), "")
        rows.append([name, own[0]["expected"] or "nothing", f"{right} of {len(own)}", said])
    print_table("What fastfs explain says first", ["training", "expected", "right", "otherwise"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
