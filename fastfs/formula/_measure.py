"""Measure the feature speed formula on a model for one step of gradient descent or of an optimizer."""

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
    """The measurement of one step, for L layers, P parameters and groups of parameters. Tensors are float64.

    Attributes:
        layers: names of the layers, in the order of the model.
        cut: (L,) whether the formula holds at the layer.
        reason: (L,) why it does not, or None.
        stats: (L,) feature update against backward vector: ``angle``, ``cos_angle``, ``update_rms``, ...
        contribution: (L,) -sum <g, dw> over the parameters between the preceding watched layers and this one, in units
            of the loss.
        aligned_decrease: (L,) D_l, the same sum over all upstream parameters (cumulative).
        parameters: names of the parameters.
        parameter_stats: (P,) gradient against update: ``aligned_decrease``, ``gradient_norm``, ``update_norm``, ...
        groups: group name -> -sum <g, dw> over its parameters, 0-d.
        loss: loss before the step, 0-d.
        loss_change: change of the loss by the step, 0-d, negative for a decrease. A derivative if ``first_order``.
        total_decrease: D over all parameters, 0-d: the first-order decrease of the loss.
        first_order: whether changes are derivatives along dw, rather than differences of forwards at w + dw and w.
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
        """(L,) rms(df) predicted by the feature speed formula, D / (cos(angle) |b|); nan where the layer is no cut."""
        norm = _relations.predicted_update_norm(self.aligned_decrease, self.stats.cos_angle, self.stats.backward_norm)
        return self._at_cuts(norm / self.stats.count.double().sqrt())

    @property
    def residual(self) -> Tensor:
        """(L,) 1 - D / (-<b, df>); nan where the layer is no cut."""
        return self._at_cuts(_relations.residual(self.aligned_decrease, self.stats.update_dot_backward))

    @property
    def sensitivity(self) -> Tensor:
        """(L,) rms(df_l) / |loss change|. For the last hidden features, this is S of the paper.

        The published values are those of features after the ReLU. Before the ReLU, as in :mod:`fastfs.models`, S is up
        to sqrt(2) times as large.
        """
        return _relations.sensitivity(self.stats.update_rms, self.loss_change)

    @property
    def aligned_update_rms(self) -> Tensor:
        """(L,) rms of the component of df along -b, which changes the loss, with its sign."""
        return self.stats.update_rms * self.stats.cos_angle

    @property
    def orthogonal_update_rms(self) -> Tensor:
        """(L,) rms of the component of df orthogonal to b."""
        return self.stats.update_rms * self.stats.angle.sin()

    def to_frame(self) -> pandas.DataFrame:
        """Return one row per layer.

        Returns:
            A DataFrame with name, cut, the statistics of the layer and the reason. Angles are in radians.

        Raises:
            ImportError: pandas is not installed.
        """
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
    """Measure identity, predicted feature speed, residual and sensitivity for one step without taking it.

    Neither the model nor the optimizer is changed. Inside of a training loop, use :class:`fastfs.Monitor` instead.

    Args:
        model: any network.
        loss_fn: function of the model and the batch that returns the loss, a scalar that includes its own mean.
        batch: second argument of ``loss_fn``.
        layers: the layers to measure, as for :class:`fastfs.Monitor`.
        lr: learning rate of gradient descent, dw = -lr g: a number, or regular expressions over parameter names ->
            rate.
        optimizer: optimizer whose next step, including its state, is measured instead.
        updates: parameter name -> dw, measured instead; other parameters do not move.
        parameters: regular expression, searched for in the names of the parameters to move; None moves all trainable
            ones.
        groups: group name -> regular expression over parameter names, to sum contributions over.
        first_order: whether to compute exact derivatives along dw (forward mode) instead of a forward at w + dw.
        dtype: dtype to compute in, such as ``torch.float64``, including the step and state of an optimizer.

    Returns:
        Statistics per layer, per parameter and per group.

    Raises:
        TypeError: not exactly one of ``lr``, ``optimizer`` and ``updates`` is given, an argument has the wrong type,
            the loss is not a scalar tensor, or a layer returns no floating-point tensor.
        ValueError: no layer or parameter matches, ``updates`` has an unknown name or a wrong shape, a group matches no
            parameter, or the loss is not finite or depends on no parameter.
        RuntimeError: in inference mode, or the forward is not repeatable.
        NotImplementedError: ``first_order``, and an operation of the model has no forward-mode derivative.

    Source: section 2 of "The Feature Speed Formula", arXiv 2311.18718, with D expressed by dw.
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
    """Return dw of every parameter of a linearized model from exactly one of three sources; see :func:`measure`."""
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
    """Return the sums of one layer over its visits, as in ``FeatureStats.sums``; zero if it did not run.

    Args:
        before: features before the step.
        after: features after the step, or their first-order changes.
        backward: backward vectors.
        first_order: whether ``after`` holds changes.

    Returns:
        float64 (9,).
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
