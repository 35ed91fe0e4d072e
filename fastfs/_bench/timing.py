"""Timing side by side.

Contestants take turns inside each round, so a machine that slows down slows them all; what is reported is the median
over rounds, and ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["CYCLES_PER_SECOND", "Times", "median_ratio", "side_by_side", "time_call", "wall_time"]

Times = dict[str, list[float]]
"""Seconds per call in every round, by contestant."""

CYCLES_PER_SECOND = 3e9
"""More than any GPU's clock: a wait of so many cycles per second lasts at least as long as asked for."""


def time_call(call: Callable[[], object], device: torch.device, repeat: int = 1) -> float:
    """Seconds per call, the mean over `repeat` calls in a row: on CUDA the GPU's time, else wall time.

    On CUDA the GPU is kept waiting while the calls are queued, for longer than an untimed pass before took to queue
    them. So the time between the events is that of the kernels and the gaps between them, without the host's. A call
    that waits for the GPU, or launches more than the queue holds (about a thousand kernels), cannot be queued ahead
    in full: what the GPU then waits for the host counts.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeat):
            call()
        queueing = time.perf_counter() - begin
        torch.cuda.synchronize(device)
        torch.cuda._sleep(int((2 * queueing + 1e-3) * CYCLES_PER_SECOND))
        start.record()
        for _ in range(repeat):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3 / repeat
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - begin) / repeat


def wall_time(call: Callable[[], object], device: torch.device, repeat: int = 1) -> float:
    """Seconds per call, the mean over `repeat` calls in a row, host and device together: what a loop takes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / repeat


def side_by_side(
    contestants: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    repeat: int = 1,
    budget: float = 4.0,
    *,
    timer: Callable[[Callable[[], object], torch.device, int], float] | None = None,
) -> Times:
    """Times the contestants in turn, `rounds` times, after one call each that is not counted.

    The order is drawn anew in every round, for a call finds the caches as the one before it left them; it is the same
    order in every run. One that has used up its `budget` of seconds sits out the later rounds, after three at least.
    `timer` is :func:`time_call` if not given.
    """
    for call in contestants.values():
        call()
    times: Times = {name: [] for name in contestants}
    order, draw = list(contestants), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            if len(times[name]) < 3 or sum(times[name]) * repeat < budget:
                times[name].append((timer or time_call)(contestants[name], device, repeat))
    return times


def median_ratio(times: Times, name: str, to: str) -> float:
    """Median of time(`name`) / time(`to`) over the rounds in which both took part."""
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=False))
