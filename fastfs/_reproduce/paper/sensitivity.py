"""Movement of the last hidden features for a given decrease of the loss, against depth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas

from fastfs._reproduce.paper.chains import Network, Rates
from fastfs._reproduce.paper.steps import simulate
from fastfs._reproduce.paper.study import Advance, Outcome, StudySettings, Value, over_seeds, slope
from fastfs.scaling import Rule, mlp, resnet

__all__ = ["MLP_DEPTHS", "MLP_SCHEMES", "against_depth", "mlp_sensitivity", "resnet_sensitivity"]

MLP_SCHEMES = ("ntk", "mup", "fsc")
MLP_DEPTHS = (5, 10, 20, 40)
RESNET_DEPTHS = (20, 40, 60, 80, 100)
RESNET_SCALES = ("1/sqrt(L)", "1/L")
_INPUTS, _STEP = 10, 1e-3


def network_of(rule: Rule, depth: int) -> Network:
    """Return the simulator's network of a scaling rule for input |x| = 1."""
    first, hidden, last = rule.layers[0], rule.layers[1], rule.layers[-1]
    rates = Rates(stem=first.lr, hidden=hidden.lr, head=last.lr)
    return Network(depth, rule.branch_scale or 1.0, output_std=last.std, rates=rates)


def mlp_sensitivity(depths: Sequence[int], width: int, seeds: Sequence[int], advance: Advance) -> np.ndarray:
    """Return S of ReLU MLPs, (seeds, depths, schemes). All matrices are trained and counted in depth; |x| = y = 1."""
    networks = [
        network_of(mlp(depth, width, _INPUTS, scheme=scheme, input="sparse"), depth - 2)
        for depth in depths
        for scheme in MLP_SCHEMES
    ]
    steps = simulate(
        networks, width=width, seeds=seeds, in_features=_INPUTS, unit_input=True, mlp=True, step=_STEP,
        advance=lambda n: advance(n / len(seeds)),
    )  # fmt: skip
    return steps.sensitivity.reshape(len(seeds), len(depths), len(MLP_SCHEMES))


def resnet_sensitivity(depths: Sequence[int], width: int, seeds: Sequence[int], advance: Advance) -> np.ndarray:
    """Return S of ReLU ResNets with output std 1/m, (seeds, depths, scales), for branch scales 1/sqrt(L) and 1/L."""
    networks = [
        network_of(resnet(depth, width, beta, in_dim=_INPUTS, scheme="mup", input="sparse"), depth)
        for depth in depths
        for beta in (1 / math.sqrt(depth), 1 / depth)
    ]
    steps = simulate(
        networks, width=width, seeds=seeds, in_features=_INPUTS, unit_input=True, step=_STEP,
        advance=lambda n: advance(n / len(seeds)),
    )  # fmt: skip
    return steps.sensitivity.reshape(len(seeds), len(depths), len(RESNET_SCALES))


def against_depth(settings: StudySettings, advance: Advance) -> Outcome:
    """Compute (e), sensitivity against depth; ``ntk`` uses medians, because its residual can be near 0."""
    seeds = settings.seed_list(40, 20)
    width = 400
    depths, deep = settings.pick((*MLP_DEPTHS, 80), MLP_DEPTHS), settings.pick(RESNET_DEPTHS, (20, 50, 100))
    chains = mlp_sensitivity(depths, width, seeds, lambda part: advance(part / 2))
    residual = resnet_sensitivity(deep, width, seeds, lambda part: advance(part / 2))
    rows = []
    families = (("MLP", depths, MLP_SCHEMES, chains), ("ResNet", deep, RESNET_SCALES, residual))
    for family, sizes, schemes, samples in families:
        for i, depth in enumerate(sizes):
            for n, scheme in enumerate(schemes):
                low, median, high = np.quantile(samples[:, i, n], (0.25, 0.5, 0.75))
                rows.append(
                    {
                        "network": family,
                        "scaling": scheme,
                        "depth": depth,
                        "width": width,
                        "sensitivity": float(samples[:, i, n].mean()),
                        "median": float(median),
                        "quartile_low": float(low),
                        "quartile_high": float(high),
                        "seeds": len(seeds),
                    }
                )
    values: dict[str, Value] = {}
    for i, depth in enumerate(depths):
        if depth in MLP_DEPTHS:
            low, median, high = np.quantile(chains[:, i, 0], (0.25, 0.5, 0.75))
            # Standard error of a median from the quartiles: 1.2533 sigma / sqrt(n), with sigma = range / 1.349.
            error = 1.2533 * (high - low) / 1.349 / math.sqrt(len(seeds))
            values[f"ntk,L={depth}"] = Value(float(median), float(error), "median")
            for n in (1, 2):
                values[f"{MLP_SCHEMES[n]},L={depth}"] = over_seeds(chains[:, i, n])
    published = [i for i, depth in enumerate(depths) if depth in MLP_DEPTHS]
    for n in (1, 2):
        values[f"{MLP_SCHEMES[n]},exponent"] = slope(np.array(MLP_DEPTHS, float), chains[:, published, n])
    for n, scale in enumerate(RESNET_SCALES):
        values[f"resnet {scale},exponent"] = slope(np.array(deep, float), residual[:, :, n])
    return Outcome(pandas.DataFrame(rows), values)
