"""Benchmark the paper's three figures of angles against a plain NumPy version of the authors' procedure.

    python -m benchmarks.reproduce [--json FILE] [--quick] [--rounds N]

(a) angle against layer, (b) output angle against depth, (c) output angle against branch scale, at full size: the same
networks, numbers of seeds and statistics. NumPy, float64: one network after the other, each with its own random
matrices; forward, backward, the gradient of every matrix as a matrix, its norm, the updated matrices, second forward,
cosines of the differences. fastfs, float32: `fastfs._reproduce.paper`, all networks at once. Both use all threads of
the machine. Means over seeds have to agree within their standard errors; the exit status is 1 if they do not, or if a
ratio is below 3.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.harness import command_line, print_table, wall_time, write_json
from fastfs._reproduce.paper import angles
from fastfs._reproduce.paper.chains import Network
from fastfs._reproduce.paper.steps import Steps

INPUTS, STEP = 10, 1e-3
REQUIRED = 3.0
AGREE = 5.0  # standard errors of a difference of means; the networks have different random matrices
ENOUGH = 60.0  # seconds after which an implementation is not timed again


@dataclass(frozen=True)
class Figure:
    """A figure at the size of this run: our computation, and whether to compare every layer's angle or the last."""

    name: str
    ours: Callable[[Sequence[int]], Steps]
    width: int
    seeds: int
    every_layer: bool


def figures(quick: bool) -> list[Figure]:
    """Return (a), (b) and (c)."""
    if quick:
        return [
            Figure("a", lambda s: angles.run_layer(s, depth=50, width=100), 100, 3, True),
            Figure("b", lambda s: angles.run_depth(s, depths=(10, 30, 50), width=100), 100, 3, False),
            Figure("c", lambda s: angles.run_scale(s, depths=(30, 50), width=100), 100, 3, False),
        ]
    return [
        Figure("a", lambda s: angles.run_layer(s), 200, 5, True),
        Figure("b", lambda s: angles.run_depth(s), 200, 5, False),
        Figure("c", lambda s: angles.run_scale(s), 500, 5, False),
    ]


def one_network(network: Network, width: int, seed: int) -> np.ndarray:
    """Run the authors' procedure for one network and return the angles of layers 1..L."""
    rng = np.random.default_rng(seed)
    depth, beta = network.depth, network.branch_scale
    skip = math.sqrt(1 - beta**2)
    x = rng.standard_normal(INPUTS)
    stem = rng.standard_normal((width, INPUTS)) / math.sqrt(INPUTS)
    matrices = [rng.standard_normal((width, width)) * math.sqrt(2 / width) for _ in range(depth)]
    head = rng.standard_normal(width) / width

    def forward(hidden: list[np.ndarray]) -> list[np.ndarray]:
        features = [stem @ x]
        for matrix in hidden:
            features.append(skip * features[-1] + beta * (matrix @ np.maximum(features[-1], 0)))
        return features

    before = forward(matrices)
    backward = [np.zeros(0)] * (depth + 1)
    backward[depth] = (head @ before[depth] - 1) * head
    for layer in range(depth, 0, -1):
        above = backward[layer]
        backward[layer - 1] = skip * above + beta * (before[layer - 1] > 0) * (matrices[layer - 1].T @ above)
    updated = []
    for layer in range(1, depth + 1):
        gradient = beta * np.outer(backward[layer], np.maximum(before[layer - 1], 0))
        rate = STEP / (depth * np.sum(gradient**2))
        updated.append(matrices[layer - 1] - rate * gradient)
    after = forward(updated)
    found = np.empty(depth)
    for layer in range(1, depth + 1):
        change, b = after[layer] - before[layer], backward[layer]
        found[layer - 1] = np.arccos(min(1.0, -change @ b / np.linalg.norm(change) / np.linalg.norm(b)))
    return found


