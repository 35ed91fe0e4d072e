"""Models whose layers' own parameters are known, optimizers of every kind, and a loop that notes its steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from tests.helpers.monitor_loops import Net, muon

Row = dict[str, Any]


class Convolutions(nn.Module):
    """A stem, residual convolutions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.ModuleList(Convolution(4) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.reshape(-1, 2, 2, 2))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


class Convolution(nn.Module):
    """``f + tanh(convolution(f))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.convolution(x))


class Words(nn.Module):
    """A transformer whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding((x.abs() * 40).long() % 11)
        for block in self.blocks:
            x = block(x)
        return F.linear(x.mean(dim=1), self.embedding.weight)[:, :3]


class Zeros(Net):
    """Blocks that begin at zero, as the second factors of low-rank adapters do."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            for p in block.parameters():
                nn.init.zeros_(p)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Net,
    "convolutions": Convolutions,
    "tied transformer": Words,
    "zeros": Zeros,
}
OPTIMIZERS: dict[str, Callable[[nn.Module], list[torch.optim.Optimizer]]] = {
    "sgd": lambda model: [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)],
    "adamw": lambda model: [torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)],
    "muon": muon,
    "adafactor": lambda model: [torch.optim.Adafactor(model.parameters(), lr=0.02)],
}


def own_parameters(model: nn.Module, layer: int) -> list[Tensor]:
    """Returns the parameters upstream of a block and of no block before."""
    first = "stem." if hasattr(model, "stem") else "embedding."
    names = (f"blocks.{layer}.", first) if layer == 0 else (f"blocks.{layer}.",)
    return [p for name, p in model.named_parameters() if name.startswith(names)]


class Steps:
    """A loop, with the vectors w, dw and g of each layer's own parameters of every step, in float64.

    Args:
        model: Trained in place.
        optimizers: Of the loop.
        steps: How many.
        micro_batches: Of each step.
        clip: Norm to which gradients are clipped.
        monitor: Arguments of the monitor.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        steps: int = 5,
        micro_batches: int = 1,
        clip: float | None = None,
        **monitor: Any,
    ) -> None:
        self.model, self.rows = model, []  # type: tuple[nn.Module, list[Row]]
        self.seen: list[list[tuple[Tensor, Tensor, Tensor]]] = []
        options: dict[str, Any] = {"every": 2, "aligned_every": 1, "layers": r"blocks\.\d+$", "alerts": ()} | monitor
        dtype = next(model.parameters()).dtype
        generator = torch.Generator().manual_seed(1)
        with fastfs.Monitor(model, optimizers, sinks=[self.rows.extend], verbose=False, **options):
            for _ in range(steps):
                model.zero_grad()
                for _ in range(micro_batches):
                    x = torch.randn(6, 8, generator=generator, dtype=torch.float64).to(dtype)
                    y = torch.randint(3, (6,), generator=generator)
                    (F.cross_entropy(model(x), y) / micro_batches).backward()
                before = copy.deepcopy(model)
                for new, old in zip(before.parameters(), model.parameters(), strict=True):
                    new.grad = None if old.grad is None else old.grad.clone()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                for optimizer in optimizers:
                    optimizer.step()
                self.note(before, model)

    def note(self, before: nn.Module, after: nn.Module) -> None:
        """Keeps what a test compares with: of copies before the step and the model after it."""
        self.seen.append([vectors(before, after, layer) for layer in range(len(before.blocks))])

    @property
    def by_place(self) -> dict[tuple[int, int], Row]:
        """The rows of the record by step and layer."""
        return {(row["step"], row["layer"]): row for row in self.rows if row["kind"] in ("measured", "predicted")}


def vectors(before: nn.Module, after: nn.Module, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns w, dw and g of a layer's own parameters, float64 (n,)."""
    old, new = own_parameters(before, layer), own_parameters(after, layer)
    w = torch.cat([p.detach().double().flatten() for p in old])
    dw = torch.cat([(n.detach().double() - o.detach().double()).flatten() for o, n in zip(old, new, strict=True)])
    g = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).double().flatten() for p in old])
    return w, dw, g


def angle(a: Tensor, b: Tensor) -> float:
    """Returns the angle between two vectors, accurate for small ones (W. Kahan: 2 atan2(|a' - b'|, |a' + b'|))."""
    a, b = a / a.norm(), b / b.norm()
    return 2 * math.atan2(float((a - b).norm()), float((a + b).norm()))
