"""Beyond the paper: the angle in a transformer over depth and through training, on real text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfs._functional import feature_stats
from fastfs._network.linearization import Linearization
from fastfs._reproduce import data
from fastfs._reproduce.paper.study import Advance, Outcome, StudySettings, Value, over_seeds, slope
from fastfs.models import Transformer
from fastfs.monitor import Monitor

__all__ = ["over_depth", "through_training"]

SCALES: Mapping[str, Callable[[int], float]] = {
    "1": lambda depth: 1.0,
    "1/sqrt(2L)": lambda depth: 1.0 / math.sqrt(2.0 * depth),
}
_WARMUP = 20
_BLOCKS = r"^blocks\.\d+$"


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the next byte."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def _model(depth: int, width: int, scale: float, seed: int) -> Transformer:
    generator = torch.Generator().manual_seed(seed)
    return Transformer(
        vocabulary=256, width=width, depth=depth, heads=4, context=64, residual_scale=scale, generator=generator
    )


def angles_at_start(model: Transformer, batch: tuple[Tensor, Tensor]) -> list[float]:
    """Return the first-order angle of the residual stream after every block.

    All parameters of the blocks move by gradient descent with the automatic rates, lr = 1/(count |g|^2) per tensor.

    Args:
        model: the transformer.
        batch: inputs and targets.

    Returns:
        Angles in radians, one per block.
    """
    linear = Linearization(model, loss_fn, batch, layers=_BLOCKS, parameters="^blocks")
    squares = [g.square().sum() for g in linear.gradients]
    directions = [-g / (len(squares) * sq) if sq > 0 else -g for g, sq in zip(linear.gradients, squares, strict=True)]
    updates = [visits[0] for visits in linear.jvp(directions).features]
    backward = [visits[0] for visits in linear.backward]
    stats = feature_stats([torch.zeros_like(u) for u in updates], updates, backward)
    return [float(angle) for angle in stats.angle]


def over_depth(settings: StudySettings, advance: Advance) -> Outcome:
    """Compute (i), the angle after every block at initialization, over depths and two residual scales."""
    seeds = settings.seed_list(5, 3)
    depths, width, rows_, length = settings.pick(((2, 4, 8, 16, 32, 64), 64, 4, 32), ((2, 4, 8, 16), 32, 4, 16))
    text = data.stdlib_text(1_000_000)
    work = sum(depths) * len(SCALES) * len(seeds)
    rows = []
    last: dict[str, list[list[float]]] = {name: [] for name in SCALES}
    for seed in seeds:
        batch = next(data.windows(text, rows_, length, seed))
        for name, scale in SCALES.items():
            ends = []
            for depth in depths:
                found = angles_at_start(_model(depth, width, scale(depth), seed), batch)
                ends.append(found[-1])
                rows += [
                    {"residual_scale": name, "depth": depth, "block": i + 1, "seed": seed, "angle": angle}
                    for i, angle in enumerate(found)
                ]
                advance(depth / work)
            last[name].append(ends)
    keys = ["residual_scale", "depth", "block"]
    table = pandas.DataFrame(rows).groupby(keys, sort=False)["angle"].agg(["mean", "std"]).reset_index()
    table = table.rename(columns={"mean": "angle", "std": "angle_std"}).assign(width=width, seeds=len(seeds))
    values: dict[str, Value] = {}
    for name, samples in last.items():
        ends_ = torch.tensor(samples, dtype=torch.float64)
        values[f"scale {name},L={depths[-1]}"] = over_seeds(ends_[:, -1].numpy())
        start = depths.index(4)
        fitted = slope(torch.tensor(depths[start:]).double().numpy(), ends_[:, start:].cos().numpy())
        values[f"scale {name},exponent"] = fitted
    return Outcome(table, values)


def through_training(settings: StudySettings, advance: Advance) -> Outcome:
    """Compute (j), the angle of actual AdamW steps through training for two residual scales, by the monitor."""
    seed = settings.first_seed
    depth, width, steps, every = settings.pick((8, 64, 400, 10), (4, 32, 60, 10))
    text = data.stdlib_text(2_000_000)
    tables = []
    values: dict[str, Value] = {}
    for name, scale in SCALES.items():
        model = _model(depth, width, scale(depth), seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=_WARMUP)
        batches = data.windows(text, 8, 64, seed)
        records: list[dict[str, Any]] = []
        losses: dict[int, float] = {}
        with Monitor(model, optimizer, layers=_BLOCKS, every=every, rows=None, sinks=[records.extend], verbose=False):
            for step in range(steps):
                optimizer.zero_grad()
                loss = loss_fn(model, next(batches))
                loss.backward()
                losses[step] = loss.item()
                optimizer.step()
                warmup.step()
                advance(1 / (steps * len(SCALES)))
        table = pandas.DataFrame([row for row in records if row.get("kind") == "measured"])
        columns = ["step", "layer", "angle", "cos_angle", "update_rms", "relative_update", "valid"]
        table = table[columns].assign(residual_scale=name, depth=depth, width=width)
        table["loss"] = table["step"].map(losses)
        tables.append(table)
        top = table[table["layer"] == table["layer"].max()].sort_values("step")
        values[f"scale {name},first"] = Value(float(top["angle"].iloc[0]), note="last block, first step")
        tail = top["angle"].iloc[-max(1, len(top) // 4) :]
        values[f"scale {name},last"] = Value(float(tail.mean()), note="last block, last quarter")
        values[f"scale {name},loss"] = Value(sum(list(losses.values())[-20:]) / 20, note="mean of the last 20 steps")
    return Outcome(pandas.concat(tables, ignore_index=True), values)
