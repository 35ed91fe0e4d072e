"""Time of a measured step with and without the options that add columns: ``casts=`` and ``nonlinear=``.

    python -m benchmarks.monitor.options [--json FILE] [--rounds N] [--quick]

Trainings of one transformer take turns, one step each; every monitor measures every step. "extra" is the median time of
a step with the option less that of the same monitor without it, in steps of the training without a monitor;
"at every=100" is by how much the option makes a training longer that is measured every 100 steps.
"""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fastfs
from benchmarks.harness import command_line, print_table, write_json
from fastfs.models import Transformer

CASTS = ("bfloat16", "float8_e4m3fn", "mxfp8")
VARIANTS: dict[str, tuple[str | None, dict[str, Any] | None]] = {
    "no monitor": (None, None),
    "batch": (None, {}),
    "casts=('bfloat16',)": ("batch", {"casts": CASTS[:1]}),
    "casts=('float8_e4m3fn',)": ("batch", {"casts": CASTS[1:2]}),
    "casts=('mxfp8',)": ("batch", {"casts": CASTS[2:]}),
    "casts, all three": ("batch", {"casts": CASTS}),
    "jvp": (None, {"mode": "jvp"}),
    "nonlinear=True": ("jvp", {"mode": "jvp", "nonlinear": True}),
}
"""By name: the variant without the option, and the options of the monitor."""


class Training:
    """One training, and the monitor on it."""

    def __init__(self, options: dict[str, Any] | None, width: int, depth: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.model = Transformer(512, width, depth, 4, tokens)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.batch = torch.randint(512, (4, tokens))
        self.times: list[float] = []
        self.monitor = None
        if options is not None:
            self.monitor = fastfs.Monitor(
                self.model, self.optimizer, every=1, sinks=[lambda _: None], alerts=(), verbose=False, **options
            )

    def step(self) -> None:
        """One step, timed."""
        started = time.perf_counter()
        self.optimizer.zero_grad()
        output: Tensor = self.model(self.batch)
        torch.nn.functional.cross_entropy(output.flatten(0, -2), self.batch.flatten()).backward()
        self.optimizer.step()
        self.times.append(time.perf_counter() - started)


def run(width: int, depth: int, tokens: int, steps: int) -> list[dict[str, Any]]:
    """Returns the times of all variants."""
    trainings = {name: Training(options, width, depth, tokens) for name, (_, options) in VARIANTS.items()}
    for _ in range(steps):
        for training in trainings.values():
            training.step()
    for training in trainings.values():
        if training.monitor is not None:
            training.monitor.close()
    times = {name: median(training.times[steps // 4 :]) for name, training in trainings.items()}
    parameters = sum(p.numel() for p in trainings["no monitor"].model.parameters())
    results = []
    for name, (without, _) in VARIANTS.items():
        extra = None if without is None else (times[name] - times[without]) / times["no monitor"]
        results.append({"variant": name, "parameters": parameters, "ms": 1e3 * times[name], "extra": extra})
    return results


def main() -> int:
    arguments = command_line(__doc__, quick="a tiny model, to test the benchmark itself")
    results = run(32, 2, 16, 4) if arguments.quick else run(256, 6, 128, 4 * arguments.rounds)
    write_json(arguments.json, arguments.device, results)
    shown = []
    for each in results:
        extra = "" if each["extra"] is None else f"{each['extra']:.2f}"
        shown.append([each["variant"], f"{each['ms']:.1f}", extra, f"{extra} %" if extra else ""])
    print_table("A measured step", ["variant", "ms", "extra", "at every=100"], shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
