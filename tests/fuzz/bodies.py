"""Small models for generated loops: (8, 6) in, (8, 6) out."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["LAYERS", "ROWS", "WIDTH", "Switch", "Tagged", "make_body"]

ROWS, WIDTH = 8, 6


@dataclass
class Switch:
    """What the forward of a model depends on besides parameters, buffers and inputs.

    Attributes:
        exact: everything in float64, in plain sight: no casts, no autocast, no checkpoints.
        generator: of the model's own dropout.
        again: a checkpoint around the blocks, ``use_reentrant``.
        skip: the forward runs without gradient, for a recomputation of its own.
    """

    exact: bool = False
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(11))
    again: bool | None = None
    autocast: bool = False


class Tagged(Tensor):
    """An input with an attribute."""

    tag: float

    @staticmethod
    def of(x: Tensor, tag: float) -> Tagged:
        tagged: Tagged = x.as_subclass(Tagged)
        tagged.tag = tag
        return tagged


class OwnDropout(nn.Module):
    """Dropout that draws from a generator of its own."""

    def __init__(self, switch: Switch) -> None:
        super().__init__()
        self.switch = switch

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape, generator=self.switch.generator) > 0.2).to(x.dtype) / 0.8


def _norm(kind: str) -> nn.Module:
    return {"none": nn.Identity(), "batch": nn.BatchNorm1d(WIDTH), "layer": nn.LayerNorm(WIDTH)}[kind]


def _drop(kind: str, switch: Switch) -> nn.Module:
    return {"none": nn.Identity(), "global": nn.Dropout(0.2), "own generator": OwnDropout(switch)}[kind]


class CastLinear(nn.Linear):
    """Casts by hand to bfloat16."""

    switch: Switch

    def forward(self, x: Tensor) -> Tensor:
        if self.switch.exact:
            return super().forward(x)
        return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).to(x.dtype)


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, WIDTH) * 0.5)
        self.up = nn.Parameter(torch.zeros(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=WIDTH)


class Experts(nn.Module):
    """The best of three experts for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, which = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = which == number
            out = out.index_put((rows.nonzero()[:, 0],), expert(x[rows]).to(out.dtype))
        return out * weight[:, None].to(out.dtype)


class Codes(nn.Module):
    """The nearest code, with a straight-through gradient beside its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(WIDTH, WIDTH)
        self.codes = nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x).to(self.codes.dtype)
        which = (z.detach()[:, None] - self.codes.detach()).square().sum(-1).argmin(-1)
        return self.codes[which] + z - z.detach()


class Block(nn.Module):
    """``x + drop(tanh(norm(linear(x))))``; without the ``x`` in a chain."""

    def __init__(self, linear: nn.Module, recipe: Any, switch: Switch, *, residual: bool = True) -> None:
        super().__init__()
        self.linear = linear
        self.norm = _norm(recipe.norm)
        self.drop = _drop(recipe.drop, switch)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(torch.tanh(self.norm(self.linear(x))))
        return x + y if self.residual else y


class Body(nn.Module):
    """A stem, blocks and one or two heads.

    Args:
        kind: of the body axis.
    """

    def __init__(self, recipe: Any, switch: Switch) -> None:
        super().__init__()
        self.kind, self.switch = recipe.body, switch
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(self._block(recipe, switch) for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)
        if self.kind == "heads":
            self.other = nn.Linear(WIDTH, WIDTH)
        if self.kind == "tied":
            self.head.weight = self.blocks[0].linear.weight
        if recipe.extra == "add group":
            self.late = nn.Parameter(torch.zeros(WIDTH))

    def _block(self, recipe: Any, switch: Switch) -> nn.Module:
        if self.kind == "transformer":
            rate = 0.2 if recipe.drop == "global" else 0.0
            return nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=rate, batch_first=True)
        makers: dict[str, Any] = {"lora": Lora, "complex": Fourier, "experts": Experts, "codes": Codes}
        linear = makers[self.kind]() if self.kind in makers else nn.Linear(WIDTH, WIDTH)
        if self.kind == "own casts":
            linear = CastLinear(WIDTH, WIDTH)
            linear.switch = switch
        if self.kind == "gru":
            return nn.GRU(WIDTH, WIDTH, batch_first=True)
        return Block(linear, recipe, switch, residual=self.kind not in ("chain", "lora"))

    def forward(self, x: Tensor, head: str = "head") -> Tensor:
        enabled = self.switch.autocast and not self.switch.exact
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled or torch.is_autocast_enabled("cpu")):
            if self.kind == "derivative":
                return self._force(x)
            return self._plain(x, head)

    def _force(self, x: Tensor) -> Tensor:
        """The derivative of an energy with respect to the inputs."""
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            energy = self._plain(x, "head").square().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    def _plain(self, x: Tensor, head: str) -> Tensor:
        x = x.as_subclass(Tensor) * x.tag if isinstance(x, Tagged) else x
        if hasattr(self, "late"):
            x = x + self.late
        x = torch.tanh(self.stem(x))
        if self.switch.again is None or self.switch.exact:
            x = self._run(x)
        else:
            x = checkpoint(self._run, x, use_reentrant=self.switch.again)
        out: Tensor = (self.other if head == "other" else self.head)(x)
        return out

    def _run(self, x: Tensor) -> Tensor:
        if self.kind in ("transformer", "gru"):
            x = x.reshape(2, -1, WIDTH)
            for block in self.blocks:
                out = block(x)
                x = out[0] if isinstance(out, tuple) else out
            return x.reshape(-1, WIDTH)
        if self.kind == "recurrent":
            for _ in range(3):
                x = self.blocks[0](x)
            return self.blocks[1](x)
        for block in self.blocks:
            if self.kind != "host random" or random.random() < 0.7:
                x = block(x)
        return x


LAYERS = {"transformer": r"(blocks\.\d+|blocks\.1\.linear1)$", "gru": r"(stem|blocks\.\d+|head)$"}


def make_body(recipe: Any, switch: Switch) -> nn.Module:
    """The model of a recipe, with its parametrisations."""
    body = Body(recipe, switch)
    utils = nn.utils
    wrap: Any = {
        "none": None,
        "spectral": utils.parametrizations.spectral_norm,
        "weight norm": utils.parametrizations.weight_norm,
        "cached": utils.parametrizations.weight_norm,
        "orthogonal": utils.parametrizations.orthogonal,
        "old spectral": utils.spectral_norm,
        "old weight norm": utils.weight_norm,
    }[recipe.weights]
    if wrap is not None:
        for block in body.blocks:
            for linear in [m for m in block.modules() if isinstance(m, nn.Linear)][:1]:
                wrap(linear)
    if recipe.extra == "frozen":
        body.stem.requires_grad_(False)
        body.blocks[1].requires_grad_(False)
    return body
