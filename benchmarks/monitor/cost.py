"""Cost of a training: memory, seconds per step, waits for the device and copies from it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import Times, side_by_side, wall_time
from benchmarks.monitor.profiles import TO_HOST, record
from benchmarks.monitor.trainings import PLAIN, WINDOW, Bench, Training


class Storages(TorchDispatchMode):
    """Counts the bytes of all storages that operators return, for their lifetime."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self._live:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        for key in [key for key, (reference, _) in self._live.items() if reference.expired()]:
            del self._live[key]
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def peak_bytes(make: Callable[[], Training], device: torch.device, steps: int = 2) -> int:
    """Return the peak memory of creating a training and of its first steps."""

    def run() -> None:
        training = make()
        for _ in range(steps):
            training.step()
        training.close()

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with Storages() as storages:
        run()
    return storages.peak


def compare(bench: Bench, names: list[str], rounds: int, repeat: int) -> Times:
    """Return the seconds per step of the named trainings, interleaved."""
    trainings = {name: bench.training(name) for name in names}
    for training in trainings.values():  # the first step analyses the structure and starts the amplification
        training.step()
        training.step()
    calls: dict[str, Callable[[], object]] = {name: training.step for name, training in trainings.items()}
    times = side_by_side(calls, bench.device, rounds, repeat, float("inf"), timer=wall_time)
    for training in trainings.values():
        training.close()
    return times


def window(bench: Bench, steps: int, block: int) -> tuple[float, float]:
    """Return mean seconds per step over a window with one measured step, and of the plain loop interleaved with it."""
    trainings = {WINDOW: bench.training(WINDOW), PLAIN: bench.training(PLAIN)}
    monitor = trainings[WINDOW].monitor
    assert monitor is not None
    for training in trainings.values():  # skip the first measured step, which analyses the structure
        training.step()
        training.step()
    total = dict.fromkeys(trainings, 0.0)
    shuffle = random.Random(0)
    order = list(trainings)
    first = monitor.step
    while monitor.step < first + steps:
        shuffle.shuffle(order)
        for name in order:
            total[name] += block * wall_time(trainings[name].step, bench.device, block)
    count = monitor.step - first
    monitor.close()
    return total[WINDOW] / count, total[PLAIN] / count


@dataclass(frozen=True)
class Traffic:
    """Per step, how often the host waits for the device, and the number of copies from the device."""

    waits: float
    copies: float


def traffic(bench: Bench, names: list[str], steps: int = 10) -> dict[str, Traffic] | None:
    """Return the traffic of the named trainings, or None on a CPU.

    Waits are those that torch reports: its own (blocking copies to the host, `item`, `nonzero`), from any thread.
    `benchmarks.monitor.timeline` counts the calls of the driver. Copies are those in the profile; the monitor's thread
    makes one for many steps.
    """
    if bench.device.type != "cuda":
        return None
    found = {}
    for name in names:
        training = bench.training(name)
        for _ in range(4):  # warm-up: structure analysis, allocations and compilation
            training.step()
        waits = count_waits(training.step, steps) / steps
        copies = record(training.step, bench.device, steps)["copies"]["by name"]
        training.close()
        found[name] = Traffic(waits, sum(row["count"] for row in copies if row["name"].startswith(TO_HOST)))
    return found


def count_waits(call: Callable[[], object], times: int) -> int:
    """Return the number of waits per call on CUDA."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(times):
                call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
