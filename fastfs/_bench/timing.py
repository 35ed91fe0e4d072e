"""Interleaved timing of several implementations.

Every round calls all implementations, so a machine that slows down affects them equally. Reported times are medians
over rounds, and ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["CYCLES_PER_SECOND", "Times", "median_ratio", "occupy", "side_by_side", "time_call", "wall_time"]

Times = dict[str, list[float]]
"""Seconds per call in every round, by implementation."""

CYCLES_PER_SECOND = 3e9
"""Upper bound of GPU clocks: a wait of this many cycles per second lasts at least the requested time."""


def occupy(seconds: float) -> None:
    """Keep the current CUDA stream busy for at least so many seconds; up to a few times as long on slow clocks."""
    torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))


def time_call(call: Callable[[], object], device: torch.device, repeat: int = 1) -> float:
    """Return the seconds per call, averaged over `repeat` consecutive calls: GPU time on CUDA, else wall time.

    On CUDA, the GPU sleeps while the calls are queued, for longer than an untimed pass took to queue them. The time
    between the events therefore consists of the kernels and the gaps between them, without the host. A call that
    synchronizes, or launches more kernels than the queue holds (about a thousand), cannot be queued completely; the
    time that the GPU then waits for the host is included.

    Args:
        call: the call.
        device: device to time.
        repeat: number of calls.

    Returns:
        Seconds.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeat):
            call()
        queueing = time.perf_counter() - begin
        torch.cuda.synchronize(device)
        occupy(2 * queueing + 1e-3)
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
    """Return the wall time per call in seconds, averaged over `repeat` calls, with synchronization at both ends."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / repeat


def side_by_side(
    implementations: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    repeat: int = 1,
    budget: float = 4.0,
    *,
    timer: Callable[[Callable[[], object], torch.device, int], float] | None = None,
) -> Times:
    """Time several implementations in `rounds` interleaved rounds, after one untimed call each.

    The order is shuffled in every round, because a call finds the caches as its predecessor left them; the sequence of
    orders is the same in every run. An implementation that has used up its `budget` skips the later rounds, after at
    least three.

    Args:
        implementations: calls by name.
        device: device to time.
        rounds: number of rounds.
        repeat: calls per round.
        budget: seconds per implementation.
        timer: function that times a call; :func:`time_call` if None.

    Returns:
        Seconds per call in every round, by name.
    """
    for call in implementations.values():
        call()
    times: Times = {name: [] for name in implementations}
    order, draw = list(implementations), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            if len(times[name]) < 3 or sum(times[name]) * repeat < budget:
                times[name].append((timer or time_call)(implementations[name], device, repeat))
    return times


def median_ratio(times: Times, name: str, to: str) -> float:
    """Return the median of time(`name`) / time(`to`) over the rounds in which both were timed."""
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=False))
