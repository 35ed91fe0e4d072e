"""The measurements of ``fastfs bench``, whose sizes follow from the available time, memory and speed."""

from __future__ import annotations

import functools
import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastfs import _functional, reference
from fastfs._bench import baselines, ceilings
from fastfs._bench.comparison import COMPILE, EAGER, HAND, NORMS, OURS, attempt, ranking
from fastfs._bench.expected import ALLOWED, expected_sums
from fastfs._bench.inputs import Inputs, RoundRobin, bytes_of, copies_for, make_inputs
from fastfs._bench.machine import cache_bytes, core_trouble, environment, free_bytes
from fastfs._bench.timing import side_by_side

__all__ = ["KINDS", "LAYER", "LIST", "ROWS", "Clock", "measure", "size_for"]

LAYER, LIST, ROWS = "one layer", "many layers", "per row"
KINDS = (LAYER, LIST, ROWS)
SMALL = 2**16  # elements per layer in a list of layers
WIDTH = 4096  # elements per row
LEAST, MOST = 2**24, 2**30  # limits of the bytes of a call's inputs
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS = 9


class Clock:
    """Distributes the remaining time over the remaining steps."""

    def __init__(self, seconds: float, steps: int) -> None:
        self.end = time.monotonic() + seconds
        self.steps = steps

    def left(self) -> float:
        """Return the remaining seconds."""
        return max(0.0, self.end - time.monotonic())

    def share(self) -> float:
        """Return the seconds available for the next step."""
        return self.left() / max(1, self.steps)


COMPILING = 0.5
"""Largest fraction of the time that torch.compile may take to compile."""


@dataclass
class Compiler:
    """The state of torch.compile.

    Args:
        budget: seconds that are left for compiling.
        trouble: why it cannot be used, or None.
        seconds: how long it takes to compile a graph.
    """

    budget: float
    trouble: str | None = None
    seconds: float = 4.0

    def why_not(self, clock: Clock) -> str | None:
        """Return why torch.compile is excluded, or None."""
        if self.trouble is None and min(self.budget, clock.left() - clock.steps) < self.seconds:
            return f"compiling takes about {self.seconds:.0f} s, more than the remaining time"
        return self.trouble


