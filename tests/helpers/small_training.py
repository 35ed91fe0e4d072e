"""A tiny training run for tests of sinks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import fastfs

STEPS = 6


def train(each: Callable[[int], object] = lambda step: None, *, steps: int = STEPS, **options: Any) -> Any:
    """Trains with a monitor and calls a function after each step.

    Returns:
        Everything that a monitor must not change, and the monitor, still attached.
    """
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global one
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = None
    if options:
        given = {"every": 1, "layers": ["0", "1", "2"], "groups": {"linear": "^[02]$"}, "verbose": False}
        monitor = fastfs.Monitor(model, optimizer, **{**given, **options})
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(5, 4) * random.random() * np.random.rand()  # noqa: NPY002
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        each(step)
    state = [parameter.detach().clone() for parameter in model.parameters()]
    generators = [random.getstate(), repr(np.random.get_state()), torch.get_rng_state()]  # noqa: NPY002
    return [losses, state, *generators], monitor


def same(one: Any, other: Any) -> bool:
    """Whether two results of :func:`train` are equal bit by bit."""
    tensors = [*zip(one[1], other[1], strict=True), (one[4], other[4])]
    return one[0] == other[0] and one[2:4] == other[2:4] and all(torch.equal(a, b) for a, b in tensors)
