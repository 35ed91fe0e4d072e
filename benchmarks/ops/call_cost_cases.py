"""Measure the host time of calls in one process; `benchmarks.ops.call_cost` runs it in each compared version of fastfs.

    python benchmarks/ops/call_cost_cases.py DEVICE [predicted]

Imports only torch and fastfs, so that it runs with any version that has the called functions. Prints JSON: per case,
the microseconds of host time per call, as the smallest mean over several blocks of calls, which excludes interference
from the rest of the machine. On CUDA, blocks do not synchronize with the device.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastfs
from fastfs._core import ops
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._functional import optimizer_stats
from fastfs._monitor.measure.update_meter import UpdateMeter
from fastfs.models import Transformer

BLOCKS = 12
LAYERS = 100


def least(call: Callable[[], object], calls: int, blocks: int = BLOCKS) -> float:
    """Return microseconds per call: the smallest mean of the blocks."""
    for _ in range(3):
        call()
    best = float("inf")
    for _ in range(blocks):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - begin)
    return best / calls * 1e6


def lists(layers: int, device: torch.device, shape: tuple[int, ...] = (8, 8)) -> list[list[Tensor]]:
    """Return three lists of distinct tiny tensors."""
    return [[torch.randn(shape, device=device) for _ in range(layers)] for _ in range(3)]


def calls(device: torch.device) -> dict[str, float]:
    """Measure calls on tiny tensors."""
    found = {}
    for layers in (1, 10, LAYERS, 1000):
        before, after, backward = lists(layers, device)
        found[f"feature_stats, {layers} layers"] = least(
            lambda a=before, b=after, c=backward: fastfs.feature_stats(a, b, c),  # type: ignore[misc]
            max(2000 // layers, 4),
        )
    held = lists(LAYERS, device)
    views = [[x[:0] for x in tensors] for tensors in held]  # views keep references to their base, as autograd does
    found["feature_stats, 100 layers that torch refers to"] = least(lambda: fastfs.feature_stats(*held), 20)
    del views
    one = [x[0] for x in lists(1, device)]
    found["feature_stats, one tensor"] = least(lambda: fastfs.feature_stats(*one), 2000)
    before, after, backward = lists(LAYERS, device)
    found["feature_stats per row, 100 layers"] = least(
        lambda: fastfs.feature_stats(before, after, backward, per_row=True), 20
    )
    found["update_stats, 100 parameters"] = least(lambda: fastfs.update_stats(before, after), 20)
    table = torch.full((LAYERS, len(OptimizerRule.ADAM.coefficients)), 0.5, dtype=torch.float64)
    second = [x.abs() for x in backward]
    found["optimizer_stats, 100 parameters"] = least(
        lambda: optimizer_stats(OptimizerRule.ADAM, before, after, backward, second, table), 20
    )
    x, rows = torch.randn(64, 32, device=device), torch.arange(0, 64, 4, device=device)
    found["gather_rows"] = least(lambda: torch.ops.fastfs.gather_rows(x, rows, 1), 2000)
    found["row_squares"] = least(lambda: torch.ops.fastfs.row_squares(x, rows, 1), 2000)
    return found


def parts(device: torch.device) -> dict[str, float]:
    """Split the time of feature_stats on 100 layers into parts. CPU only, where each part can be called separately."""
    if device.type != "cpu" or not ops.native_available():
        return {}
    layers = lists(LAYERS, device)
    empty = [[x[:0] for x in tensors] for tensors in layers]
    out = torch.empty((LAYERS, len(fastfs.FeatureStats.names)), dtype=torch.float64)
    library = torch.library.Library("fastfs_call_cost", "DEF")
    library.define("nothing(Tensor[] before, Tensor[] after, Tensor[] backward) -> Tensor")
    library.impl("nothing", lambda before, after, backward: out, "CPU")
    library.impl("nothing", torch.library.fallthrough_kernel, "Autograd")
    nothing = torch.ops.fastfs_call_cost.nothing
    core = ops._C.feature_stats_cpu
    return {
        "part: torch's dispatcher, an op that does nothing": least(lambda: nothing(*layers), 20),
        "part: reading the tensors, empty ones": least(lambda: core(tuple(empty), False, out, 1), 20),
        "part: the native core": least(lambda: core(tuple(layers), False, out, 1), 20),
    }


def watch(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> fastfs.Monitor:
    """Return a monitor that writes nothing."""
    return fastfs.Monitor(
        model, optimizer, sinks=[lambda rows: None], alerts=(), verbose=False, **options
    )  # fmt: skip


class Step:
    """A training step of a deep and very narrow transformer, whose time is nearly all spent on the host."""

    def __init__(self, device: torch.device, **options: int) -> None:
        self.model: nn.Module = Transformer(64, 16, 12, 2, 8, generator=torch.Generator().manual_seed(0)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.tokens = torch.randint(0, 64, (2, 8), device=device)
        self.monitor = watch(self.model, self.optimizer, **options) if options else None

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        logits = self.model(self.tokens)
        nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens.flatten()).backward()
        self.optimizer.step()


def training(device: torch.device) -> dict[str, float]:
    """Measure what a monitor adds to a step of 12 blocks and about 100 parameters, and what its meter takes."""
    plain = Step(device)
    plain()
    meter = UpdateMeter(plain.optimizer)

    def metered() -> None:
        meter.before()
        meter.after()

    never = 10**9
    steps = {
        "plain": plain,
        "monitor, a step that is not measured": Step(device, every=never),
        "monitor, a predicted step": Step(device, every=never, aligned_every=1),
    }
    found = {"UpdateMeter": least(metered, 20)}
    for step in steps.values():
        step()
        step()
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(2 * BLOCKS):  # interleaved, because the difference is measured
        for name, step in steps.items():
            best[name] = min(best[name], least(step, 5, 1))
    for name in list(steps)[1:]:
        found[name] = best[name] - best["plain"]
    for step in steps.values():
        if step.monitor is not None:
            step.monitor.close()
    return found


class Small(Step):
    """A step of an MLP with three layers and 6 parameters, which the monitor's host work dominates."""

    def __init__(self, device: torch.device, **options: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)).to(
            device
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.inputs = torch.randn(16, 32, device=device)
        self.labels = torch.randint(0, 10, (16,), device=device)
        self.monitor = watch(self.model, self.optimizer, **options) if options else None

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.inputs), self.labels).backward()
        self.optimizer.step()


