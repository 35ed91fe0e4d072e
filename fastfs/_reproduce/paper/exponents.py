"""How fast the angle degenerates: with the branch scale in ResNets, with the layer in MLPs."""

from __future__ import annotations

import math

import numpy as np
import pandas

from fastfs._reproduce.paper.chains import Network
from fastfs._reproduce.paper.steps import simulate
from fastfs._reproduce.paper.study import Advance, Outcome, StudySettings, Value, over_seeds, slope

__all__ = ["mlp_layers", "resnet_tail"]

TAIL = (2.0, 2.5, 3.2, 4.0, 5.0, 6.3, 8.0, 10.0)


def resnet_tail(settings: StudySettings, advance: Advance) -> Outcome:
    """Compute (f), the output cosine at large c = sqrt(L) beta, L >= 10 c^2; several readouts per seed smooth it."""
    seeds = settings.seed_list(10, 6)
    depth, width, readouts = settings.pick((1000, 512, 8), (200, 256, 8))
    scales = np.array([c for c in TAIL if 10 * c**2 <= depth])
    networks = [Network(depth, c / math.sqrt(depth), readout=r) for c in scales for r in range(readouts)]
    steps = simulate(networks, width=width, seeds=seeds, advance=lambda n: advance(n / len(seeds)))
    cosine = steps.last(steps.cos_angle).reshape(len(seeds), len(scales), readouts).mean(axis=2)
    fitted = slope(scales, cosine)
    table = _table("sqrt_depth_beta", scales, depth, width, readouts, cosine, fitted)
    largest = over_seeds(cosine[:, -1] * scales[-1])
    return Outcome(
        table,
        {"exponent": fitted, "constant": Value(largest.mean, largest.error, f"c cos at c = {scales[-1]:g}")},
    )


def mlp_layers(settings: StudySettings, advance: Advance) -> Outcome:
    """Compute (g), the cosine at every layer of an MLP, and its exponent from layer 10 on."""
    seeds = settings.seed_list(24, 10)
    depth, width, readouts = settings.pick((100, 1000, 16), (60, 400, 16))
    networks = [Network(depth, 1.0, readout=r) for r in range(readouts)]
    steps = simulate(networks, width=width, seeds=seeds, mlp=True, advance=lambda n: advance(n / len(seeds)))
    cosine = steps.cos_angle.mean(axis=1)[:, 1:]
    layers = np.arange(1, depth + 1)
    fitted = slope(layers[9:], cosine[:, 9:])
    table = _table("layer", layers, depth, width, readouts, cosine, fitted)
    return Outcome(table, {"exponent": fitted})


def _table(
    axis: str, positions: np.ndarray, depth: int, width: int, readouts: int, cosine: np.ndarray, fitted: Value
) -> pandas.DataFrame:
    """Return one row per position on the axis, for cosines (seeds, positions)."""
    return pandas.DataFrame(
        {
            axis: positions,
            "depth": depth,
            "width": width,
            "cos_angle": cosine.mean(axis=0),
            "cos_angle_std": cosine.std(axis=0),
            "seeds": len(cosine),
            "readouts": readouts,
            "exponent": fitted.mean,
            "exponent_interval": fitted.error,
        }
    )
