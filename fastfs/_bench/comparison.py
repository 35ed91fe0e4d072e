"""Compare implementations: run each for the first time, record why it is excluded, and tabulate the times."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fastfs._bench.ceilings import COPY, READ, SUM
from fastfs._bench.time_limit import OutOfTimeError, time_limit
from fastfs._bench.timing import Times, median_ratio

__all__ = ["COMPILE", "EAGER", "HAND", "NORMS", "OURS", "attempt", "ranking", "reason"]

OURS = "fastfs"
EAGER = "eager (reference)"
HAND = "eager by hand"
COMPILE = "torch.compile"
NORMS = "torch._foreach_norm, 3 sums of 8"


def reason(error: BaseException) -> str:
    """Return an error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def attempt(
    call: Callable[[], Any],
    device: torch.device,
    most: float = math.inf,
    *,
    compiles: bool = False,
    limit: float = math.inf,
) -> tuple[Any, float, str | None]:
    """Call an implementation for the first time.

    Args:
        call: the call.
        device: device to synchronize with.
        most: largest permitted duration of a later call in seconds.
        compiles: whether the first call takes longer because it compiles.
        limit: seconds after which the first call is interrupted.

    Returns:
        The result of the call, its duration in seconds, and why the implementation is excluded, or None.
    """
    try:
        begin = time.perf_counter()
        with _quiet(), time_limit(limit) if limit < math.inf else contextlib.nullcontext():
            result = call()
            _wait(device)
        first = last = time.perf_counter() - begin
        if most < first < 3 * most or (first > most and compiles):  # the first call may include one-time costs
            begin = time.perf_counter()
            call()
            _wait(device)
            last = time.perf_counter() - begin
    except OutOfTimeError:
        return None, limit, f"{'compiling' if compiles else 'the first call'} takes more than {limit:.0f} s"
    except Exception as error:  # any failure of an implementation is a result to report
        return None, 0.0, reason(error)
    if last > most:
        return result, first, f"one call takes more than {most:.1g} s"
    return result, first, None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of compilers, whose effect the result shows anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def ranking(times: Times, size: int, sizes: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """Tabulate the times: milliseconds, GB/s, fraction of the ceiling, speedup of fastfs.

    Args:
        times: times from :func:`fastfs._bench.timing.side_by_side`.
        size: bytes that a call reads.
        sizes: bytes of implementations that read a different amount.

    Returns:
        One row per implementation.
    """
    ceiling = READ if READ in times else SUM if SUM in times else None
    moved = {**dict.fromkeys(times, size), **(sizes or {})}
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        row: dict[str, Any] = {
            "implementation": name,
            "milliseconds": round(median * 1e3, 6),
            "GB/s": round(moved[name] / median / 1e9, 3),
            "of ceiling": None,
            "fastfs is faster by": None,
        }
        if ceiling is not None:
            row["of ceiling"] = round(median_ratio(times, ceiling, name) * moved[name] / moved[ceiling], 4)
        if OURS in times and name != COPY:
            row["fastfs is faster by"] = round(median_ratio(times, name, OURS), 3)
        rows.append(row)
    return rows
