"""Models and loops for samples=: second forwards on a few samples of each batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from tests.helpers.monitor_cases import measured_into

BATCH, TOKENS, WIDTH = 12, 5, 8


class Block(nn.Module):
    """Attention over the tokens of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + torch.tanh(self.linear(x))


class Mixer(nn.Module):
    """Blocks, and what a test puts between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x, depth: int = 3) -> None:
        super().__init__()
        self.between = between
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.between(block(x))
        out: Tensor = self.head(x)
        return out


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out


class Flat(nn.Module):
    """Tokens of all samples in one dimension, as experts see them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        out: Tensor = self.head(x.reshape(shape))
        return out


def vectors(step: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(batch, TOKENS, WIDTH, generator=generator) + 2 * torch.randn(batch, 1, WIDTH, generator=generator)
    return x.double(), torch.randint(3, (batch, TOKENS), generator=generator)


def images(step: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(batch, 4, 6, 6, generator=generator).double()
    return x, torch.randint(3, (batch,), generator=generator)


def setting(model: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, Any, list[dict[str, Any]], Any]:
    torch.manual_seed(0)
    net = model().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    seen: list[dict[str, Any]] = []
    keywords: dict[str, Any] = {"layers": r"blocks\.\d+$", "every": 1, "verbose": False, "alerts": ()} | options
    sinks = [measured_into(seen), *keywords.pop("sinks", [])]
    return net, optimizer, seen, fastfs.Monitor(net, optimizer, sinks=sinks, **keywords)


def advance(model: nn.Module, optimizer: Any, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
    optimizer.zero_grad()
    for x, y in parts:
        (F.cross_entropy(model(x).flatten(0, -2), y.flatten()) / len(parts)).backward()
    optimizer.step()
