"""Measure one row of the table: the selected layers, and how they behave in a forward and a backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastfs._network.feature_tensors import first_floating
from fastfs._network.layers import AUTO, parameter_names, select_layers
from fastfs._network.structure import Edge, analyse, edge_of


@dataclass(frozen=True)
class Picked:
    """The selected layers of one model.

    Attributes:
        names: names of the layers.
        ran: how many ran in a forward.
        reached: how many have a nonzero gradient.
        cuts: how many are cuts.
        reason: why the first of the others is not a cut, or None.
    """

    names: tuple[str, ...]
    ran: int
    reached: int
    cuts: int
    reason: str | None


def pick(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> Picked:
    """Select layers with ``layers="auto"`` and run one forward and one backward."""
    layers = select_layers(model, AUTO)
    edges: list[list[Edge | None]] = [[] for _ in layers]
    gradients = [0.0 for _ in layers]

    def seen(index: int, output: Any) -> None:
        features = first_floating(output)
        if features is None:
            raise TypeError(f"layer {layers[index].name!r} returns no floating-point tensor")
        edges[index].append(edge_of(features))
        if features.requires_grad:
            features.register_hook(lambda g: gradients.__setitem__(index, gradients[index] + float(g.abs().sum())))

    for layer in layers:
        layer.module.register_forward_hook(lambda _m, _a, output, index=layer.index: seen(index, output))
    output = call(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    structure = analyse(edges, [output], trained, list(parameter_names(model, trained)))
    output.backward()
    reasons = [reason for reason in structure.reason if reason is not None]
    return Picked(
        names=tuple(layer.name for layer in layers),
        ran=sum(bool(visits) for visits in edges),
        reached=sum(gradient > 0 for gradient in gradients),
        cuts=sum(structure.cut),
        reason=reasons[0] if reasons else None,
    )


def fresh(build: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]) -> Picked:
    """Build a model with fixed random numbers and measure it."""
    torch.manual_seed(0)
    model, call = build()
    with torch.no_grad():
        for p in model.parameters():
            if not is_lazy(p) and p.dim() > 1 and not p.any():
                p.normal_(std=0.02)  # a head initialized to zero would block the gradient
    return pick(model.train(), call)
