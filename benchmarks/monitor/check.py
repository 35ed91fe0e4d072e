"""Checks before timing: monitors change nothing and agree with the naive implementation."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.monitor.trainings import (
    AGAIN,
    ALIGNED,
    AMPLIFIED,
    JVP,
    MEASURED,
    NAIVE,
    OFF,
    PLAIN,
    PROBE,
    Bench,
    Training,
)
from fastfs._utils.devices import repeatable_attention

STEPS = 2
# Tolerances of angles in radians and relative speeds to the naive implementation, which is eager.
EXACT, ROUNDED = 1e-5, 2e-2


def check(bench: Bench) -> dict[str, float]:
    """Check that monitors change nothing and agree with the naive implementation.

    Parameters have to be bitwise equal to those of the plain loop, except after a measured compiled step, whose graph
    differs from that of the plain step and may round differently. The share of equal entries is reported.

    Returns:
        Largest difference of angles (radians) and relative difference of speeds with all rows, of angles with the
        default rows in standard errors; and the largest share of parameter entries that differ.

    Raises:
        AssertionError: the check failed.
    """
    compiled = bench.load.compiled
    with repeatable_attention(bench.device):
        plain, naive = bench.training(PLAIN), bench.training(NAIVE)
        names = (OFF, ALIGNED, MEASURED) if compiled else (OFF, ALIGNED, MEASURED, AMPLIFIED, JVP, PROBE)
        watched = {name: bench.training(name) for name in names}
        seen: list[Any] = []
        watched["all rows"] = bench.training(MEASURED, rows=None, sinks=[lambda rows: seen.extend(rows)])
        sampled: list[Any] = []
        watched["sampled"] = bench.training(MEASURED, rows=64, sinks=[lambda rows: sampled.extend(rows)])
        again = bench.training(AGAIN)
        for _ in range(STEPS):
            for training in (plain, again, naive, *watched.values()):
                training.step()
        for training in watched.values():
            training.close()
    if _different(plain, again):
        raise AssertionError("two plain trainings have different parameters, so the monitor cannot be checked")
    different = {name: _different(plain, training) for name, training in watched.items()}
    if not compiled and any(different.values()):
        raise AssertionError(f"parameters differ from those without the monitor: {different}")
    assert naive.naive is not None
    angles, speeds, _ = torch.stack(naive.naive.angles, dim=1).tolist()
    exact = [row for row in seen if row["kind"] == "measured" and row["step"] == STEPS - 1]
    rough = [row for row in sampled if row["kind"] == "measured" and row["step"] == STEPS - 1]
    off = max(abs(row["angle"] - angle) for row, angle in zip(exact, angles, strict=True))
    slow = max(abs(row["update_rms"] / speed - 1) for row, speed in zip(exact, speeds, strict=True))
    truth = [row["angle"] for row in exact]
    errors = max(abs(row["angle"] - angle) / row["angle_se"] for row, angle in zip(rough, truth, strict=True))
    fall = float(naive.naive.decrease)
    most = ROUNDED if compiled else EXACT
    if not max(off, slow) <= most or not errors <= 6:
        raise AssertionError(
            f"the naive implementation has other angles: {off:.1e} rad, {slow:.1e}, {errors:.1f} standard errors"
        )
    # The last block is upstream of all but the final norm and the head: most of the decrease, but not all of it.
    slack = 1e-2 if compiled else 1e-6
    if not 0 < exact[-1]["aligned_decrease"] <= fall * (1 + slack):
        raise AssertionError(
            f"aligned decrease {exact[-1]['aligned_decrease']:.3g}, naive implementation {fall:.3g} in all"
        )
    return {
        "angle, all rows": off,
        "speed, all rows": slow,
        "standard errors, 64 rows": errors,
        "parameters that differ": max(different.values()),
    }


def _different(a: Training, b: Training) -> float:
    """Return the share of parameter entries whose bits differ."""
    pairs = list(zip(a.parameters, b.parameters, strict=True))
    return sum(int((p != q).sum()) for p, q in pairs) / sum(p.numel() for p, _ in pairs)
