"""Automatic scaling of any model for its first step: learning rates and output scale from one measurement."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastfs._functional import update_stats
from fastfs._network.layers import AUTO, Selection
from fastfs._network.linearization import Evaluation, Linearization, LossFunction
from fastfs._stats import FeatureStats
from fastfs.formula._measure import over_visits
from fastfs.formula._parameter_updates import optimizer_update
from fastfs.scaling._first_step_result import FirstStep, GroupCalibration, State
from fastfs.scaling._groups import Partition, partition
from fastfs.scaling._optimizers import OptimizerLike, factory, has_all, label
from fastfs.scaling._rendering import some

__all__ = ["first_step"]

_ROUNDS = 8
_CLOSE = 0.02  # relative tolerance of S
_SMALL, _LINEAR = 1e-3, 0.05  # a small learning rate, and the permitted deviation of its update from proportionality


def first_step(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    optimizer: OptimizerLike = "sgd",
    layers: Selection = AUTO,
    target_loss_decrease: float | None = None,
    target_sensitivity: float = 1.0,
) -> FirstStep:
    r"""Measure gradients, backward vectors and the angle once, and derive learning rates and the output scale.

    The parameters form n groups: before the first watched layer, one per watched layer, and after the last. Let
    c_l = <g_l, -dw_l> for a group, where dw is the update that the optimizer's next step would make with lr = 1:
    |g_l|^2 for SGD, about the sum of |g| for Adam. Balanced contributions and a first-order loss decrease D give

        lr_l = D / (n c_l).

    With these rates, the features of the last hidden layer move by rms(df) = D_{L-1} / (sqrt(elements) |b| cos(theta))
    (the feature speed formula), which is S D. The last matrix of the output is multiplied by S / target: b grows in
    proportion, theta hardly changes, and S becomes the target. Because the residual may change a little, S is measured
    again on a scaled copy and corrected by the secant method until it is within two percent of the target.

    This is the rule of the paper, for the first step of a network at initialization. For the rates of a whole
    training, see :func:`fastfs.scaling.calibrate`. First-order changes are derivatives, or central differences where
    torch has no forward-mode derivative. The model is not changed until :meth:`FirstStep.apply`.

    Args:
        model: a model at initialization whose features are of order 1 (signal propagation).
        loss_fn: function of the model and the batch that returns the loss, a scalar. It must use the model that it
            receives.
        batch: second argument of ``loss_fn``, as large as the batches of training.
        optimizer: ``"sgd"`` (plain), ``"adam"``, ``"adamw"``, an optimizer of this model (whose learning rates are
            ignored), or a function that creates one, such as
            ``lambda groups, lr: torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.95))``.
        layers: the layers, as for :class:`fastfs.Monitor`; the blocks of the model by default.
        target_loss_decrease: D, in units of the loss; None means a tenth of the loss.
        target_sensitivity: S = rms(df_{L-1}) / D, in feature units per unit of loss.

    Returns:
        The measurement and the resulting rates and scale. ``str()`` explains every number.

    Raises:
        TypeError: the optimizer is none of these or has no plain step, or the loss is not a scalar tensor.
        ValueError: a target is not positive, a parameter is unused, the updates of a given optimizer instance are not
            proportional to its learning rate, or a group has a zero gradient or an update along which the loss
            increases.
        RuntimeError: in inference mode, or the forward is not repeatable.

    Source: "The Feature Speed Formula" (arXiv 2311.18718), automatic scaling; section 2 for any optimizer.
    """
    for name, value in (("target_loss_decrease", target_loss_decrease), ("target_sensitivity", target_sensitivity)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a positive finite number, got {value}")
    kind = label(optimizer)
    lin = Linearization(model, loss_fn, batch, layers=layers)
    parts = partition(lin)
    target = 0.1 * abs(float(lin.loss)) if target_loss_decrease is None else float(target_loss_decrease)
    if target == 0:
        raise ValueError("target_loss_decrease: the loss is 0, so there is no default; expected a positive number")
    first = state = _measure(lin, parts, optimizer, kind, target)
    output = [lin.names[p] for p in parts.output]
    scale, trace, tried = 1.0, [state.sensitivity], [0.0]
    while output and abs(math.log(state.sensitivity / target_sensitivity)) > _CLOSE and len(trace) < _ROUNDS:
        following = _next(tried, [math.log(s / target_sensitivity) for s in trace])
        if following is None:
            break
        tried.append(following)
        scale = math.exp(following)
        scaled, theirs = _scaled_copy(model, lin, parts, optimizer, scale)
        if target_loss_decrease is None:
            target = first.decrease
        again = Linearization(scaled, loss_fn, batch, layers=layers)
        state = _measure(again, parts, theirs, kind, target)
        trace.append(state.sensitivity)
    groups = tuple(
        GroupCalibration(
            name=name,
            parameters=tuple(lin.names[p] for p in members),
            gradient_norm_before=first.gradient_norms[name],
            gradient_norm=state.gradient_norms[name],
            contribution=state.contributions[name],
            lr=state.rates[name],
        )
        for name, members in parts.groups.items()
    )
    return FirstStep(
        optimizer=kind,
        members=groups,
        hidden=lin.layers[parts.hidden].name,
        output=tuple(output),
        output_scale=scale,
        target_loss_decrease=target,
        target_sensitivity=target_sensitivity,
        before=first,
        after=state,
        trace=tuple(trace),
        shared=tuple(parts.shared),
        converged=abs(math.log(state.sensitivity / target_sensitivity)) <= _CLOSE,
        _parameters=dict(zip(lin.names, lin.originals, strict=True)),
        _output_norms={lin.names[p]: float(lin.parameters[p].double().norm()) for p in parts.output},
    )


def _next(tried: list[float], errors: list[float]) -> float | None:
    """Return the logarithm of the next output scale, from the scales tried so far and the errors log(S / target).

    S is proportional to 1/scale except for the residual, which changes with the output; from the second round on, the
    secant accounts for it. The result is None if S hardly depends on the scale.
    """
    slope = -1.0
    if len(tried) > 1 and tried[-1] != tried[-2]:
        secant = (errors[-1] - errors[-2]) / (tried[-1] - tried[-2])
        if secant > -0.05:
            return None
        slope = min(max(secant, -4.0), -0.25)
    return tried[-1] - errors[-1] / slope


def _measure(lin: Linearization, parts: Partition, optimizer: OptimizerLike, kind: str, target: float) -> State:
    unit = _unit_updates(lin, optimizer)
    decreases = update_stats(lin.gradients, unit).aligned_decrease.tolist()
    squares = [float(g.double().square().sum()) for g in lin.gradients]
    contributions, rates, norms = {}, {}, {}
    directions: list[Tensor] = [torch.zeros_like(p) for p in lin.parameters]
    for name, members in parts.groups.items():
        c = sum(decreases[p] for p in members)
        norms[name] = math.sqrt(sum(squares[p] for p in members))
        if norms[name] == 0:
            raise ValueError(
                f"group {name!r} ({some([lin.names[p] for p in members])}): the gradient is zero, so no learning rate "
                "makes it contribute; an output or branch initialized to zero blocks the gradient of preceding layers"
            )
        if not (math.isfinite(c) and c > 0):
            raise ValueError(f"group {name!r}: the loss increases along the update of {kind}, <g, -dw> = {c:.4g}")
        contributions[name] = c
        rates[name] = target / (len(parts.groups) * c)
        for p in members:
            directions[p] = (rates[name] * unit[p]).to(lin.parameters[p].dtype)
    changed = _changes(lin, directions)
    visits = zip(lin.features[parts.hidden], changed.features[parts.hidden], lin.backward[parts.hidden], strict=True)
    stats = FeatureStats(over_visits(*zip(*visits, strict=True), first_order=True))
    decrease = -float(changed.loss)
    sensitivity = float(stats.update_rms) / decrease if decrease > 0 else math.nan
    if not (math.isfinite(sensitivity) and sensitivity > 0):
        raise ValueError(
            f"layer {lin.layers[parts.hidden].name!r}: expected features that move while the loss decreases, got "
            f"rms(df) = {float(stats.update_rms):.4g} and a first-order decrease of {decrease:.4g}"
        )
    return State(
        loss=float(lin.loss),
        decrease=decrease,
        gradient_norms=norms,
        contributions=contributions,
        rates=rates,
        backward_norm=float(stats.backward_norm),
        elements=int(stats.count),
        cos_angle=float(stats.cos_angle),
        update_rms=float(stats.update_rms),
        feature_rms=float(stats.feature_rms),
        sensitivity=sensitivity,
    )


def _changes(lin: Linearization, directions: list[Tensor]) -> Evaluation:
    """Return first-order changes: derivatives, or central differences where torch has no forward-mode derivative."""
    try:
        return lin.jvp(directions)
    except NotImplementedError:
        sizes = [sum(float(x.double().square().sum()) for x in xs) for xs in (lin.parameters, directions)]
        coarsest = max(torch.finfo(p.dtype).eps for p in lin.parameters)
        step = math.sqrt(coarsest * sizes[0] / sizes[1])  # far above rounding, and nearly of first order
        pairs = list(zip(lin.parameters, directions, strict=True))
        up, down = (lin.forward([(p + sign * step * d).to(p.dtype) for p, d in pairs]) for sign in (1, -1))
        features = [
            tuple((b - a) / (2 * step) for a, b in zip(low, high, strict=True))
            for low, high in zip(down.features, up.features, strict=True)
        ]
        return Evaluation(features, (up.loss - down.loss) / (2 * step))


def _unit_updates(lin: Linearization, optimizer: OptimizerLike) -> list[Tensor]:
    """Return what the optimizer's next step adds to each parameter with lr = 1, in float64 except for plain SGD."""
    if optimizer == "sgd":
        return [-g for g in lin.gradients]
    if not isinstance(optimizer, Optimizer):
        # In float64, because small updates are lost in the rounding of a parameter.
        clones = [p.double().clone().requires_grad_() for p in lin.parameters]
        return optimizer_update(factory(optimizer, [{"params": clones}]), clones, [g.double() for g in lin.gradients])
    has_all([optimizer], lin)
    unit, small = (
        optimizer_update(_with_rate(optimizer, rate), lin.originals, lin.gradients, dtype=torch.float64)
        for rate in (1.0, _SMALL)
    )
    for name, gradient, dw, part in zip(lin.names, lin.gradients, unit, small, strict=True):
        wanted, found = (float((gradient.double() * x).sum()) for x in (_SMALL * dw, part))
        if abs(found - wanted) > _LINEAR * abs(wanted):
            raise ValueError(
                f"optimizer: expected updates proportional to the learning rate; with a rate of {_SMALL:g} "
                f"{type(optimizer).__name__} lowers the loss by {-found:.4g} through {name!r}, instead of {-wanted:.4g}"
            )
    return unit


