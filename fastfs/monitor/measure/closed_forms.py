"""The updates of torch's optimizers from the state that a step leaves behind: rules and coefficients per group.

`csrc/updates.h` derives the formulas. Hyper-parameters may be numbers or tensors; nothing here waits for a device. All
arithmetic is in float64, but for the bias corrections that torch itself computes in the dtype of the step counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Adamax, AdamW, Optimizer, RMSprop
from torch.optim.optimizer import _default_to_fused_or_foreach

from fastfs.rules import Rule

Group = dict[str, Any]
Number = float | Tensor

_SETTINGS = (
    *("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "alpha", "centered", "maximize"),
    *("amsgrad", "capturable", "differentiable", "foreach", "fused", "decoupled_weight_decay"),
)
DTYPES = (torch.float32, torch.float64)  # in the 16-bit ones a parameter moves by what its rounding leaves


@dataclass(frozen=True)
class Form:
    """How to read the update of a group's parameters from the optimizer's state.

    `first` and `second` name entries of a parameter's state; a rule that has no state is given the gradient, or where
    that may be infinite without the update being so, the parameter.
    """

    rule: Rule
    first: str | None = None
    second: str | None = None
    steps: bool = False  # do the coefficients depend on the step counters
    coarse: torch.dtype | None = None  # the least precise dtype of hyper-parameters that are tensors

    @property
    def states(self) -> tuple[str, ...]:
        """Entries of a parameter's state that have to have its dtype."""
        return tuple(name for name in (self.first, self.second) if name is not None)


def closed_form(optimizer: Optimizer, group: Group) -> Form | None:
    """The closed form for the parameters of a group; None where a copy from before the step is needed.

    Only for the optimizers of torch themselves: a subclass may do anything in its step. RMSprop with weight decay and
    without momentum divides by the distance of lr wd to sqrt(square_avg) + eps, where digits, or all, may be lost.
    """
    form = _form(type(optimizer), group)
    coarse = None if form is None else narrowest(group)
    return form if form is None or coarse is None else replace(form, coarse=coarse)


def _form(kind: type[Optimizer], group: Group) -> Form | None:
    if kind is SGD:
        return Form(Rule.LINEAR, "momentum_buffer" if group["momentum"] != 0 else None)
    if kind in (Adam, AdamW):
        return Form(Rule.ADAM, "exp_avg", "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq", steps=True)
    if kind is Adamax:
        return Form(Rule.ADAMAX, "exp_avg", "exp_inf", steps=True)
    if kind is RMSprop:
        if group["momentum"] > 0:
            return Form(Rule.LINEAR, "momentum_buffer")
        if _is_zero(group["weight_decay"]):
            return Form(Rule.RMSPROP, "square_avg", "grad_avg" if group["centered"] else None)
    return None


def settings(group: Group) -> Group:
    """A group's hyper-parameters as they are now: what is written to a tensor later does not change them."""
    return {name: _copied(group[name]) for name in _SETTINGS if name in group}


def signature(group: Group) -> list[object]:
    """What tells on the host whether hyper-parameters have changed: numbers, identities and versions of tensors."""
    return [_signed(group.get(name)) for name in _SETTINGS]


