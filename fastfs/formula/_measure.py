"""The feature speed formula measured on a model: what one step of gradient descent or of an optimizer does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastfs._functional import feature_stats, first_order_stats, update_stats
from fastfs._network.layers import AUTO, Selection
from fastfs._network.learning_rates import LearningRates
from fastfs._network.linearization import Linearization, LossFunction
from fastfs._stats import FeatureStats, UpdateStats
from fastfs._utils.extras import frame
from fastfs._utils.formatting import columns
from fastfs.formula import _relations
from fastfs.formula._parameter_updates import gradient_descent, optimizer_update

if TYPE_CHECKING:
    import pandas

__all__ = ["Measurement", "measure", "over_visits", "updates_of"]


@dataclass(frozen=True)
class Measurement:
    """One step at one point, for L layers, P parameters and G groups of parameters. Tensors are float64.

    Attributes:
        layers: names of the layers, in the order of the model.
        cut, reason: whether the formula holds at the layer, and why not.
        stats: (L,) feature update against backward vector: angle, cos_angle, update_rms, relative_update, ...
        contribution: (L,) -sum <g, dw> over the parameters between this layer and the watched ones before.
        aligned_decrease: (L,) D_l, the same over all parameters upstream: cumulative.
        parameters: names of the parameters.
        parameter_stats: (P,) gradient against update: aligned_decrease, gradient_norm, update_norm, ...
        groups: name -> -sum <g, dw> of the parameters in it, 0-d.
        loss: before the step, 0-d.
        loss_change: of the step, 0-d; negative where it decreases. To first order if ``first_order``.
        total_decrease: D over all parameters, 0-d: the first-order loss decrease.
        first_order: whether the changes are derivatives, or differences of forwards at w + dw and at w.
    """

    layers: list[str]
    cut: list[bool]
    reason: list[str | None]
    stats: FeatureStats
    contribution: Tensor
    aligned_decrease: Tensor
    parameters: list[str]
    parameter_stats: UpdateStats
    groups: dict[str, Tensor]
    loss: Tensor
    loss_change: Tensor
    total_decrease: Tensor
    first_order: bool

    @property
    def predicted_update_rms(self) -> Tensor:
        """(L,) rms(df) that the feature speed formula gives, D / (cos(angle) |b|); nan where the layer is no cut."""
        norm = _relations.predicted_update_norm(self.aligned_decrease, self.stats.cos_angle, self.stats.backward_norm)
        return self._at_cuts(norm / self.stats.count.double().sqrt())

    @property
    def residual(self) -> Tensor:
        """(L,) 1 - D / (-<b, df>); nan where the layer is no cut."""
        return self._at_cuts(_relations.residual(self.aligned_decrease, self.stats.update_dot_backward))

    @property
    def sensitivity(self) -> Tensor:
        """(L,) rms(df_l) / |loss change|; that of the last hidden features is the S of the paper.

        The published numbers are of features after the ReLU. Before it, as in :mod:`fastfs.models`, S is up to sqrt(2)
        times as large.
        """
        return _relations.sensitivity(self.stats.update_rms, self.loss_change)

    @property
    def aligned_update_rms(self) -> Tensor:
        """(L,) rms of the part of df along -b, with its sign: what changes the loss."""
        return self.stats.update_rms * self.stats.cos_angle

    @property
    def orthogonal_update_rms(self) -> Tensor:
        """(L,) rms of the part of df orthogonal to b."""
        return self.stats.update_rms * self.stats.angle.sin()

    def to_frame(self) -> pandas.DataFrame:
        """One row per layer."""
        return frame({"layer": self.layers, "cut": self.cut, **self._columns(), "reason": self.reason})

    def __str__(self) -> str:
        lines = columns({"layer": self.layers, "cut": self.cut, **self._columns()})
        kind = "first order" if self.first_order else "finite step"
        head = f"loss {self.loss:.6g}, change {self.loss_change:.4g} ({kind}), D {self.total_decrease:.4g}"
        return "\n".join([head, *lines])

    def _columns(self) -> dict[str, Any]:
        stats = self.stats
        tensors = {
            "angle": stats.angle,
            "cos_angle": stats.cos_angle,
            "valid": stats.valid,
            "noise_floor": stats.noise_floor,
            "update_rms": stats.update_rms,
            "predicted_update_rms": self.predicted_update_rms,
            "aligned_update_rms": self.aligned_update_rms,
            "orthogonal_update_rms": self.orthogonal_update_rms,
            "feature_rms": stats.feature_rms,
            "backward_rms": stats.backward_rms,
            "contribution": self.contribution,
            "aligned_decrease": self.aligned_decrease,
            "residual": self.residual,
            "sensitivity": self.sensitivity,
        }
        return {name: values.tolist() for name, values in tensors.items()}

    def _at_cuts(self, values: Tensor) -> Tensor:
        return torch.where(torch.tensor(self.cut, device=values.device), values, torch.nan)


def measure(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    layers: Selection = AUTO,
    lr: LearningRates | None = None,
    optimizer: Optimizer | None = None,
    updates: Mapping[str, Tensor] | None = None,
    parameters: str | None = None,
    groups: Mapping[str, str] | None = None,
    first_order: bool = False,
    dtype: torch.dtype | None = None,
) -> Measurement:
    """Measures identity, predicted feature speed, residual and sensitivity of one step, which is not taken.

    Neither the model nor the optimizer is changed. Not for the inside of a training loop: :class:`fastfs.Monitor` is.

    Args:
        model: any network.
        loss_fn: function of the model and the batch that gives the loss, a scalar that includes its own mean.
        batch: what ``loss_fn`` takes.
        layers: which layers, as for :class:`fastfs.Monitor`.
        lr: gradient descent, dw = -lr g: one rate, or regular expression -> rate over the names of parameters.
        optimizer: or the next step of this optimizer, with its state.
        updates: or these updates, name of a parameter -> dw; others do not move.
        parameters: regular expression, searched for in the names: which parameters move; all trainable ones if None.
        groups: name -> regular expression over the names of parameters, whose contributions are wanted.
        first_order: exact derivatives along dw (forward mode) instead of a second forward at w + dw.
        dtype: compute in this dtype, such as ``torch.float64``, the step of an optimizer and its state included.

    Raises:
        TypeError, ValueError: not exactly one of ``lr``, ``optimizer`` and ``updates``; updates of unknown names or of
            another shape; a group that finds no parameter; and what
            :class:`fastfs._network.linearization.Linearization` raises.

    Source: section 2 of "The Feature Speed Formula", arXiv 2311.18718; D in the form with dw.
    """
    lin = Linearization(model, loss_fn, batch, layers=layers, parameters=parameters, dtype=dtype)
    members = _members(groups or {}, lin.names)
    moves = updates_of(lin, lr=lr, optimizer=optimizer, updates=updates)
    changed = (
        lin.jvp(moves) if first_order else lin.forward([p + d for p, d in zip(lin.parameters, moves, strict=True)])
    )
    stats = [
        over_visits(before, after, backward, first_order=first_order)
        for before, after, backward in zip(lin.features, changed.features, lin.backward, strict=True)
    ]
    gradients = update_stats(lin.gradients, moves)
    decrease = gradients.aligned_decrease
    structure = lin.structure
    loss_change = changed.loss if first_order else changed.loss - lin.loss
    return Measurement(
        layers=[layer.name for layer in lin.layers],
        cut=list(structure.cut),
        reason=list(structure.reason),
        stats=FeatureStats(torch.stack([s.to(decrease.device) for s in stats])),
        contribution=structure.own.to(decrease) @ decrease,
        aligned_decrease=structure.upstream.to(decrease) @ decrease,
        parameters=lin.names,
        parameter_stats=gradients,
        groups={name: decrease[indices].sum() for name, indices in members.items()},
        loss=lin.loss.to(torch.float64),
        loss_change=loss_change.to(torch.float64),
        total_decrease=decrease.sum(),
        first_order=first_order,
    )


def updates_of(
    lin: Linearization,
    *,
    lr: LearningRates | None = None,
    optimizer: Optimizer | None = None,
    updates: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """dw of every parameter of a linearised model, from exactly one of three sources; see :func:`measure`."""
    given = [name for name, v in (("lr", lr), ("optimizer", optimizer), ("updates", updates)) if v is not None]
    if len(given) != 1:
        raise TypeError(f"expected exactly one of lr, optimizer and updates, got {' and '.join(given) or 'none'}")
    if lr is not None:
        return gradient_descent(lr, lin.names, lin.gradients)
    if optimizer is not None:
        moves = optimizer_update(optimizer, lin.originals, lin.gradients, dtype=lin.dtype)
        return [move.to(p.dtype) for move, p in zip(moves, lin.parameters, strict=True)]
    assert updates is not None
    unknown = sorted(updates.keys() - set(lin.names))
    if unknown:
        raise ValueError(f"updates: no parameter that moves is called {unknown}. Parameters: {', '.join(lin.names)}")
    for name, update in updates.items():
        if not isinstance(update, Tensor):
            raise TypeError(f"updates: expected a tensor for {name}, got {type(update).__name__}")
    for name, parameter in zip(lin.names, lin.parameters, strict=True):
        if name in updates and updates[name].shape != parameter.shape:
            raise ValueError(
                f"updates: expected shape {tuple(parameter.shape)} for {name}, got {tuple(updates[name].shape)}"
            )
    pairs = zip(lin.names, lin.parameters, strict=True)
    return [updates[name].detach().to(p) if name in updates else torch.zeros_like(p) for name, p in pairs]


def over_visits(
    before: Sequence[Tensor], after: Sequence[Tensor], backward: Sequence[Tensor], *, first_order: bool
) -> Tensor:
    """(9,) sums of a layer over its visits, as in ``FeatureStats.sums``; zero without any.

    Args:
        before, backward: features and backward vectors.
        after: features after the step, or their changes if ``first_order``.
        first_order: which of the two.
    """
    if not before:
        return torch.zeros(len(FeatureStats.names), dtype=torch.float64)
    if first_order:
        return torch.stack([s.sums for s in first_order_stats(before, after, backward)]).sum(dim=0)
    return feature_stats(before, after, backward).sums.sum(dim=0)


def _members(groups: Mapping[str, str], names: Sequence[str]) -> dict[str, list[int]]:
    found = {}
    for name, expression in groups.items():
        try:
            found[name] = [i for i, parameter in enumerate(names) if re.search(expression, parameter)]
        except (TypeError, re.error) as error:
            raise ValueError(f"groups: {expression!r} is not a regular expression: {error}") from None
        if not found[name]:
            raise ValueError(f"groups: {name!r} ({expression!r}) finds no parameter among {', '.join(names)}")
    return found
