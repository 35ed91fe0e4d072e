"""Networks and losses for the tests of scalings: one row, as the constants of the tables are for."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfs import scaling
from fastfs.models import MLP, ResNet

IN = 16


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().sum()


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def row(target: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """One input of norm 1, always the same, and its target."""
    x = torch.randn(1, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return F.normalize(x, dim=1).to(dtype), torch.full((1, 1), target, dtype=dtype)


def made(
    scheme: str, width: int, depth: int, *, resnet: bool = False, lr: float = 1.0
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A network initialised by the table, from the global generator, and its parameter groups."""
    model: nn.Module
    if resnet:
        model = ResNet(IN, width, depth)
        rule = scaling.resnet(depth, width, in_dim=IN, scheme=scheme, input="sparse")
    else:
        model = MLP(IN, width, depth)
        rule = scaling.mlp(depth, width, IN, scheme=scheme, input="sparse")
    return model, scaling.apply(model, rule.scaled(lr=lr))


def factory(scheme: str, *, resnet: bool = False, lr: float = 1e-4) -> Callable[[int, int], Any]:
    """For scaling.check. The target of 3 keeps the residual away from 0 where the output is random."""

    def build(width: int, depth: int) -> Any:
        model, groups = made(scheme, width, depth, resnet=resnet, lr=lr)
        return model, squared, row(target=3.0), groups

    return build
