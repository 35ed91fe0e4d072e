"""The table of torch's optimizers whose update follows from what a step leaves behind.

A row says of a class, with some of its options, which rule gives the update, which entries of the state it reads and
how its coefficients follow from the hyper-parameters. The measurement (`update_plans`, `kernel_arguments`), its
verification, the tests and the table in `docs/numerics.md` follow from the rows. The formulas are derived in
`csrc/parameter_sums.h`; the rules themselves are in `fastfs/_core/optimizer_rules.py`.

To add a row, see "How to add an optimizer rule" in `CONTRIBUTING.md`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, Optimizer, RMSprop
from torch.optim.optimizer import _default_to_fused_or_foreach

from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._monitor.measure.completed_step import CompletedStep
from fastfs._monitor.measure.hyper_parameters import Group, Number, double, is_zero, narrowest_dtype

__all__ = [
    "CLOSED_FORMS",
    "DTYPES",
    "ClosedForm",
    "closed_form",
    "coefficient_uncertainty",
    "coefficients",
    "rewrites_gradients",
]

DTYPES = (torch.float32, torch.float64)  # in 16 bits the rounding of the parameter is a large part of its update


class ClosedForm(NamedTuple):
    """A row of the table.

    `first` and `second` name entries of a parameter's state. Without `first` the rule is given the gradient, without
    `second` the parameter.

    Attributes:
        optimizer: The class itself; subclasses may do anything in their step.
        options: For which options the row holds, in words.
        applies: The same for the hyper-parameters of a group. The first row that applies counts.
        update: The formula of dw, in the notation of `csrc/parameter_sums.h`.
        rule: The rule of `optimizer_stats`.
        coefficients: The coefficients of the rule: numbers, 0-d tensors or tensors (P,).
        implementations: Arguments of the class that select an implementation which the row covers.
        first, second: Names of the states that the rule reads.
        counted: Whether the coefficients depend on the step counters.
        betas: How many of the betas have a bias correction.
        narrowest: The least precise dtype of the hyper-parameters that are tensors; set by `closed_form`.
    """

    optimizer: type[Optimizer]
    options: str
    applies: Callable[[Group], bool]
    update: str
    rule: OptimizerRule
    coefficients: Callable[[CompletedStep], list[Number]]
    implementations: tuple[str, ...]
    first: str | None = None
    second: str | None = None
    counted: bool = False
    betas: int = 0
    narrowest: torch.dtype | None = None

    @property
    def name(self) -> str:
        return f"{self.optimizer.__name__} {self.options}".rstrip()

    @property
    def states(self) -> tuple[str, ...]:
        """Entries of a parameter's state that have to have its dtype."""
        return tuple(name for name in (self.first, self.second) if name is not None)


def _always(_: Group) -> bool:
    return True


def _from_buffer(step: CompletedStep) -> list[Number]:
    return [0.0, 0.0, -double(step.group["lr"]), 0.0]


def _sgd(step: CompletedStep) -> list[Number]:
    """Without momentum, or Nesterov: solves the step for the parameter before it."""
    group, lr = step.group, double(step.group["lr"])
    decay, momentum = double(group["weight_decay"]), double(group["momentum"])
    if step.rewrote_gradients:
        return [0.0, -lr, 0.0, -momentum]
    keep = 1.0 - lr * decay
    return [-lr * decay / keep, -lr * _sign(group) / keep, -lr * momentum / keep if group["nesterov"] else 0.0, 0.0]


def _adam(step: CompletedStep, *, decoupled: bool) -> list[Number]:
    group, lr = step.group, double(step.group["lr"])
    first, second = step.bias_corrections(lr, group["betas"])
    decay = double(group["weight_decay"]) if group.get("decoupled_weight_decay", decoupled) else 0.0
    keep = 1.0 - lr * decay
    return [-lr * decay / keep, -lr / (first * keep), second**-0.5, double(group["eps"])]


def _adamax(step: CompletedStep) -> list[Number]:
    lr = double(step.group["lr"])
    return [-lr / step.bias_corrections(lr, step.group["betas"][:1])[0]]


def _rmsprop(step: CompletedStep, *, centered: float) -> list[Number]:
    group = step.group
    return [0.0, -double(group["lr"]) * _sign(group), centered, double(group["eps"])]


def _adagrad(step: CompletedStep) -> list[Number]:
    group, lr = step.group, double(step.group["lr"])
    if group["lr_decay"] != 0:
        lr = lr / (1.0 + (step.count(lr) - 1.0) * group["lr_decay"])
    return [0.0, -lr * _sign(group), 0.0, double(group["eps"])]


def _sign(group: Group) -> float:
    return -1.0 if group["maximize"] else 1.0


_SGD = functools.partial(ClosedForm, SGD, implementations=("foreach", "fused", "differentiable"))
_ADAM, _ADAMW = (
    functools.partial(
        ClosedForm,
        optimizer,
        update=update,
        rule=OptimizerRule.ADAM,
        coefficients=functools.partial(_adam, decoupled=optimizer is AdamW),
        implementations=("foreach", "fused", "capturable", "differentiable"),
        first="exp_avg",
        counted=True,
        betas=2,
    )
    for optimizer, update in (
        (Adam, "u = -lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)"),
        (AdamW, "(u - lr wd w) / (1 - lr wd)"),
    )
)
_RMSPROP = functools.partial(ClosedForm, RMSprop, implementations=("foreach", "capturable", "differentiable"))

