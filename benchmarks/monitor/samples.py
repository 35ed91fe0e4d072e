"""Compare ``samples=`` with measurements of the whole batch, on the models and the data of ``fastfs demo``.

    python -m benchmarks.monitor.samples [--json FILE] [--steps N] [--quick]

Two monitors watch the same training, one of them with ``samples=``. The models are in evaluation mode, without
dropout, since samples draw other masks alone than in the batch. For each layer and step, the error of the estimate is
divided by its standard error. If these are right, the quotient is Student's t with samples - 1 degrees of freedom, up
to the bias of ratios; "expected" is the share of it within two standard errors.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import torch

import fastfs
from benchmarks.harness import command_line, count_option, print_table, write_json
from fastfs._reproduce.demo import TASKS, Task

MODES: dict[str, dict[str, Any]] = {"batch": {}, "amplify": {"amplify": True}, "jvp": {"mode": "jvp"}}
CASES = (("transformer", 4), ("resnet", 32), ("resnet", 128))
ERRORS = {"angle": "angle_se", "update_rms": "update_rms_se", "residual": "residual_se"}


def run(task: Task, samples: int, mode: str, steps: int) -> dict[str, Any]:
    """Train with both monitors and compare their rows."""
    torch.manual_seed(0)
    model = task.model()
    model.eval()
    optimizer = task.optimizer(model)
    seen: list[list[dict[str, Any]]] = [[], []]
    monitors = [
        fastfs.Monitor(
            model,
            optimizer,
            every=1,
            rows=None,
            samples=count,
            sinks=[into.extend],
            verbose=False,
            alerts=(),
            **MODES[mode],
        )
        for count, into in zip((None, samples), seen, strict=True)
    ]
    batches, _ = task.batches()
    for inputs, targets in itertools.islice(batches, steps):
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        optimizer.step()
    for monitor in monitors:
        monitor.close()
    whole, some = ([row for row in rows if row["kind"] == "measured"] for rows in seen)
    pairs = [(a, b) for a, b in zip(whole, some, strict=True) if a["valid"] and b["valid"]]
    valid = [sum(row["valid"] for row in rows) for rows in (whole, some)]
    result: dict[str, Any] = {
        "model": task.name,
        "samples": samples,
        "mode": mode,
        "layers x steps": len(whole),
        "valid, whole batch": valid[0],
        "valid, samples": valid[1],
        "expected within 2 standard errors": round(_within_two(samples - 1), 4),
    }
    for key, error in ERRORS.items():
        known = [(a, b) for a, b in pairs if a[key] is not None and b[key] is not None]
        if not known:
            continue
        quotient = np.array([(b[key] - a[key]) / b[error] for a, b in known])
        if key == "residual":  # 1 - D / <b, df>: its error is linear in that of <b, df> at the true value
            quotient *= [(1 - b[key]) / (1 - a[key]) for a, b in known]
        result[key] = {
            "within 2 standard errors": round(float(np.mean(np.abs(quotient) < 2)), 4),
            "median of |error| / standard error": round(float(np.median(np.abs(quotient))), 4),
            "median of standard error": round(float(np.median([b[error] for _, b in known])), 6),
        }
    return result


def _within_two(freedom: int) -> float:
    """Return the probability that Student's t is within two."""
    draws = np.random.default_rng(0).standard_t(freedom, 1_000_000)
    return float(np.mean(np.abs(draws) < 2))


def main() -> int:
    arguments = command_line(
        __doc__,
        quick="few steps, to test the benchmark itself",
        options={"--steps": {"type": count_option, "default": 40, "help": "steps of each training"}},
    )
    steps = 2 if arguments.quick else arguments.steps
    results = []
    for name, samples in CASES:
        for mode in MODES:
            results.append(run(TASKS[name], samples, mode, steps))
            write_json(arguments.json, arguments.device, results)
    columns = ["model", "samples", "mode", "layers x steps", "valid, whole batch", "valid, samples"]
    shown = [
        [*(str(result[key]) for key in columns), f"{result['expected within 2 standard errors']:.3f}"]
        + [f"{result[key]['within 2 standard errors']:.3f}" if key in result else "" for key in ERRORS]
        for result in results
    ]
    print_table("Share within two standard errors", [*columns, "expected", *ERRORS], shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