def size_for(share: float, rate: float, free: int, cache: int) -> int:
    """Return the size of a call's inputs in bytes.

    Args:
        share: seconds available for all calls.
        rate: bytes per second of the slowest implementation, which is called about twenty times.
        free: bytes of available memory; all copies and temporaries take about an eighth of it.
        cache: bytes of the cache; eight times as much is sufficient.

    Returns:
        The size, between ``LEAST`` and ``MOST``.
    """
    size = min(8 * cache, MOST, free // 8, share * rate / 20)
    return max(LEAST, int(size))


def measure(device: torch.device, seconds: float, progress: Callable[[str], object]) -> dict[str, Any]:
    """Run all measurements.

    Args:
        device: device to measure on.
        seconds: approximate duration; a step that has begun is completed.
        progress: called with a description of each step.

    Returns:
        "environment", "no core" (the reason, or None), "overhead" in microseconds by number of layers, and "results".

    Raises:
        ArithmeticError: sums of the native core are wrong.
    """
    begin = time.monotonic()
    clock = Clock(seconds, len(KINDS) * len(DTYPES))
    no_core = core_trouble(device)
    progress("cost of a call")
    result: dict[str, Any] = {
        "environment": environment(device),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "no core": no_core,
        "overhead": {} if no_core else overhead(device, min(1.0, seconds / 20)),
        "results": [],
    }
    compiler = Compiler(COMPILING * seconds)
    rates = {dtype: _rate(dtype, device) for dtype in DTYPES}
    for kind in KINDS:
        for dtype in DTYPES:
            progress(f"{kind}, {_name(dtype)}")
            rate = rates[dtype] / (2 if kind == ROWS else 1)  # the reference is slower per row
            size = size_for(clock.share(), rate, free_bytes(device), cache_bytes(device))
            result["results"].append(_compare(kind, dtype, device, size, clock, compiler, no_core))
            clock.steps -= 1
            gc.collect()
    result["seconds"] = round(time.monotonic() - begin, 1)
    return result


def overhead(device: torch.device, seconds: float) -> dict[str, float]:
    """Return the microseconds of host time of a call on tiny tensors, by number of layers."""
    found = {}
    for layers in (1, 100):
        x = [torch.ones(8, 8, device=device) for _ in range(layers)]
        call = functools.partial(_functional.feature_stats, x, x, x)
        times = side_by_side({OURS: call}, torch.device("cpu"), 9, 1000 // layers, seconds)[OURS]
        found[str(layers)] = round(statistics.median(times) * 1e6, 2)
    return found


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the bytes per second of the reference, the slowest implementation."""
    (inputs,) = make_inputs([(2**18,)], (dtype, dtype), device)
    call = functools.partial(reference.feature_stats, *inputs)
    times = side_by_side({EAGER: call}, device, 3)[EAGER]
    return bytes_of(inputs) / statistics.median(times)


def _shapes(kind: str, elements: int) -> list[tuple[int, ...]]:
    if kind == LIST:
        return [(SMALL,)] * max(1, min(1000, elements // SMALL))
    rows = max(1, elements // WIDTH)
    return [(rows, WIDTH)]


def _compare(
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    size: int,
    clock: Clock,
    compiler: Compiler,
    no_core: str | None,
) -> dict[str, Any]:
    per_row = kind == ROWS
    shapes = _shapes(kind, size // (3 * dtype.itemsize))
    size = sum(math.prod(shape) for shape in shapes) * 3 * dtype.itemsize
    copies = make_inputs(shapes, (dtype, dtype), device, copies_for(size, cache_bytes(device)))
    expected = expected_sums(copies[0], per_row=per_row)
    rotation = RoundRobin(len(copies))
    ceiling, make = (ceilings.SUM, ceilings.sum_of_all) if no_core else (ceilings.READ, ceilings.streaming_read)
    calls: dict[str, Callable[[], object]] = {ceiling: rotation.over([make(inputs) for inputs in copies])}
    moved, left_out = {}, {}
    if not per_row:
        made = [ceilings.copy(inputs) for inputs in copies]
        calls[ceilings.COPY], moved[ceilings.COPY] = rotation.over([call for call, _ in made]), made[0][1]
    errors: dict[str, float] = {}
    for name, sums in _implementations(per_row, device, no_core, len(shapes)).items():
        if name == COMPILE and (why := compiler.why_not(clock)):
            left_out[name] = why
            continue
        most = max(0.3, clock.share() / 12)  # it is called up to six times
        limit = compiler.budget if name == COMPILE else math.inf if name == OURS else 6 * most
        call = functools.partial(sums, copies[0])
        first, seconds, why = attempt(call, device, most, compiles=name == COMPILE, limit=limit)
        if name == COMPILE:
            compiler.budget -= seconds
            compiler.seconds = max(1.0, seconds)
            compiler.trouble = why if first is None else None
        if why is not None:
            left_out[name] = why
            if name == OURS:
                raise ArithmeticError(f"{kind}, {_name(dtype)}: {why}")
            continue
        if name != NORMS:
            errors[name] = expected.error(first)
        calls[name] = rotation.over([functools.partial(sums, inputs) for inputs in copies])
    if errors.get(OURS, 0.0) > ALLOWED or math.isnan(errors.get(OURS, 0.0)):
        raise ArithmeticError(f"{kind}, {_name(dtype)}: fastfs is off by {errors[OURS]:.1e}, allowed is {ALLOWED:.0e}")
    repeat = 5 if device.type == "cuda" else max(1, 2**22 // size)
    times = side_by_side(calls, device, ROUNDS, repeat, clock.share() / 8)
    rows = ranking(times, size, moved)
    for row in rows:
        row["error"] = errors.get(row["implementation"])
    return {
        "kind": kind,
        "dtype": _name(dtype),
        "layers": len(shapes),
        "bytes": size,
        "copies": len(copies),
        "rows": rows,
        "left out": left_out,
    }


def _implementations(
    per_row: bool, device: torch.device, no_core: str | None, layers: int
) -> dict[str, Callable[[Inputs], torch.Tensor]]:
    def stats(inputs: Inputs, backend: _functional.Backend) -> torch.Tensor:
        found = _functional.feature_stats(*inputs, per_row=per_row, backend=backend)
        return torch.cat([x.sums for x in found]) if isinstance(found, list) else found.sums

    if per_row:
        hand = baselines.by_hand_per_row
    else:
        hand = baselines.by_hand_foreach if device.type == "cuda" and layers > 1 else baselines.by_hand
    torch._dynamo.reset()  # otherwise the graphs of all workloads count towards one recompilation limit
    compiled = baselines.compiled(per_row=per_row)
    found: dict[str, Callable[[Inputs], torch.Tensor]] = {
        OURS: lambda inputs: stats(inputs, "native"),
        COMPILE: lambda inputs: compiled(*inputs),
        HAND: lambda inputs: hand(*inputs),
        EAGER: lambda inputs: stats(inputs, "reference"),
    }
    if not per_row:
        found[NORMS] = lambda inputs: baselines.norms(*inputs)
    if no_core:
        del found[OURS]
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
