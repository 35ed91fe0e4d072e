"""Runs for the comparison of records: trained in a second, or made of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import fastfs
from fastfs._compare.runs import RecordedRun
from fastfs._report.grids import Grid
from fastfs.models import MLP

NAMES = tuple(f"blocks.{i}" for i in range(5))


def train(
    path: Path,
    *,
    seed: int = 0,
    changed: int | None = None,
    factor: float = 1.1,
    optimizer: str = "SGD",
    steps: int = 7,
    every: int = 3,
    depth: int = 6,
    width: int = 16,
    **settings: Any,
) -> Path:
    """Trains an MLP on random data and writes a record; of one block the learning rate is multiplied by ``factor``."""
    torch.manual_seed(seed)
    model = MLP(8, width, depth, 3, output_std=0.3)
    own = [] if changed is None else list(model.blocks[changed].parameters())
    rest = [p for p in model.parameters() if not any(p is one for one in own)]
    made: Any = getattr(torch.optim, optimizer)
    lr = 0.1 if optimizer == "SGD" else 1e-2
    groups = [{"params": rest}, *([{"params": own, "lr": lr * factor}] if own else [])]
    trained = made(groups, lr=lr)
    with fastfs.Monitor(model, trained, every=every, path=path, verbose=False, **settings) as monitor:
        for _ in range(steps):
            inputs, targets = torch.randn(32, 8), torch.randint(0, 3, (32,))
            trained.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            monitor.log(loss=loss.item())
            trained.step()
    return path


def made(
    columns: dict[str, Any], *, label: str, steps: list[int] | None = None, names: tuple[str, ...] | None = None
) -> RecordedRun:
    """A run with the given values (layers, steps), all of them valid."""
    shape = next(iter(columns.values())).shape
    names = tuple(f"layer {i}" for i in range(shape[0])) if names is None else names
    nothing = np.full(shape[1], np.nan)
    cells = np.zeros(shape, bool)
    numbers = np.arange(shape[1]) if steps is None else np.array(steps)
    grid = Grid(numbers, nothing, nothing, nothing, columns, cells, cells.astype(np.uint8), ["no reason given"])
    return RecordedRun(label, {"run": label}, names, grid)


def noisy(rng: np.random.Generator, layers: int, steps: int, label: str, *, tails: float | None = None) -> RecordedRun:
    """A run whose logarithms are noise, with a part that all layers share, another size per layer, or heavy tails."""

    def column(scale: float) -> Any:
        draw = rng.standard_normal if tails is None else lambda shape: rng.standard_t(tails, shape)
        noise = draw((layers, steps)) * np.linspace(0.5, 2, layers)[:, None]
        return np.exp(scale * (noise + rng.standard_normal(steps)))

    names = ("feature_rms", "backward_rms", "gradient_norm", "parameter_norm", "parameter_update_norm", "update_rms")
    return made({name: column(0.05) for name in names}, label=label)