CLOSED_FORMS: tuple[ClosedForm, ...] = (
    _SGD(
        options="without momentum",
        applies=lambda group: group["momentum"] == 0,
        update="-lr (s g + wd w) / (1 - lr wd)",
        rule=OptimizerRule.LINEAR,
        coefficients=_sgd,
    ),
    _SGD(
        options="with momentum",
        applies=lambda group: not group["nesterov"],
        update="-lr buf",
        rule=OptimizerRule.LINEAR,
        coefficients=_from_buffer,
        first="momentum_buffer",
    ),
    _SGD(
        options="with Nesterov momentum",
        applies=_always,
        update="-lr (s g + mu buf + wd w) / (1 - lr wd)",
        rule=OptimizerRule.LINEAR,
        coefficients=_sgd,
        first="momentum_buffer",
    ),
    _ADAM(options="", applies=lambda group: not group["amsgrad"], second="exp_avg_sq"),
    _ADAM(options="with amsgrad", applies=_always, second="max_exp_avg_sq"),
    _ADAMW(options="", applies=lambda group: not group["amsgrad"], second="exp_avg_sq"),
    _ADAMW(options="with amsgrad", applies=_always, second="max_exp_avg_sq"),
    ClosedForm(
        Adamax,
        options="",
        applies=_always,
        update="-lr / (1 - beta1^t) m / u_inf",
        rule=OptimizerRule.ADAMAX,
        coefficients=_adamax,
        implementations=("foreach", "capturable", "differentiable"),
        first="exp_avg",
        second="exp_inf",
        counted=True,
        betas=1,
    ),
    _RMSPROP(
        options="with momentum",
        applies=lambda group: group["momentum"] > 0,
        update="-lr buf",
        rule=OptimizerRule.LINEAR,
        coefficients=_from_buffer,
        first="momentum_buffer",
    ),
    # With weight decay and without momentum the divisor is h - lr wd, which may be near 0.
    _RMSPROP(
        options="centered, without momentum and weight decay",
        applies=lambda group: group["centered"] and is_zero(group["weight_decay"]),
        update="-lr s g / (sqrt(square_avg - grad_avg^2) + eps)",
        rule=OptimizerRule.RMSPROP,
        coefficients=functools.partial(_rmsprop, centered=1.0),
        first="square_avg",
        second="grad_avg",
    ),
    _RMSPROP(
        options="without momentum and weight decay",
        applies=lambda group: is_zero(group["weight_decay"]),
        update="-lr s g / (sqrt(square_avg) + eps)",
        rule=OptimizerRule.RMSPROP,
        coefficients=functools.partial(_rmsprop, centered=0.0),
        first="square_avg",
    ),
    ClosedForm(
        Adagrad,
        options="without weight decay",
        applies=lambda group: is_zero(group["weight_decay"]),
        update="-lr / (1 + (t - 1) lr_decay) s g / (sqrt(sum) + eps)",
        rule=OptimizerRule.RMSPROP,
        coefficients=_adagrad,
        implementations=("foreach", "fused", "differentiable"),
        first="sum",
        counted=True,
    ),
)
"""The table."""

_OF_CLASS = {
    optimizer: tuple(form for form in CLOSED_FORMS if form.optimizer is optimizer)
    for optimizer in {form.optimizer for form in CLOSED_FORMS}
}


def closed_form(optimizer: Optimizer, group: Group) -> ClosedForm | None:
    """Returns the closed form for the parameters of a group; None where a copy from before the step is needed."""
    for form in _OF_CLASS.get(type(optimizer), ()):
        if form.applies(group):
            narrowest = narrowest_dtype(group)
            return form if narrowest is None else form._replace(narrowest=narrowest)
    return None


def coefficients(form: ClosedForm, step: CompletedStep, parameters: int) -> Tensor:
    """Returns the coefficients of a group's parameters: float64 (P, C).

    They are on the CPU, unless hyper-parameters or step counters are on a device.
    """
    columns = form.coefficients(step)
    tensors = [c for c in columns if isinstance(c, Tensor)]
    if not tensors:
        return torch.tensor([columns], dtype=torch.float64, device="cpu").expand(parameters, -1)
    device = next((t.device for t in tensors if not t.is_cpu), tensors[0].device)
    zero = torch.zeros(parameters, dtype=torch.float64, device=device)
    return torch.stack([c if isinstance(c, Tensor) and c.dim() else zero + c for c in columns], dim=1)


def coefficient_uncertainty(form: ClosedForm, step: CompletedStep, device: torch.device) -> Tensor | None:
    """Returns the relative error that torch's own bias corrections may have: float64 (P,), None for none.

    Powers of tensors are computed in their dtype, and 1 - beta^t cancels in the first steps.
    """
    if not form.betas:
        return None
    group = step.group
    betas = group["betas"]
    tensors = any(isinstance(beta, Tensor) for beta in betas)
    if not (tensors or group["capturable"] or group["differentiable"]):
        return None
    t = torch.stack(list(step.counters)).to(device, torch.float64, non_blocking=True)
    total = torch.zeros_like(t)
    for beta in betas[: form.betas]:
        value = double(beta)
        on_device = value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        total = total + 1.0 / (1.0 - on_device**t)
    eps: float = torch.finfo(torch.float32).eps
    return total * (4.0 * eps)


def rewrites_gradients(optimizer: Optimizer, group: Group, params: Sequence[Tensor]) -> bool:
    """Returns whether the step of this group leaves g + momentum * buf in the place of g.

    The foreach implementation of SGD with Nesterov momentum does, unless it needs a copy of the gradients anyway.
    Subclasses of SGD are expected to do the same.
    """
    if not isinstance(optimizer, SGD) or not group["nesterov"] or group["maximize"]:
        return False
    if group["fused"] or not is_zero(group["weight_decay"]):
        return False
    if group["foreach"] is None and group["fused"] is None:
        _, foreach = _default_to_fused_or_foreach(list(params), differentiable=False, use_fused=False)
        return bool(foreach)
    return bool(group["foreach"])
