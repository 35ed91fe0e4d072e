"""The result of the first-step rule: learning rates, the output scale, and how they were derived."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor, nn

from fastfs._network.layers import parameter_names, unwrapped
from fastfs._utils.extras import frame
from fastfs.scaling._rendering import number, render

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["FirstStep", "GroupCalibration", "State"]


@dataclass(frozen=True)
class State:
    """A measurement at one output scale, with the learning rates that follow from it.

    Attributes:
        loss: loss of the batch.
        decrease: first-order decrease of the loss in the step.
        gradient_norms: group name -> |g|.
        contributions: group name -> <g, -dw> of the update with lr = 1.
        rates: group name -> learning rate.
        backward_norm: |b| of the last hidden features.
        elements: number of elements of these features over the batch.
        cos_angle: cosine of the angle between their update and -b.
        update_rms: rms of their first-order update.
        feature_rms: rms of the features.
        sensitivity: S = update_rms / decrease.
    """

    loss: float
    decrease: float
    gradient_norms: Mapping[str, float]
    contributions: Mapping[str, float]
    rates: Mapping[str, float]
    backward_norm: float
    elements: int
    cos_angle: float
    update_rms: float
    feature_rms: float
    sensitivity: float


@dataclass(frozen=True)
class GroupCalibration:
    """A group of parameters and its learning rate.

    Attributes:
        name: ``"input"``, the name of a watched layer, or ``"output"``.
        parameters: names of its parameters.
        gradient_norm_before: |g| of the group in the model as given.
        gradient_norm: |g| with the output scaled.
        contribution: c = <g, -dw> of the optimizer's update with lr = 1, with the output scaled.
        lr: D / (n c).
    """

    name: str
    parameters: tuple[str, ...]
    gradient_norm_before: float
    gradient_norm: float
    contribution: float
    lr: float


@dataclass(frozen=True)
class FirstStep:
    """Learning rates and output scale from :func:`fastfs.scaling.first_step`. ``str()`` explains where each comes from.

    Attributes:
        optimizer: name of the optimizer whose updates were measured.
        members: the groups in the order of the forward.
        hidden: name of the layer with the last hidden features.
        output: names of the parameters to multiply by ``output_scale``; empty if none acts on the output alone.
        output_scale: factor of the output scale.
        target_loss_decrease: requested D, in units of the loss.
        target_sensitivity: requested S, in feature units per unit of loss.
        before: measurement of the model as given.
        after: measurement with the output scaled.
        trace: sensitivity in each round of measurement.
        shared: names of parameters that act both before and after the last hidden features.
        converged: whether the sensitivity with the output scaled is within two percent of the target.
    """

    optimizer: str
    members: tuple[GroupCalibration, ...]
    hidden: str
    output: tuple[str, ...]
    output_scale: float
    target_loss_decrease: float
    target_sensitivity: float
    before: State
    after: State
    trace: tuple[float, ...]
    shared: tuple[str, ...]
    converged: bool
    _parameters: Mapping[str, Tensor] = field(repr=False, compare=False)
    _output_norms: Mapping[str, float] = field(repr=False, compare=False)

    def groups(self) -> list[dict[str, Any]]:
        """Return parameter groups of the measured model for its optimizer.

        The learning rates are for the model after :meth:`apply`.

        Returns:
            Dictionaries with ``params``, ``lr`` and ``name``.
        """
        return [
            {"params": [self._parameters[p] for p in group.parameters], "lr": group.lr, "name": group.name}
            for group in self.members
        ]

    def apply(self, model: nn.Module) -> list[dict[str, Any]]:
        """Multiply the output of the model by ``output_scale``. Call this once.

        Args:
            model: the measured model, or one with the same parameters, such as a copy.

        Returns:
            Parameter groups of this model for its optimizer.

        Raises:
            ValueError: the output differs from the measured one (already scaled, or trained since), the model lacks a
                parameter, or the scale was not found. The model is not changed then.
        """
        if not self.output:
            raise ValueError(
                f"nothing acts on the output of the model alone (shared: {', '.join(self.shared) or 'none'}), so its "
                "scale cannot be set; multiply the output by a factor, or use only the learning rates, from groups()"
            )
        if not self.converged:
            seen = ", ".join(f"{s:.3g}" for s in self.trace)
            raise ValueError(
                f"the sensitivity did not reach {self.target_sensitivity:.3g} by scaling {', '.join(self.output)}: "
                f"measured {seen}. Is there a normalization after it, or does loss_fn not use the model it receives?"
            )
        inner = unwrapped(model)
        theirs = parameter_names(inner, list(inner.parameters()))
        missing = [name for name in self._parameters if name not in theirs]
        if missing:
            raise ValueError(f"model: it has no parameter {missing[0]!r}; expected the measured model or a copy of it")
        for name, norm in self._output_norms.items():
            now = float(theirs[name].detach().double().norm())
            if not math.isclose(now, norm, rel_tol=1e-4):
                raise ValueError(f"{name}: the norm was {norm:.6g} when measured and is {now:.6g}: already scaled?")
        with torch.no_grad():
            for name in self.output:
                theirs[name].mul_(self.output_scale)
        return [
            {"params": [theirs[p] for p in group.parameters], "lr": group.lr, "name": group.name}
            for group in self.members
        ]

    def to_frame(self) -> DataFrame:
        """Return one row per group: name, number of parameters, |g| before and after scaling, contribution, lr.

        Returns:
            A DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = [
            {
                "group": group.name,
                "parameters": len(group.parameters),
                "gradient_norm_before": group.gradient_norm_before,
                "gradient_norm": group.gradient_norm,
                "contribution": group.contribution,
                "lr": group.lr,
            }
            for group in self.members
        ]
        return frame(rows)

    def __str__(self) -> str:
        before, after, n = self.before, self.after, len(self.members)
        d = self.target_loss_decrease
        unit = "|g|^2" if self.optimizer == "SGD" else "<g, -dw> at lr 1"
        # A table title would be wrapped to the width of the table.
        title = f"Learning rates of {self.optimizer}: lr = D / (n c), c = {unit}, D = {number(d)}, n = {n} groups"
        grid = Table()
        grid.add_column("group", overflow="fold")
        for column in ("tensors", "|g| as given", "|g| scaled", "c scaled", "lr"):
            grid.add_column(column, justify="right")
        for group in self.members:
            values = (group.gradient_norm_before, group.gradient_norm, group.contribution, group.lr)
            grid.add_row(group.name, str(len(group.parameters)), *map(number, values))
        angle = math.acos(max(-1.0, min(1.0, before.cos_angle)))
        lines = [
            f"Loss {number(before.loss)}. Target per step: decrease D = {number(d)}, S = rms(df)/D = "
            f"{number(self.target_sensitivity)}, so rms(df) = {number(d * self.target_sensitivity)} at {self.hidden}.",
            f"Measured there: |b| = {number(before.backward_norm)} over {before.elements} elements, angle "
            f"{angle:.3f} (cos {before.cos_angle:.3f}), rms(f) = {number(before.feature_rms)}.",
            f"Measured as rms(df)/D: S = {number(before.sensitivity)}; no cut, so the formula does not give it."
            if self.shared
            else f"Feature speed formula: S = (D_{{L-1}}/D) / (sqrt(elements) |b| cos) = {number(before.sensitivity)}.",
        ]
        if self.output:
            rounds = " -> ".join(number(s) for s in self.trace)
            lines.append(
                f"Output: multiply {', '.join(self.output)} by {number(self.output_scale)}; S when measured again: "
                f"{rounds}, |b| = {number(after.backward_norm)}, cos {after.cos_angle:.3f}."
            )
            if not self.converged:
                lines.append("S did NOT reach the target: the output scale does not determine it.")
        else:
            lines.append("Output: no parameter acts on it alone, so its scale is left unchanged.")
        if self.shared:
            lines.append(
                f"Shared: {', '.join(self.shared)} acts before and after {self.hidden}; its learning rate balances "
                "both uses together, in the group where it acts first."
            )
        return render("\n".join([*lines, title]), grid)
