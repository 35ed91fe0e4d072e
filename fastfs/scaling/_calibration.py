"""The result of a calibration: parameter groups with learning rates, and the trials that they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from fastfs._network.layers import parameter_names, unwrapped
from fastfs._utils.extras import frame
from fastfs.scaling._rendering import number, render
from fastfs.scaling._roles import is_other, split
from fastfs.scaling._trials import Trial

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["CalibratedGroup", "Calibration"]


@dataclass(frozen=True)
class CalibratedGroup:
    """Parameters that share a learning rate.

    Attributes:
        name: name of the group, or ``"matrices"`` or ``"others"`` if it had none.
        parameters: names of its parameters.
        other: whether its rate is that of the others, rather than that of the matrices.
        lr: learning rate.
    """

    name: str
    parameters: tuple[str, ...]
    other: bool
    lr: float


@dataclass(frozen=True)
class Calibration:
    """Learning rates from :func:`fastfs.scaling.calibrate`. ``str()`` explains where they come from.

    Attributes:
        optimizer: names of the optimizers.
        rate: learning rate of the matrices.
        factor: learning rate of the other parameters, over ``rate``.
        margin: by what the rates of the best trial were divided, since rates so much larger than these diverged; or 1.
        largest_rate: rate at which a step realizes half of its first-order decrease, see ``calibrate``.
        largest_update: relative update |dw| / |w| of the step at this rate.
        trials: the trials, in their order; empty if there was one batch.
        steps: training steps of all trials and of the search for the largest rate, that is the cost.
        trial_steps: steps of a trial that was not ended.
    """

    optimizer: str
    rate: float
    factor: float
    margin: float
    largest_rate: float
    largest_update: float
    trials: tuple[Trial, ...]
    steps: int
    trial_steps: int
    _optimizers: tuple[Optimizer, ...] = field(repr=False, compare=False)
    _others: frozenset[int] = field(repr=False, compare=False)
    _names: Mapping[int, str] = field(repr=False, compare=False)

    @property
    def members(self) -> tuple[CalibratedGroup, ...]:
        """The groups of all optimizers."""
        return tuple(
            CalibratedGroup(
                group["name"],
                tuple(self._names.get(id(p), "(not the model's)") for p in group["params"]),
                is_other(group, self._others),
                group["lr"],
            )
            for optimizer in self._optimizers
            for group in self._groups(optimizer)
        )

    def groups(self, optimizer: Optimizer | None = None) -> list[dict[str, Any]]:
        """Return parameter groups of the model for its optimizer.

        Args:
            optimizer: which of the given optimizers the groups are for; required if there are several.

        Returns:
            The groups of the optimizer with their order and options, such as ``weight_decay``, and with ``lr`` and
            ``name``. A group that holds matrices and others is divided into two.

        Raises:
            ValueError: the optimizer is none of those that were given, or there are several and none is named.
        """
        if optimizer is None and len(self._optimizers) > 1:
            raise ValueError(f"optimizer: expected one of the {len(self._optimizers)} that were calibrated, got None")
        chosen = self._optimizers[0] if optimizer is None else optimizer
        if not any(chosen is mine for mine in self._optimizers):
            raise ValueError(f"optimizer: this {type(chosen).__name__} is not the one that was calibrated")
        return self._groups(chosen)

    def apply(self, model: nn.Module, optimizer: Optimizer | None = None) -> list[dict[str, Any]]:
        """Return parameter groups of the model, or of one with the same parameters, such as a copy.

        Nothing is changed: these rates are for the initial values as they are.

        Args:
            model: the measured model or a copy.
            optimizer: as in :meth:`groups`.

        Returns:
            Groups as from :meth:`groups`, with the parameters of this model.

        Raises:
            ValueError: the model lacks a parameter.
        """
        inner = unwrapped(model)
        theirs = parameter_names(inner, list(inner.parameters()))
        groups = self.groups(optimizer)
        for group in groups:
            group["params"] = [_theirs(theirs, self._names, p) for p in group["params"]]
        return groups

    def _groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        groups = split(optimizer, self._others)
        given = [group.get("name") for group in groups]
        for group in groups:
            other, name = is_other(group, self._others), group.get("name")
            role = "others" if other else "matrices"
            group["lr"] *= self.rate * (self.factor if other else 1.0)
            group["name"] = role if name is None else f"{name} ({role})" if given.count(name) > 1 else name
        return groups

    def to_frame(self) -> DataFrame:
        """Return one row per group: name, number of parameters, whether it holds others, and lr.

        Returns:
            A DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame(
            [
                {"group": group.name, "parameters": len(group.parameters), "other": group.other, "lr": group.lr}
                for group in self.members
            ]
        )

    def __str__(self) -> str:
        lines = [
            f"Learning rates of {self.optimizer}: {number(self.rate)} for matrices, {number(self.rate * self.factor)} "
            f"({number(self.factor)} times) for embeddings, norms, biases and the output.",
            f"At {number(self.largest_rate)}, where a step changes the parameters by {number(self.largest_update)} of "
            "their norm, it realizes half of its first-order decrease.",
        ]
        groups = Table()
        groups.add_column("group", overflow="fold")
        for column in ("tensors", "lr"):
            groups.add_column(column, justify="right")
        for group in self.members:
            groups.add_row(group.name, str(len(group.parameters)), number(group.lr))
        if not self.trials:
            share = number(self.largest_rate / self.rate)
            lines.append(f"One batch allows no trials: the rate is that one divided by {share}.")
            return render("\n".join(lines), groups)
        done = len(self.trials)
        lines.append(f"The best of {done} trials of at most {self.trial_steps} steps; {self.steps} steps in all.")
        if self.margin > 1.0:
            lines.append(
                f"A rate {number(self.margin)} times as large diverged, so that the rates of the best trial are "
                "divided by it."
            )
        table = Table()
        for column in ("matrices", "others", "steps", "loss", ""):
            table.add_column(column, justify="right")
        for trial in self.trials:
            values = (number(trial.rate), number(trial.rate * trial.factor), str(trial.steps))
            best = math.isclose(trial.rate, self.rate * self.margin) and trial.factor == self.factor
            mark = "chosen" if best else trial.reason
            table.add_row(*values, number(trial.loss) if math.isfinite(trial.loss) else "-", mark)
        return render("\n".join(lines), groups, table)


def _theirs(theirs: Mapping[str, Tensor], names: Mapping[int, str], parameter: Tensor) -> Tensor:
    name = names.get(id(parameter))
    if name is None or name not in theirs:
        raise ValueError(f"model: it has no parameter {name!r}; expected the measured model or a copy of it")
    return theirs[name]
