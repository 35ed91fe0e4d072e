"""Models with losses and batches to measure the formula on, and what a measurement has to leave alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfs.models import MLP, ResNet, Transformer


class ConvResNet(nn.Module):
    """Residual blocks of convolution and batch normalisation between strided convolutions."""

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv2(F.relu(self.norm(self.conv1(x)), inplace=True))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.blocks = nn.ModuleList(ConvResNet.Block(8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(x).mean(dim=(2, 3)))


def squared(model: Any, batch: Any) -> Any:
    inputs, targets = batch
    return (model(inputs) - targets).square().sum() / (2 * len(inputs))


def classified(model: Any, batch: Any) -> Any:
    return F.cross_entropy(model(batch[0]), batch[1])


def next_token(model: Any, tokens: Any) -> Any:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def case(name: str) -> tuple[Any, ...]:
    """Model, loss and batch."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    vectors = torch.randn(6, 10, generator=generator), torch.randn(6, 1, generator=generator)
    if name == "mlp":
        return MLP(10, 32, 6, generator=generator), squared, vectors
    if name == "resnet":
        return ResNet(10, 32, 6, generator=generator), squared, vectors
    if name == "convolutional":
        images = torch.randn(5, 3, 12, 12, generator=generator), torch.tensor([0, 1, 2, 3, 0])
        return ConvResNet(), classified, images
    tokens = torch.randint(0, 40, (3, 13), generator=generator)
    return Transformer(40, 32, 3, 2, 12, dropout=0.1, generator=generator), next_token, tokens


def leave(model: Any) -> tuple[Any, ...]:
    """Everything of a model that a measurement has to leave alone."""
    tensors = [*model.parameters(), *model.buffers()]
    return [t.detach().clone() for t in tensors], [p.grad for p in model.parameters()], torch.get_rng_state()


def assert_left(model: Any, before: Any) -> None:
    tensors, gradients, rng = leave(model)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before[0], strict=True))
    assert all(a is b for a, b in zip(gradients, before[1], strict=True))
    assert torch.equal(rng, before[2])