def _with_rate(optimizer: Optimizer, rate: float, replaced: dict[int, Tensor] | None = None) -> Optimizer:
    """Return a shallow copy of the optimizer with another lr and, for a copy of the model, its parameters."""
    replaced = replaced or {}
    clone: Optimizer = object.__new__(type(optimizer))
    vars(clone).update(vars(optimizer))
    clone.param_groups = [
        {**group, "lr": rate, "params": [replaced.get(id(p), p) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    state = type(optimizer.state)(dict)  # torch's default for missing entries
    state.update({replaced.get(id(p), p): kept for p, kept in optimizer.state.items()})
    clone.state = state
    return clone


def _scaled_copy(
    model: nn.Module, lin: Linearization, parts: Partition, optimizer: OptimizerLike, scale: float
) -> tuple[nn.Module, OptimizerLike]:
    """Return a copy of the model with its output scaled, and the optimizer for it."""
    memo: dict[int, Any] = {}
    scaled = copy.deepcopy(model, memo)
    with torch.no_grad():
        for p in parts.output:
            memo[id(lin.originals[p])].mul_(scale)
    if isinstance(optimizer, Optimizer):
        return scaled, _with_rate(optimizer, 1.0, {id(p): memo[id(p)] for p in lin.originals})
    return scaled, optimizer
