"""Networks of all kinds for the tests of the spectrum, and their kernels from explicit Jacobians."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfs._network.linearization import Linearization
from fastfs.models import MLP, ResNet, Transformer


class ConvResNet(nn.Module):
    """Convolutional residual network with BatchNorm and dropout."""

    def __init__(self, width: int = 3, depth: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(_ConvBlock(width, dropout) for _ in range(depth))
        self.head = nn.Linear(width, 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for block in self.blocks:
            features = block(features)
        return self.head(features.mean(dim=(2, 3)))


class _ConvBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.dropout(self.conv(F.relu(self.norm(features))))


@dataclass
class Case:
    """A network with what measures it."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    batch: Any
    layer: str

    def linearization(self) -> Linearization:
        return Linearization(self.model, self.loss_fn, self.batch, layers=[self.layer], dtype=torch.float64)


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().sum(dim=-1).mean()


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def rows(count: int, inputs: int, outputs: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, inputs, generator=generator), torch.randn(count, outputs, generator=generator)


def mlp() -> Case:
    generator = torch.Generator().manual_seed(0)
    return Case(MLP(5, 8, 4, 2, generator=generator), squared, rows(3, 5, 2), "blocks.2")


def resnet() -> Case:
    generator = torch.Generator().manual_seed(0)
    return Case(ResNet(6, 7, 3, 2, generator=generator), squared, rows(3, 6, 2), "blocks.1")


def convolution(training: bool = False, dropout: float = 0.0) -> Case:
    torch.manual_seed(0)
    model = ConvResNet(dropout=dropout).train(training)
    images = torch.randn(2, 1, 4, 4)
    return Case(model, squared, (images, torch.randn(2, 2)), "blocks.1")


def transformer(dropout: float = 0.0) -> Case:
    generator = torch.Generator().manual_seed(0)
    model = Transformer(9, 8, 2, 2, 5, dropout=dropout, generator=generator)
    return Case(model, next_token, torch.randint(0, 9, (2, 5), generator=generator), "blocks.1")


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "resnet": resnet,
    "convolution": convolution,
    "convolution in training": lambda: convolution(training=True),
    "convolution with dropout": lambda: convolution(training=True, dropout=0.3),
    "transformer": transformer,
    "transformer with dropout": lambda: transformer(dropout=0.2),
}


def jacobians(case: Case) -> dict[str, Tensor]:
    """Explicit df/dw of every parameter, (N, entries), float64: by reverse mode, row after row."""
    lin = case.linearization()
    found = torch.func.jacrev(lin.function(0))(lin.parameters)
    size = lin.features[0][0].numel()
    return {name: j.reshape(size, -1) for name, j in zip(lin.names, found, strict=True)}


def kernel(case: Case, rates: dict[str, Tensor | float] | float = 1.0) -> Tensor:
    """sum of J diag(rate) J^T, (N, N)."""
    total: Tensor | float = 0.0
    for name, j in jacobians(case).items():
        rate = torch.as_tensor(rates[name] if isinstance(rates, dict) else rates, dtype=torch.float64)
        total = total + (j * rate.reshape(1, -1)) @ j.T
    assert isinstance(total, Tensor)
    return total


def spectrum_of(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    matrix = (basis * values) @ basis.T
    return 0.5 * (matrix + matrix.T)
