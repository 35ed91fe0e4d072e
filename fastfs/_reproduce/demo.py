"""``fastfs demo``: two small monitored trainings on real data, side by side with unmonitored ones."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from fastfs._network.state import RandomState
from fastfs._record.reading.confidence import SHARE, overall_factor
from fastfs._report.grids import judge_predictions, make_grid
from fastfs._report.summary import STEP_TIME_RATIO, confidence_in_words
from fastfs._reproduce import data
from fastfs._reproduce.demo_text import print_meaning, print_next, print_result, training_progress
from fastfs._reproduce.step_times import step_time_ratio
from fastfs._utils import extras
from fastfs._utils.devices import repeatable_attention
from fastfs._utils.json_output import check_json_output, is_stdout, write_json
from fastfs._utils.output_files import write_whole
from fastfs.models import ResNet, Transformer
from fastfs.monitor import Monitor

if TYPE_CHECKING:
    import pandas

__all__ = ["TASKS", "OutputError", "Task", "run_demo", "run_task"]

_PICTURES = ("angle.png", "speed.png", "relative_update.png")
_PAGE = "report.html"
_MARK = "fastfs demo"
_SEED = 0
_CPU = torch.device("cpu")

Batch = tuple[Tensor, Tensor]


class OutputError(ValueError):
    """The output folder cannot be used."""


@dataclass(frozen=True)
class Task:
    """A training: its name, the functions that create its parts, and the optional packages that it needs."""

    name: str
    title: str
    steps: int
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    batches: Callable[[], tuple[Iterator[Batch], dict[str, Any]]]
    loss: Callable[[Tensor, Tensor], Tensor]
    packages: tuple[str, ...] = ("matplotlib", "pandas")


def _text() -> tuple[Iterator[Batch], dict[str, Any]]:
    text = data.stdlib_text()
    about = {"text": "standard library source", "files": text.files, "bytes": len(text.tokens), "sha256": text.sha256}
    return data.windows(text, batch=8, length=128, seed=_SEED), about


def _digits() -> tuple[Iterator[Batch], dict[str, Any]]:
    inputs, labels = data.digits()
    return data.minibatches(inputs, labels, batch=256, seed=_SEED), {"digits": len(inputs)}


TASKS = {
    "transformer": Task(
        name="transformer",
        title="decoder-only transformer, bytes of Python's standard library, AdamW",
        steps=160,
        model=lambda: Transformer(vocabulary=256, width=128, depth=6, heads=4, context=128, dropout=0.1),
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01),
        batches=_text,
        loss=lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
    ),
    "resnet": Task(
        name="resnet",
        title="ReLU ResNet, branch scale 1/sqrt(24), scikit-learn digits, SGD",
        steps=300,
        model=lambda: ResNet(in_features=64, width=128, depth=24, out_features=10),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        batches=_digits,
        loss=F.cross_entropy,
        packages=("matplotlib", "pandas", "sklearn"),
    ),
}


@dataclass
class _Run:
    """One of the two trainings that run side by side."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    seconds: list[float]
    losses: list[float]

    @classmethod
    def start(cls, task: Task, device: torch.device) -> _Run:
        torch.manual_seed(_SEED)
        model = task.model().to(device)
        return cls(model, task.optimizer(model), [], [])

    def step(self, task: Task, batch: Batch, monitor: Monitor | None) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = task.loss(self.model(batch[0]), batch[1])
        loss.backward()
        if monitor is not None:
            monitor.log(loss=loss)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def run_task(
    task: Task, steps: int, every: int, out: Path, console: Console, device: torch.device = _CPU
) -> dict[str, Any]:
    """Train twice in lockstep, with and without the monitor, and write the record and figures.

    Both trainings start from the same parameters and see the same batches and random numbers. Their order is drawn
    anew for every step, so that neither benefits from a warm cache.

    Args:
        task: the training.
        steps: number of optimizer steps.
        every: measure every this many steps.
        out: folder for the files of this task.
        console: where to show progress.
        device: device to train on.

    Returns:
        The entry of the task in ``summary.json``.
    """
    from fastfs._record.reading.load import load
    from fastfs._report.plots import plot_record

    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    record = out / "record.jsonl"
    record.unlink(missing_ok=True)
    batches, about = task.batches()
    plain, watched = _Run.start(task, device), _Run.start(task, device)
    devices = [device] if device.type == "cuda" else []
    equal_randomness = True
    order = random.Random(_SEED)
    with (
        Monitor(
            watched.model,
            watched.optimizer,
            every=every,
            aligned_every=1,
            path=record,
            verbose=False,
            metadata={"task": task.title, **about},
        ) as monitor,
        training_progress(console, task.name, steps) as progress,
        repeatable_attention(device),
    ):
        for done in range(1, steps + 1):
            inputs, targets = next(batches)
            batch = inputs.to(device), targets.to(device)
            before, after = RandomState.take(devices), None
            for run in (plain, watched) if order.random() < 0.5 else (watched, plain):
                before.restore()
                run.step(task, batch, monitor if run is watched else None)
                equal_randomness &= after is None or not after.moved()
                after = RandomState.take(devices)
            progress(done, watched.losses[-1])

    cost = step_time_ratio(plain.seconds, watched.seconds, every)
    _add_metadata(record, STEP_TIME_RATIO, cost)
    table = load(record)
    layers, predictions = _layer_table(table)
    pictures = plot_record(record, out, title=task.title)
    if importlib.util.find_spec("plotly") is not None:
        from fastfs._report.page import write_page

        pictures = [*pictures, write_page(record, out / _PAGE)]
    return {
        "title": task.title,
        "steps": steps,
        "every": every,
        "data": about,
        "parameters": sum(p.numel() for p in watched.model.parameters()),
        "loss_first": _mean(watched.losses[: max(1, steps // 20)]),
        "loss_last": _mean(watched.losses[-max(1, steps // 20) :]),
        "bitwise_equal": equal_randomness
        and plain.losses == watched.losses
        and all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True)),
        "step_time_ratio": cost,
        "layers": layers,
        "predictions": predictions,
        "files": [str(path.relative_to(out.parent)) for path in (record, *pictures)],
        "seconds": time.perf_counter() - started,
    }


def _add_metadata(record: Path, key: str, value: Any) -> None:
    """Add to the metadata of a finished run, so that every page of the record shows the same."""
    first, rest = record.read_bytes().split(b"\n", 1)
    header = json.loads(first)
    header["metadata"][key] = value
    write_whole(record, json.dumps(header, separators=(",", ":")).encode() + b"\n" + rest)


def _layer_table(table: pandas.DataFrame) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Summarize the layers, and the predictions.

    Returns:
        One entry per layer, with medians over the last quarter of the measured steps and the predicted ones since; what
        is known about the predictions of the whole run.
    """
    kind = table["kind"].to_numpy()
    measured = table[kind == "measured"]
    steps = sorted(measured["step"].unique())
    first = steps[-max(1, len(steps) // 4)]
    groups = measured[measured["step"] >= first].groupby("layer", sort=True)
    medians = groups[["angle", "cos_angle", "update_rms", "relative_update", "aligned_decrease"]].median()
    names, valid = groups["name"].first(), groups["valid"].mean()
    between = make_grid(table, len(medians), ("update_rms",), kind == "predicted")
    judged = judge_predictions(
        table, make_grid(table, len(medians), (), kind == "measured"), between, kind == "measured"
    )
    within, comparisons = overall_factor(judged.ratios)
    late = between.steps >= first
    given, shown = judged.given[:, late], (judged.given & ~judged.withheld)[:, late]
    speed, factor = between.columns["update_rms"][:, late], judged.factors[:, late]
    layers = [
        {
            "layer": int(i),
            "name": names[i],
            **{k: float(v) for k, v in row.items()},
            "predictions": int(given[i].sum()),
            "predictions_withheld": int((given & ~shown)[i].sum()),
            "predicted_update_rms": float(np.median(speed[i][shown[i]])) if shown[i].any() else None,
            "predicted_factor": float(np.median(factor[i][shown[i]])) if shown[i].any() else None,
            "valid": float(valid[i]),
        }
        for i, row in medians.iterrows()
    ]
    predictions = {
        "share": SHARE,
        "factor": None if math.isnan(within) else within,
        "comparisons": comparisons,
        "given": int(judged.given.sum()),
        "withheld": int(judged.withheld.sum()),
        "in_words": confidence_in_words(judged),
    }
    return layers, predictions


def run_demo(
    models: list[str],
    steps: int | None,
    every: int,
    out: Path,
    *,
    device: torch.device = _CPU,
    threads: int = 1,
    console: Console | None = None,
    json: Path | None = None,
) -> dict[str, Any]:
    """Run the given tasks, print the results and write ``summary.json``.

    Args:
        models: names in ``TASKS``.
        steps: optimizer steps per task; None uses the number of the task.
        every: measure every this many steps.
        out: output folder. In an existing folder, only files of an earlier demo are overwritten.
        device: device to train on, from the same initial parameters and batches on all devices.
        threads: number of torch threads during the run. One is fast enough, and stable on a busy machine.
        console: where to print; None means standard output, or standard error if the JSON goes to standard output.
        json: file for the content of ``summary.json``, ``-`` for standard output, or None.

    Returns:
        The content of ``summary.json``.

    Raises:
        ImportError: a package that a task needs is not installed.
        OutputError: ``out`` is not a folder, or holds a file of the same name that the demo did not write.
    """
    console = console or Console(stderr=is_stdout(json))
    for package in dict.fromkeys(package for name in models for package in TASKS[name].packages):
        extras.load(package, "demo", "the demo")  # before minutes of training
    check_json_output(json)
    _check_out(out, models)
    out.mkdir(parents=True, exist_ok=True)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    summary: dict[str, Any] = {
        "made_by": _MARK,
        "torch": str(torch.__version__),
        "device": where,
        "threads": threads,
        "tasks": {},
    }
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in models:
            task = TASKS[name]
            count = steps or task.steps
            console.print(
                f"\n[bold]{task.name}[/bold]: {task.title}; {count} steps, each with and without the monitor",
                highlight=False,
            )
            result = run_task(task, count, every, out / name, console, device)
            summary["tasks"][name] = result
            print_result(console, result)
    finally:
        torch.set_num_threads(threads_before)
    write_json(out / "summary.json", summary)
    print_meaning(console)
    pages = [file for task in summary["tasks"].values() for file in task["files"] if file.endswith(_PAGE)]
    files = ["record.jsonl", *_PICTURES, *([_PAGE] if pages else [])]
    print_next(console, out, models[0], files, pages)
    if json is not None:
        write_json(json, summary)
    return summary


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# The output folder


def _check_out(out: Path, models: list[str]) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} exists and is not a folder")
    for name in models:
        if (out / name).exists() and not (out / name).is_dir():
            raise OutputError(f"{out / name} exists and is not a folder")
    files = [out / "summary.json"]
    files += [out / name / file for name in models for file in ("record.jsonl", *_PICTURES, _PAGE)]
    foreign = [str(path) for path in files if path.exists() and not _is_own(path)]
    if foreign:
        raise OutputError(f"not written by an earlier fastfs demo, and would be overwritten: {', '.join(foreign)}")


def _is_own(path: Path) -> bool:
    if not path.is_file():
        return False
    if path.suffix == ".png":
        return b"fastfs" in path.read_bytes()[:1000]
    if path.suffix == ".html":
        return b"fastfs" in path.read_bytes()[:10_000]
    mark = b'"made_by": "fastfs demo"' if path.name == "summary.json" else b'{"kind":"header","schema":'
    return mark in path.read_bytes()[:1000]
