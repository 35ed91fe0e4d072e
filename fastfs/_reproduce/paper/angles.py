"""The angle at initialization against layer, depth and branch scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas

from fastfs._reproduce.paper.chains import Network
from fastfs._reproduce.paper.steps import Steps, simulate
from fastfs._reproduce.paper.study import Advance, Outcome, StudySettings, Value, over_seeds

__all__ = ["LAW_NAMES", "against_depth", "against_layer", "against_scale", "run_depth", "run_layer", "run_scale"]

LAWS: Mapping[str, Callable[[int], float]] = {
    "1/L": lambda depth: 1.0 / depth,
    "0.5/sqrt(L)": lambda depth: 0.5 / math.sqrt(depth),
    "1/sqrt(L)": lambda depth: 1.0 / math.sqrt(depth),
    "2/sqrt(L)": lambda depth: 2.0 / math.sqrt(depth),
    "1": lambda depth: 1.0,
}
"""The five branch scales of the paper."""
LAW_NAMES = tuple(LAWS)
_NAMED = {"0.5/sqrt(L)": "c=0.5", "1/sqrt(L)": "c=1", "2/sqrt(L)": "c=2"}

SCALES = (0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.35, 0.42, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.6, 3.4, 4.5)
"""The twenty values of sqrt(L) beta in figure (c), including the published ones."""


def run_layer(
    seeds: Sequence[int], *, depth: int = 200, width: int = 200, advance: Callable[[int], None] | None = None
) -> Steps:
    """Simulate one step of the five networks of one depth."""
    networks = [Network(depth, law(depth)) for law in LAWS.values()]
    return simulate(networks, width=width, seeds=seeds, advance=advance)


def against_layer(settings: StudySettings, advance: Advance) -> Outcome:
    """Compute (a), the angle at every layer."""
    seeds = settings.seed_list(5, 5)
    depth, width = settings.pick(200, 100), 200
    steps = run_layer(seeds, depth=depth, width=width, advance=lambda n: advance(n / len(seeds)))
    rows = [
        pandas.DataFrame(
            {
                "branch_scale": name,
                "beta": steps.networks[n].branch_scale,
                "depth": depth,
                "width": width,
                "layer": np.arange(1, depth + 1),
                "angle": steps.angle[:, n, 1:].mean(axis=0),
                "angle_std": steps.angle[:, n, 1:].std(axis=0),
                "cos_angle": steps.cos_angle[:, n, 1:].mean(axis=0),
                "seeds": len(seeds),
            }
        )
        for n, name in enumerate(LAWS)
    ]
    last = steps.last(steps.angle)
    values = {_NAMED[name]: over_seeds(last[:, n]) for n, name in enumerate(LAWS) if name in _NAMED}
    values["beta=1/L"] = over_seeds(last[:, LAW_NAMES.index("1/L")])
    values["mlp"] = over_seeds(last[:, LAW_NAMES.index("1")])
    return Outcome(pandas.concat(rows, ignore_index=True), values)


DEPTHS = (10, 20, 30, 50, 70, 100, 140, 200)


def run_depth(
    seeds: Sequence[int],
    *,
    depths: Sequence[int] = DEPTHS,
    width: int = 200,
    advance: Callable[[int], None] | None = None,
) -> Steps:
    """Simulate one step of the five networks of every depth."""
    networks = [Network(depth, law(depth)) for depth in depths for law in LAWS.values()]
    return simulate(networks, width=width, seeds=seeds, advance=advance)


def against_depth(settings: StudySettings, advance: Advance) -> Outcome:
    """Compute (b), the output angle against depth."""
    seeds = settings.seed_list(10, 8)
    depths = settings.pick(DEPTHS, (10, 30, 100))
    steps = run_depth(seeds, depths=depths, advance=lambda n: advance(n / len(seeds)))
    last = steps.last(steps.angle).reshape(len(seeds), len(depths), len(LAWS))
    rows = [
        {
            "branch_scale": name,
            "depth": depth,
            "beta": LAWS[name](depth),
            "width": 200,
            "angle": float(last[:, i, n].mean()),
            "angle_std": float(last[:, i, n].std()),
            "seeds": len(seeds),
        }
        for n, name in enumerate(LAWS)
        for i, depth in enumerate(depths)
    ]
    values = {}
    for n, name in enumerate(LAWS):
        if name in _NAMED:
            for depth in (30, 100):
                values[f"{_NAMED[name]},L={depth}"] = over_seeds(last[:, depths.index(depth), n])
            deep = last[:, [depth >= 30 for depth in depths], n].mean(axis=0)
            values[f"{_NAMED[name]},range"] = Value(float(np.ptp(deep)), note="largest - smallest mean, L >= 30")
    values["mlp,L=100"] = over_seeds(last[:, depths.index(100), LAW_NAMES.index("1")])
    return Outcome(pandas.DataFrame(rows), values)


def run_scale(
    seeds: Sequence[int],
    *,
    depths: Sequence[int] = (30, 100, 500),
    width: int = 500,
    scales: Sequence[float] = SCALES,
    advance: Callable[[int], None] | None = None,
) -> Steps:
    """Simulate one step of the networks of every depth and sqrt(L) beta."""
    networks = [Network(depth, c / math.sqrt(depth)) for depth in depths for c in scales]
    return simulate(networks, width=width, seeds=seeds, advance=advance)


def against_scale(settings: StudySettings, advance: Advance) -> Outcome:
    """Compute (c), the output angle against sqrt(L) beta."""
    seeds = settings.seed_list(5, 5)
    depths, width = settings.pick((30, 100, 500), (30, 100)), settings.pick(500, 200)
    steps = run_scale(seeds, depths=depths, width=width, advance=lambda n: advance(n / len(seeds)))
    last = steps.last(steps.angle).reshape(len(seeds), len(depths), len(SCALES))
    rows = [
        {
            "depth": depth,
            "sqrt_depth_beta": c,
            "beta": c / math.sqrt(depth),
            "width": width,
            "angle": float(last[:, i, n].mean()),
            "angle_std": float(last[:, i, n].std()),
            "seeds": len(seeds),
        }
        for i, depth in enumerate(depths)
        for n, c in enumerate(SCALES)
    ]
    values = {
        f"c={c:g},L={depth}": over_seeds(last[:, i, SCALES.index(c)])
        for c in (0.1, 0.5, 1.0, 2.0)
        for i, depth in enumerate(depths)
    }
    gap = np.ptp(last.mean(axis=0), axis=0)
    values["range"] = Value(float(gap.max()), note="largest difference between depths, all scales")
    return Outcome(pandas.DataFrame(rows), values)
