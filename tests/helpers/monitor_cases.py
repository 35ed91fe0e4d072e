"""Models and training loops for the monitor's tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs.models import ResNet, Transformer


class BatchNormNet(nn.Module):
    """Batch statistics, running buffers, and an in-place ReLU right after each watched layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(3))
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.relu(block(x), inplace=True)
        return self.head(self.drop(x))


class HostRandomNet(nn.Module):
    """Skips blocks by Python's generator and scales by NumPy's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if random.random() < 0.7:
                x = x + torch.tanh(block(x)) * float(np.random.rand())  # noqa: NPY002  the global generator
        return x[:, :3]


class SpectralNet(nn.Module):
    """A parametrisation that updates buffers in every training forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def rows(step: int, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(16, width, generator=generator), torch.randint(3, (16,), generator=generator)


def wide_rows(step: int) -> tuple[Tensor, Tensor]:
    x, y = rows(step)
    return x.double(), y


def tokens(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(256, (2, 13), generator=generator)
    return text[:, :-1], text[:, 1:]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@dataclass(frozen=True)
class Case:
    """A training loop with everything that a monitor could disturb."""

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    batch: Callable[[int], tuple[Tensor, Tensor]] = rows
    micro_batches: int = 1
    clip: float | None = None
    autocast: bool = False

    def run(self, steps: int, attach: Callable[[nn.Module, torch.optim.Optimizer], Any] | None) -> dict[str, Any]:
        """Train; return everything that must not depend on whether a monitor is attached."""
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002
        model = self.model()
        optimizer = self.optimizer(model)
        monitor = attach(model, optimizer) if attach else None
        trace: list[Tensor] = []
        for step in range(steps):
            optimizer.zero_grad()
            for part in range(self.micro_batches):
                x, y = self.batch(step * self.micro_batches + part)
                with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                    loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten()) / self.micro_batches
                loss.backward()
                trace.append(loss.detach().clone())
                # What a loop may draw between a forward and the step, from every generator.
                trace.append(torch.rand(1) + random.random() + np.random.rand())  # noqa: NPY002
            if self.clip is not None:
                trace.append(nn.utils.clip_grad_norm_(model.parameters(), self.clip))
            optimizer.step()
            trace += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            trace += [b.clone() for b in model.buffers()]
        result = {
            "trace": trace,
            "parameters": [p.detach().clone() for p in model.parameters()],
            "state": [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)],
            "torch_rng": [torch.get_rng_state()],
            "python_rng": random.getstate(),
            "numpy_rng": np.random.get_state()[1].tolist(),  # noqa: NPY002
            "training": [m.training for m in model.modules()],
        }
        if monitor is not None:
            monitor.close()
        return result


def small_transformer() -> nn.Module:
    return Transformer(width=16, depth=3, heads=2, context=12, dropout=0.2)


CASES = [
    Case("transformer-dropout-adamw", small_transformer, adamw, tokens),
    Case("transformer-autocast", small_transformer, adamw, tokens, autocast=True),
    Case("transformer-accumulation-clipping", small_transformer, sgd, tokens, micro_batches=3, clip=0.1),
    Case("transformer-tied", lambda: Transformer(width=16, depth=2, heads=2, context=12, tied=True), adamw, tokens),
    Case("resnet-sgd", lambda: ResNet(8, 16, 5, 3), sgd),
    Case("resnet-clipping", lambda: ResNet(8, 16, 5, 3), sgd, clip=0.01),
    Case("batchnorm-inplace-relu", BatchNormNet, sgd),
    Case("batchnorm-accumulation", BatchNormNet, adamw, micro_batches=2),
    Case("host-random", HostRandomNet, sgd),
    Case("spectral-norm", SpectralNet, sgd),
]


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            assert len(value) == len(second[key]), key
            for a, b in zip(value, second[key], strict=True):
                assert torch.equal(a, b), key
        else:
            assert value == second[key], key


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, batch: Callable[[int], Any] = rows) -> None:
    """A plain loop."""
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()


def measured_into(seen: list[dict[str, Any]]) -> Callable[[list[dict[str, Any]]], None]:
    """A sink that keeps the rows of measured steps."""
    return lambda rows: seen.extend(row for row in rows if row["kind"] == "measured")


def watched(layers: Any = r"blocks\.\d+$", every: Any = 1, model: nn.Module | None = None, **options: Any) -> Any:
    """A model, its optimizer, the list that rows go to, and the monitor."""
    model = ResNet(8, 16, 3, 3) if model is None else model
    optimizer = sgd(model)
    seen: list[dict[str, Any]] = []
    return (
        model,
        optimizer,
        seen,
        fastfs.Monitor(model, optimizer, layers=layers, every=every, sinks=[measured_into(seen)], **options),
    )
