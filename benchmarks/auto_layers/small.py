"""Architectures in the styles of public scripts: sequences, small networks, and wrappers around models."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.auto_layers.parts import VOCABULARY, WIDTH, Block, FeedForward
from benchmarks.auto_layers.text import PairViT


class Classifier(nn.Module):
    """An LSTM between an embedding and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.lstm(self.embedding(ids))[0][:, -1])


class LSTMStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(3)])
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return self.out(x)


class WaveNet(nn.Module):
    """Parallel lists: the n-th members of all form the n-th layer."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.start = nn.Conv1d(4, WIDTH, 1)
        self.filter_convs, self.gate_convs = (
            nn.ModuleList([nn.Conv1d(WIDTH, WIDTH, 3, padding=2**i, dilation=2**i) for i in range(depth)])
            for _ in range(2)
        )
        self.residual_convs, self.skip_convs = (
            nn.ModuleList([nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(depth)]) for _ in range(2)
        )
        self.end = nn.Conv1d(WIDTH, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skip = self.start(x), torch.zeros(())
        for wave, gate, residual, skipped in zip(
            self.filter_convs, self.gate_convs, self.residual_convs, self.skip_convs, strict=True
        ):
            y = wave(x).tanh() * gate(x).sigmoid()
            skip = skip + skipped(y)
            x = x + residual(y)
        return self.end(F.relu(skip)) + 0 * x.mean()


class Module(nn.Module):
    """The model in an attribute, as in training frameworks, next to a frozen copy of it."""

    def __init__(self, model: nn.Module, ema: bool = False) -> None:
        super().__init__()
        self.model = model
        if ema:
            self.teacher = copy.deepcopy(model).requires_grad_(False)

    def forward(self, *args: Tensor) -> Tensor:
        y = self.model(*args)
        return y - self.teacher(*args) if hasattr(self, "teacher") else y


class Probe(nn.Module):
    """A frozen backbone with a trained head."""

    def __init__(self, trained_blocks: int = 0) -> None:
        super().__init__()
        self.backbone = PairViT().transformer if not trained_blocks else nn.Sequential(*[Block() for _ in range(3)])
        self.backbone.requires_grad_(False)
        for block in list(self.backbone.children())[:trained_blocks]:
            block.requires_grad_(True)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean(dim=1))


class Coupling(nn.Module):
    def __init__(self, half: int = 4) -> None:
        super().__init__()
        self.scale_net, self.shift_net = (
            nn.Sequential(nn.Linear(half, WIDTH), nn.Tanh(), nn.Linear(WIDTH, half)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([b * self.scale_net(a).tanh().exp() + self.shift_net(a), a], dim=-1)


def flow() -> nn.Module:
    return nn.Sequential(*[Coupling() for _ in range(3)])


class MultiTask(nn.Module):
    """A trunk of single layers, and a list of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.heads = nn.ModuleList([FeedForward() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([head(self.trunk(x)) for head in self.heads])


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = (
            nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, size))
            for size in (3, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.actor(x) + self.critic(x)


class NeRF(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pts_linears = nn.ModuleList([nn.Linear(3, WIDTH)] + [nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.feature_linear, self.alpha_linear = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.views_linears = nn.ModuleList([nn.Linear(WIDTH + 3, WIDTH)])
        self.rgb_linear = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, view: Tensor) -> Tensor:
        for linear in self.pts_linears:
            x = F.relu(linear(x))
        y = torch.cat([self.feature_linear(x), view], dim=-1)
        for linear in self.views_linears:
            y = F.relu(linear(y))
        return torch.cat([self.rgb_linear(y), self.alpha_linear(x)], dim=-1)


class SineLayer(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sin()


def siren() -> nn.Module:
    return nn.Sequential(SineLayer(3), SineLayer(WIDTH), SineLayer(WIDTH), nn.Linear(WIDTH, 1))


class GraphConv(nn.Module):
    """A linear map and the mean over neighbors with its own bias, as in message passing."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inner, WIDTH, bias=False)
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.lin(x) + self.bias


class GNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([GraphConv(8), GraphConv(WIDTH), GraphConv(WIDTH)])
        self.bns = nn.ModuleList([nn.BatchNorm1d(WIDTH) for _ in range(3)])
        self.lin = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        adjacency = torch.ones(len(x), len(x)) / len(x) + torch.eye(len(x))
        for conv, norm in zip(self.convs, self.bns, strict=True):
            x = F.relu(norm(conv(x, adjacency)))
        return self.lin(x)
