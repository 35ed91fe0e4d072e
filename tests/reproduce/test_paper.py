"""The measurement against published numbers: output angles of the ReLU ResNet, from the authors' public notebooks.

Single input, squared loss, one output, d = 10, width 200; the hidden matrices take one step of gradient descent with
the learning rates lr_l = 1e-3 / (L |g_l|^2). Means over seeds, whose spread is about 0.03.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch

import fastfs
from fastfs.models import ResNet


def output_angle(depth: int, branch_scale: float, seed: int, device: str = "cpu") -> float:
    """Return the backward-feature angle of the last block in the first step, in radians."""
    generator = torch.Generator().manual_seed(seed)
    model = ResNet(10, 200, depth, branch_scale=branch_scale, generator=generator).double().to(device)
    x = torch.randn(1, 10, generator=generator, dtype=torch.float64).to(device)
    seen: list[torch.Tensor] = []
    hook = model.blocks[-1].register_forward_hook(lambda _module, _args, output: seen.append(output))
    with hook:
        loss = (model(x) - 1).square().sum() / 2
        matrices = list(model.blocks.parameters())
        backward, *gradients = torch.autograd.grad(loss, [seen[0], *matrices])
        with torch.no_grad():
            for matrix, gradient in zip(matrices, gradients, strict=True):
                matrix -= 1e-3 / (depth * gradient.square().sum()) * gradient  # type: ignore[misc]
            model(x)
    return float(fastfs.feature_stats(seen[0], seen[1], backward).angle)


@pytest.mark.parametrize(
    ("depth", "branch_scale", "low", "high"),
    [
        (30, 0.1 / math.sqrt(30), 0.07, 0.08),
        (100, 0.1 / math.sqrt(100), 0.07, 0.08),
        (30, 0.5 / math.sqrt(30), 0.34, 0.37),
        (100, 0.5 / math.sqrt(100), 0.34, 0.37),
        (30, 1 / math.sqrt(30), 0.65, 0.70),
        (100, 1 / math.sqrt(100), 0.65, 0.70),
        (30, 2 / math.sqrt(30), 1.04, 1.05),
        (100, 2 / math.sqrt(100), 1.04, 1.05),
        (100, 1.0, 1.45, 1.45),  # the MLP
    ],
)
def test_output_angle_is_the_published_one(depth: int, branch_scale: float, low: float, high: float) -> None:
    mean = statistics.mean(output_angle(depth, branch_scale, seed) for seed in range(5))
    assert low - 0.03 <= mean <= high + 0.03
