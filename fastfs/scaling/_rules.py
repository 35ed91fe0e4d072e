"""A scaling rule: the initial standard deviation and learning rate of every matrix of a chain."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastfs._utils.extras import frame
from fastfs.models import MLP, ResNet
from fastfs.scaling._rendering import some

if TYPE_CHECKING:
    import pandas

__all__ = ["LayerScale", "Rule", "apply"]


@dataclass(frozen=True)
class LayerScale:
    """Scale and learning rate of one weight matrix.

    Attributes:
        role: ``"input"``, ``"hidden"`` or ``"output"``.
        rows: size of the layer's output.
        columns: size of its input.
        std: standard deviation of the independent Gaussian entries at initialization.
        lr: learning rate of plain gradient descent.
    """

    role: str
    rows: int
    columns: int
    std: float
    lr: float


@dataclass(frozen=True)
class Rule:
    """Initial standard deviations and learning rates of all weight matrices of a chain, in forward order.

    Attributes:
        architecture: ``"mlp"`` or ``"resnet"``.
        scheme: name of the scaling.
        layers: one entry per matrix.
        branch_scale: beta of the residual branches; None for an MLP.
    """

    architecture: str
    scheme: str
    layers: tuple[LayerScale, ...]
    branch_scale: float | None = None

    def scaled(self, *, lr: float = 1.0, output_std: float = 1.0) -> Rule:
        """Return the rule with all learning rates, and the output's standard deviation, multiplied by factors.

        Args:
            lr: factor of all learning rates, which multiplies the first-order loss decrease of a step.
            output_std: factor of the last matrix's standard deviation. The learning rates before it are divided by its
                square, which keeps balance and loss decrease and divides the feature speed by it.

        Returns:
            A new rule.

        Raises:
            ValueError: a factor is not positive and finite.
        """
        for name, value in (("lr", lr), ("output_std", output_std)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a positive finite factor, got {value}")
        *inner, last = self.layers
        layers = [dataclasses.replace(layer, lr=layer.lr * lr / output_std**2) for layer in inner]
        layers.append(dataclasses.replace(last, lr=last.lr * lr, std=last.std * output_std))
        return dataclasses.replace(self, layers=tuple(layers))

    def to_frame(self) -> pandas.DataFrame:
        """Return one row per matrix: role, rows, columns, std, lr.

        Returns:
            A DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame([dataclasses.asdict(layer) for layer in self.layers])

    def __str__(self) -> str:
        beta = "" if self.branch_scale is None else f", branch scale {self.branch_scale:.4g}"
        lines = [f"{self.scheme} scaling of a {self.architecture} of {len(self.layers)} matrices{beta}"]
        i = 0
        while i < len(self.layers):
            same = next((j for j in range(i, len(self.layers)) if self.layers[j] != self.layers[i]), len(self.layers))
            layer, times = self.layers[i], f"{same - i} x " if same - i > 1 else ""
            lines.append(
                f"  {times}{layer.role} {layer.rows} x {layer.columns}: std {layer.std:.4g}, lr {layer.lr:.4g}"
            )
            i = same
        return "\n".join(lines)


def apply(model: nn.Module, rule: Rule, *, generator: torch.Generator | None = None) -> list[dict[str, Any]]:
    """Initialize the model according to a rule, and return the parameter groups for its optimizer.

    The model has to be a chain of ``nn.Linear`` registered in forward order: :class:`fastfs.models.MLP`,
    :class:`fastfs.models.ResNet`, an ``nn.Sequential``. Weights get independent Gaussian entries; biases become zero
    and have the learning rate of their layer. Nothing is written unless the whole model fits the rule.

    Args:
        model: the model, initialized in place.
        rule: rule from :func:`fastfs.scaling.mlp` or :func:`fastfs.scaling.resnet`.
        generator: source of random numbers; None uses the global generator.

    Returns:
        One group per layer, for ``torch.optim.SGD(apply(model, rule))``: ``params``, ``lr`` and ``name``.

    Raises:
        ValueError: the layers, shapes or parameters of the model differ from those of the rule.

    Source: the rules of :func:`fastfs.scaling.mlp` and :func:`fastfs.scaling.resnet`.
    """
    layers = _matching(model, rule, generator)
    groups: list[dict[str, Any]] = []
    with torch.no_grad():
        for (name, linear), scale in zip(layers, rule.layers, strict=True):
            linear.weight.normal_(std=scale.std, generator=generator)
            params = [linear.weight]
            if linear.bias is not None:
                linear.bias.zero_()
                params.append(linear.bias)
            groups.append({"params": params, "lr": scale.lr, "name": name})
    return groups


def _matching(model: nn.Module, rule: Rule, generator: torch.Generator | None) -> list[tuple[str, nn.Linear]]:
    """Return the layers of the model, one per matrix of the rule."""
    kind = type(model).__name__
    if isinstance(model, MLP | ResNet) and rule.architecture != (expected := type(model).__name__.lower()):
        raise ValueError(f"model is a {kind}, which takes a rule for {expected}, got one for {rule.architecture}")
    if isinstance(model, ResNet) and rule.branch_scale is not None:
        scales = {float(block.branch_scale) for block in model.blocks}  # type: ignore[arg-type]
        if any(not math.isclose(beta, rule.branch_scale, rel_tol=1e-6, abs_tol=1e-12) for beta in scales):
            found = ", ".join(f"{beta:.6g}" for beta in sorted(scales))
            raise ValueError(f"the rule is for branch scale {rule.branch_scale:.6g}, the model has {found}")
    layers = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    known = {id(p) for _, linear in layers for p in linear.parameters(recurse=False)}
    other = [name for name, p in model.named_parameters() if id(p) not in known]
    if other:
        raise ValueError(
            f"a rule is for a chain of nn.Linear layers; {kind} has other parameters: {some(other, 8)}. "
            "fastfs.scaling.calibrate supports any model"
        )
    if len({id(linear.weight) for _, linear in layers}) < len(layers):
        raise ValueError(f"{kind} uses a weight matrix in more than one layer, and a rule needs one for each")
    if len(layers) != len(rule.layers):
        names = some([name for name, _ in layers], 8)
        raise ValueError(f"the rule has {len(rule.layers)} matrices, {kind} has {len(layers)} Linear layers: {names}")
    for (name, linear), scale in zip(layers, rule.layers, strict=True):
        if tuple(linear.weight.shape) != (scale.rows, scale.columns):
            got, wanted = tuple(linear.weight.shape), (scale.rows, scale.columns)
            raise ValueError(f"{name or kind}: the weight has shape {got}, the rule expects {wanted}")
        if linear.weight.is_meta:
            raise ValueError(f"{name or kind}: the weight is on the meta device and has no values to initialize")
        if generator is not None and generator.device.type != linear.weight.device.type:
            devices = f"{generator.device}, {name or kind} on {linear.weight.device}"
            raise ValueError(f"generator: expected a generator on the device of the weights; it is on {devices}")
    return layers
