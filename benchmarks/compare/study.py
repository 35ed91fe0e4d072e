"""Small monitored trainings and a result file that can be resumed, shared by the studies of this package."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import environment, file_option
from fastfs._utils.json_output import write_json
from fastfs.monitor import Monitor

__all__ = ["command_line", "resumable", "train"]

Batches = Iterator[tuple[Tensor, Tensor]]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, steps: int, path: Path, **settings: Any
) -> Path:
    """Train with cross entropy and write a record with the monitor's ``settings``, in place of an old one.

    Args:
        model: maps the first entry of a batch to logits.
        optimizer: of the model.
        batches: inputs and targets.
        steps: number of optimizer steps.
        path: of the record.
        **settings: arguments of the monitor.

    Returns:
        The path.
    """
    path.unlink(missing_ok=True)
    with Monitor(model, optimizer, path=path, verbose=False, **settings) as monitor:
        for _ in range(steps):
            inputs, targets = next(batches)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
            loss.backward()
            monitor.log(loss=loss.item())
            optimizer.step()
    return path


def command_line(description: str | None) -> argparse.Namespace:
    """Parse ``--json`` and ``--seeds``.

    Args:
        description: text of ``--help``.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=file_option, help="write the results to this file; a second call resumes")
    parser.add_argument("--seeds", type=int, default=20)
    return parser.parse_args()


def resumable(
    path: Path | None,
    tasks: list[dict[str, Any]],
    work: Callable[..., dict[str, Any]],
    summary: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> dict[str, Any]:
    """Do the tasks that the file has no result of, and write it after each.

    Args:
        path: the result file; None writes nothing.
        tasks: keyword arguments of ``work``.
        work: returns the result of a task.
        summary: of all results.

    Returns:
        The summary.
    """
    done = json.loads(path.read_text())["results"] if path is not None and path.exists() else []
    for task in tasks:
        if not any(all(result.get(key) == value for key, value in task.items()) for result in done):
            done.append({**task, **work(**task)})
        if path is not None:
            about = environment(torch.device("cpu"))
            write_json(path, {"environment": about, "summary": summary(done), "results": done})
    return summary(done)