def by_numpy(networks: Sequence[Network], width: int, seeds: int) -> list[list[np.ndarray]]:
    """Return angles by network and seed; each pair has its own random numbers."""
    return [
        [one_network(network, width, 1000 * n + seed) for seed in range(seeds)] for n, network in enumerate(networks)
    ]


def gap(ours: Steps, theirs: list[list[np.ndarray]], every_layer: bool) -> dict[str, float]:
    """Return the largest difference of means over seeds, in radians and in standard errors of the difference."""
    ours_last = ours.last(ours.angle)
    apart, spread = [], []
    for n, network in enumerate(ours.networks):
        reference = np.stack(theirs[n])
        pairs = [(ours_last[:, n], reference[:, -1])]
        if every_layer:
            pairs = [(ours.angle[:, n, layer], reference[:, layer - 1]) for layer in range(2, network.depth + 1)]
        for a, b in pairs:
            apart.append(abs(float(a.mean() - b.mean())))
            spread.append(math.sqrt(float(a.var(ddof=1)) / len(a) + float(b.var(ddof=1)) / len(b)))
    # Few seeds give a poor standard error of one mean, so errors are pooled over the figure.
    pooled = math.sqrt(statistics.mean(s**2 for s in spread))
    return {
        "largest_gap": max(apart),
        "mean_gap": statistics.mean(apart),
        "standard_error": pooled,
        "largest_in_errors": max(apart) / pooled,
    }


def measured(figure: Figure, rounds: int) -> dict[str, Any]:
    """Time both implementations alternately, and compare their results."""
    cpu = torch.device("cpu")
    seeds = range(figure.seeds)
    steps = figure.ours(seeds)  # also warms up
    networks = steps.networks
    found: list[list[list[np.ndarray]]] = []
    times: dict[str, list[float]] = {"fastfs": [], "numpy": []}
    for _ in range(rounds):
        times["fastfs"].append(wall_time(lambda: figure.ours(seeds), cpu))
        begin = time.perf_counter()
        found.append(by_numpy(networks, figure.width, figure.seeds))
        times["numpy"].append(time.perf_counter() - begin)
        if sum(times["numpy"]) > ENOUGH:
            break
    ratios = [b / a for a, b in zip(times["fastfs"], times["numpy"], strict=True)]
    return {
        "figure": figure.name,
        "networks": len(networks),
        "depths": sorted({network.depth for network in networks}),
        "width": figure.width,
        "seeds": figure.seeds,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "rounds": len(ratios),
        "ratio": statistics.median(ratios),
        "agreement": gap(steps, found[0], figure.every_layer),
    }


def main() -> int:
    arguments = command_line(__doc__, quick="small networks, without a required ratio")
    if arguments.device.type != "cpu":
        sys.exit("this benchmark is for the CPU")
    results = [measured(figure, 1 if arguments.quick else arguments.rounds) for figure in figures(arguments.quick)]
    rows = [
        [
            result["figure"],
            f"{result['networks']} x {result['seeds']}",
            f"{result['seconds']['numpy']:.2f}",
            f"{result['seconds']['fastfs']:.3f}",
            f"{result['ratio']:.1f}",
            f"{result['agreement']['largest_gap']:.3f}",
            f"{result['agreement']['largest_in_errors']:.1f}",
        ]
        for result in results
    ]
    columns = ["figure", "networks x seeds", "NumPy, s", "fastfs, s", "ratio", "largest gap, rad", "in standard errors"]
    print_table("seconds for a figure's numbers; means over seeds compared", columns, rows)
    if arguments.json:
        write_json(arguments.json, arguments.device, results)
    apart = [r["figure"] for r in results if not r["agreement"]["largest_in_errors"] <= AGREE]
    slow = [r["figure"] for r in results if r["ratio"] < REQUIRED and not arguments.quick]
    if apart:
        print(f"means that are further apart than {AGREE:g} standard errors: {', '.join(apart)}")
    if slow:
        print(f"less than {REQUIRED:g} times as fast: {', '.join(slow)}")
    return 1 if apart or slow else 0


if __name__ == "__main__":
    sys.exit(main())
