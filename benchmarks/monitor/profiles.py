"""Summarize a profile of torch over several steps. Times are in microseconds per step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

# Calls of the CUDA runtime in which the host waits for the device. cudaMemcpy is the one without Async.
WAITS = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMemcpyToSymbol",
    "cudaMemcpyFromSymbol",
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuEventSynchronize",
)
TO_HOST = "Memcpy DtoH"
OURS = "fastfs"  # in the names of kernels, and of operators on a CPU
LONGEST = 110  # longest name in characters
STEPS = "the steps that are summarized"


def record(call: Callable[[], object], device: torch.device, times: int) -> dict[str, Any]:
    """Profile a warmed-up call several times and return the summary."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        with torch.profiler.record_function(STEPS):
            begin = time.perf_counter()
            for _ in range(times):
                call()
            host = time.perf_counter() - begin
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return {"host us": round(host / times * 1e6, 1), **summary(profile.events(), times, device)}


def summary(events: Iterable[Any], times: int, device: torch.device) -> dict[str, Any]:
    """Summarize the events of a profile of several steps, inside of an annotation named `STEPS`.

    On CUDA: kernels in total and of fastfs, copies and fills, waits of the host within the annotation by the name of
    the call, and idle time of the device between its first and last work. On a CPU: operators by their self time.
    """
    events = list(events)
    (steps,) = (event.time_range for event in events if event.name == STEPS and event.device_type == DeviceType.CPU)
    events = [event for event in events if event.name != STEPS and not event.is_user_annotation]
    if device.type != "cuda":
        spans = [(event.name, event.self_cpu_time_total) for event in events]
        ours = [span for span in spans if span[0].startswith(f"{OURS}::")]
        return {
            "operators": _total(spans, times),
            OURS: {**_total(ours, times), "by name": _by_name(ours, times)},
            "top 10": _by_name(spans, times, 10),
        }
    work = [event for event in events if event.device_type == DeviceType.CUDA]
    spans = [(event.name, event.time_range.elapsed_us()) for event in work]
    moved = [span for span in spans if span[0].startswith(("Memcpy", "Memset"))]
    kernels = [span for span in spans if not span[0].startswith(("Memcpy", "Memset"))]
    ours = [span for span in kernels if OURS in span[0]]
    waited = [
        (event.name, event.time_range.elapsed_us())
        for event in events
        if event.name in WAITS and steps.start <= event.time_range.start <= steps.end
    ]
    return {
        "device": _total(spans, times),
        "kernels": _total(kernels, times),
        OURS: {**_total(ours, times), "by name": _by_name(ours, times)},
        "copies": {**_total(moved, times), "by name": _by_name(moved, times)},
        "waits": {**_total(waited, times), "by name": _by_name(waited, times)},
        "idle us": round(_gaps([(e.time_range.start, e.time_range.end) for e in work]) / times, 1),
        "top 10": _by_name(kernels, times, 10),
    }


Span = tuple[str, float]  # name and microseconds


def _total(spans: list[Span], times: int) -> dict[str, float]:
    return {"count": round(len(spans) / times, 2), "us": round(sum(us for _, us in spans) / times, 1)}


def _by_name(spans: list[Span], times: int, most: int = 20) -> list[dict[str, Any]]:
    """Return the names with the largest times."""
    groups: dict[str, list[Span]] = {}
    for span in spans:
        groups.setdefault(span[0][:LONGEST], []).append(span)
    rows = [{"name": name, **_total(found, times)} for name, found in groups.items()]
    return sorted(rows, key=lambda row: (-row["us"], row["name"]))[:most]


def _gaps(intervals: list[tuple[float, float]]) -> float:
    """Return the time between the first start and the last end that no interval covers."""
    total, until = 0.0, None
    for start, end in sorted(intervals):
        if until is not None and start > until:
            total += start - until
        until = end if until is None else max(until, end)
    return total
