"""Building blocks of the architectures in :mod:`benchmarks.auto_layers.styles`, and the type of their entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 16
VOCABULARY = 32
TOKENS = 8


@dataclass(frozen=True)
class Entry:
    """One architecture and the assessment of its selected layers.

    Attributes:
        name: name of the architecture.
        build: returns the model and a function that runs it and returns a scalar.
        count, first, last: the assessed layers; the table is not written if others are selected.
        verdict: result of the assessment.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]
    count: int
    first: str
    last: str
    verdict: str = "right"


def on(*shapes: tuple[int, ...]) -> Callable[[nn.Module], Tensor]:
    """Return a function that runs a model on random inputs of these shapes."""
    return lambda model: total(model(*(torch.randn(shape) for shape in shapes)))


def on_ids(*shapes: tuple[int, ...]) -> Callable[[nn.Module], Tensor]:
    """Return a function that runs a model on random token ids."""
    return lambda model: total(model(*(torch.randint(VOCABULARY, shape) for shape in shapes)))


def total(output: Any) -> Tensor:
    """Return a scalar that depends on all parts of an output."""
    if isinstance(output, Tensor):
        return output.float().square().mean() + output.float().sin().mean()
    found = [total(x) for x in (output.values() if hasattr(output, "values") else output) if x is not None]
    return torch.stack(found).sum()


class Attention(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class FeedForward(nn.Module):
    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width)
        self.ln_2, self.mlp = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PreNorm(nn.Module):
    def __init__(self, fn: nn.Module, residual: bool = False) -> None:
        super().__init__()
        self.fn, self.norm, self.residual = fn, nn.LayerNorm(WIDTH), residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.fn(self.norm(x))
        return x + y if self.residual else y


class ConvBlock(nn.Module):
    """Two convolutions, and a skip connection if sizes agree."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def double_conv(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inner, outer, 3, padding=1),
        nn.BatchNorm2d(outer),
        nn.ReLU(),
        nn.Conv2d(outer, outer, 3, padding=1),
        nn.BatchNorm2d(outer),
        nn.ReLU(),
    )


class DoubleConv(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.double_conv = double_conv(inner, outer)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)