def predicted(device: torch.device) -> dict[str, float]:
    """Measure the processor time that predicted steps add to the training thread: medians over alternating blocks."""
    found = {}
    for name, kind, calls_ in (("MLP, 6 parameters", Small, 20), ("transformer, 12 blocks", Step, 4)):
        plain, watched = kind(device), kind(device, every=10**9, aligned_every=1)
        for _ in range(24):
            plain()
            watched()
        costs: dict[str, list[float]] = {"plain": [], "more": []}
        for _ in range(2 * BLOCKS):
            times = []
            for step in (plain, watched):
                begin = time.thread_time()
                for _ in range(calls_):
                    step()
                times.append((time.thread_time() - begin) / calls_ * 1e6)
            costs["plain"].append(times[0])
            costs["more"].append(times[1] - times[0])
        found[f"{name}: the step itself"] = statistics.median(costs["plain"])
        found[f"{name}: a predicted step more"] = statistics.median(costs["more"])
        assert watched.monitor is not None
        watched.monitor.close()
    return found


def main() -> None:
    device = torch.device(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = predicted(device) if "predicted" in sys.argv[2:] else {**calls(device), **parts(device), **training(device)}
    folder = Path(fastfs.__file__).parents[1]
    print(json.dumps({"folder": str(folder), **{name: round(value, 3) for name, value in found.items()}}))


if __name__ == "__main__":
    main()