def narrowest(group: Group) -> torch.dtype | None:
    """The least precise dtype of the tensors among the hyper-parameters."""
    values = [group.get(name) for name in ("lr", "momentum", "weight_decay", "eps", "dampening", "alpha")]
    values += group.get("betas", ())
    dtypes = [value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def coefficients(
    optimizer: Optimizer, group: Group, form: Form, count: int, steps: Sequence[Tensor], rewritten: bool
) -> Tensor:
    """The coefficients of `count` parameters of a group: float64 (count, C).

    On the CPU, or where hyper-parameters or step counters are on a device, there.

    Args:
        optimizer: The optimizer after its step.
        group: One of its groups.
        form: That of the group.
        count: Number of parameters.
        steps: Their step counters, where the form depends on them.
        rewritten: See `rewrites_gradients`.
    """
    lr = _double(group["lr"])
    sign = -1.0 if group["maximize"] else 1.0
    columns: list[Number]
    if type(optimizer) is SGD:
        columns = _sgd(group, lr, sign, rewritten)
    elif form.rule is Rule.LINEAR:  # RMSprop with momentum
        columns = [0.0, 0.0, -lr, 0.0]
    elif form.rule is Rule.RMSPROP:
        columns = [0.0, -lr * sign, 1.0 if group["centered"] else 0.0, _double(group["eps"])]
    else:
        away = isinstance(lr, Tensor) and not lr.is_cpu
        device = lr.device if isinstance(lr, Tensor) and away else steps[0].device
        columns = _adam(optimizer, group, lr, form, steps, device)
    return _table(columns, count)


def _sgd(group: Group, lr: Number, sign: float, rewritten: bool) -> list[Number]:
    decay, momentum = _double(group["weight_decay"]), _double(group["momentum"])
    nesterov = group["nesterov"]
    if group["momentum"] != 0 and not nesterov:
        return [0.0, 0.0, -lr, 0.0]
    if rewritten:
        return [0.0, -lr, 0.0, -momentum]
    keep = 1.0 - lr * decay
    return [-lr * decay / keep, -lr * sign / keep, -lr * momentum / keep if nesterov else 0.0, 0.0]


def _adam(
    optimizer: Optimizer, group: Group, lr: Number, form: Form, steps: Sequence[Tensor], device: torch.device
) -> list[Number]:
    """Of Adam, AdamW and Adamax, with the bias corrections 1 - beta^t."""
    in_float = group["capturable"] or group["differentiable"]
    fused = group.get("fused") or False
    together = None if in_float and not fused else torch.stack(list(steps)).to(device, torch.float64, non_blocking=True)

    def correction(beta: Number) -> Tensor:
        if together is not None:
            return 1.0 - _double(beta) ** together
        powers = [beta**t for t in steps] if isinstance(beta, Tensor) else torch._foreach_pow(beta, list(steps))
        return (1.0 - torch.stack(list(powers))).to(device, torch.float64, non_blocking=True)

    beta1, beta2 = group["betas"]
    first = correction(beta1)
    if form.rule is Rule.ADAMAX:
        return [-lr / first]
    decoupled = group.get("decoupled_weight_decay", type(optimizer) is AdamW)
    decay = _double(group["weight_decay"]) if decoupled else 0.0
    keep = 1.0 - lr * decay
    return [-lr * decay / keep, -lr / (first * keep), correction(beta2).rsqrt(), _double(group["eps"])]


def rewrites_gradients(optimizer: Optimizer, group: Group, params: list[Tensor]) -> bool:
    """Does the step of this group leave g + momentum * buf in the place of g?

    So does the foreach implementation of SGD with Nesterov momentum, unless it needed a copy of the gradients anyway.
    """
    if not isinstance(optimizer, SGD) or not group["nesterov"] or group["maximize"]:
        return False
    if group["fused"] or not _is_zero(group["weight_decay"]):
        return False
    if group["foreach"] is None and group["fused"] is None:
        _, foreach = _default_to_fused_or_foreach(params, differentiable=False, use_fused=False)
        return bool(foreach)
    return bool(group["foreach"])


def evaluate(
    rule: Rule, parameter: Tensor, gradient: Tensor | None, first: Tensor, second: Tensor | None, table: Tensor
) -> tuple[Tensor, Tensor]:
    """The update of single elements, and the size of the parts that it is the sum of: float64 (P, W) both.

    Args:
        rule: how the update follows from the rest.
        parameter, gradient, first, second: elements of P parameters after the step, float64 (P, W); None for what the
            rule does not have.
        table: their coefficients, (P, C) on the same device.
    """
    columns = table.unsqueeze(2).unbind(dim=1)
    if rule is Rule.LINEAR:
        assert gradient is not None
        parts = [columns[0] * parameter, columns[1] * gradient, columns[2] * first]
    elif rule is Rule.ADAM:
        assert second is not None
        below = _nonzero(torch.addcmul(columns[3], columns[2], second.sqrt()))
        parts = [columns[0] * parameter, columns[1] * first / below]
    elif rule is Rule.ADAMAX:
        assert second is not None
        parts = [columns[0] * first / _nonzero(second)]
    else:
        assert gradient is not None
        assert second is not None
        centre = columns[2] * second.square()
        variance = first - centre
        below = _nonzero(variance.sqrt() + columns[3])
        parts = [columns[0] * parameter / below, columns[1] * gradient / below]
        update = parts[0] + parts[1]
        # Where the variance nearly cancels, the rounding of its parts is all there is of it.
        return update, update.abs() * (1.0 + torch.where(variance == 0, 0.0, (first + centre) / variance))
    if len(parts) == 1:
        return parts[0], parts[0].abs()
    stacked = torch.stack(parts)
    return stacked.sum(dim=0), stacked.abs().sum(dim=0)


def _nonzero(below: Tensor) -> Tensor:
    """As in `csrc/updates.h`: 0 / 0 reads as no update."""
    return torch.where(below == 0, 1.0, below)


def uncertainty(group: Group, form: Form, steps: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """By how much, relatively, the bias corrections that torch uses may be off: float64 (count,); None for not at all.

    Powers of tensors are computed in their dtype, and 1 - beta^t cancels for the first steps.
    """
    if form.rule not in (Rule.ADAM, Rule.ADAMAX):
        return None
    betas = group["betas"]
    tensors = any(isinstance(beta, Tensor) for beta in betas)
    if not (tensors or group["capturable"] or group["differentiable"]):
        return None
    t = torch.stack(list(steps)).to(device, torch.float64, non_blocking=True)
    total = torch.zeros_like(t)
    for beta in betas[:1] if form.rule is Rule.ADAMAX else betas:
        total = total + 1.0 / (1.0 - _on(_double(beta), device) ** t)
    eps: float = torch.finfo(torch.float32).eps
    return total * (4.0 * eps)


def _on(value: Number, device: torch.device) -> Number:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return tuple(map(_copied, value)) if isinstance(value, (tuple, list)) else value


def _signed(value: Any) -> object:
    if isinstance(value, Tensor):
        return id(value), value._version
    return tuple(map(_signed, value)) if isinstance(value, (tuple, list)) else value


def _is_zero(value: Number) -> bool:
    """Whether a hyper-parameter is known to be zero: of a tensor it is not known."""
    return not isinstance(value, Tensor) and value == 0


def _double(value: Number) -> Number:
    return value.detach().reshape(()).to(torch.float64) if isinstance(value, Tensor) else value


def _table(columns: list[Number], count: int) -> Tensor:
    """Numbers, tensors () and tensors (count,) side by side: (count, len(columns))."""
    tensors = [c for c in columns if isinstance(c, Tensor)]
    if not tensors:
        return torch.tensor([columns], dtype=torch.float64, device="cpu").expand(count, -1)
    device = next((t.device for t in tensors if not t.is_cpu), tensors[0].device)
    zero = torch.zeros(count, dtype=torch.float64, device=device)
    return torch.stack([c if isinstance(c, Tensor) and c.dim() else zero + c for c in columns], dim=1)
