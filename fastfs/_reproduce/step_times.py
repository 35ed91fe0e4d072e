"""The step time ratio: what the monitor costs, as ``fastfs demo``, its report pages and the README state it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

__all__ = ["step_time_ratio"]


def step_time_ratio(plain: Sequence[float], watched: Sequence[float], every: int) -> dict[str, Any]:
    """Compare the times of the same steps without and with the monitor.

    The step time ratio is the time of an optimizer step with the monitor, divided by the time of the same step, on the
    same batch, without it.

    Args:
        plain: seconds of each step without the monitor.
        watched: seconds of the same steps with the monitor.
        every: steps 0, ``every``, 2 ``every``, ... were measured.

    Returns:
        ``measured_step`` and ``other_step``: medians of the ratios of the pairs, with their quartiles; ``other_step``
        is 1 if there is none. ``at_this_every`` and ``at_every_100``: averages over a window of so many steps, one of
        them measured. ``plain_step_seconds``: the median. ``plain_to_plain``: median of every other plain step over
        that of the rest, which shows how accurate such ratios are on this machine.
    """
    ratios = [b / a for a, b in zip(plain, watched, strict=True)]
    measured, others = ratios[::every], [ratio for step, ratio in enumerate(ratios) if step % every]
    one = statistics.median(measured)
    other = statistics.median(others) if others else 1.0
    return {
        "measured_step": one,
        "measured_step_quartiles": _quartiles(measured),
        "measured_pairs": len(measured),
        "other_step": other,
        "other_step_quartiles": _quartiles(others),
        "other_pairs": len(others),
        "at_this_every": (one + (every - 1) * other) / every,
        "at_every_100": (one + 99 * other) / 100,
        "plain_step_seconds": statistics.median(plain),
        "plain_to_plain": statistics.median(plain[::2]) / statistics.median(plain[1::2] or plain),
    }


def _quartiles(values: Sequence[float]) -> list[float] | None:
    """Return the quartiles, or None for fewer than two values."""
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]
