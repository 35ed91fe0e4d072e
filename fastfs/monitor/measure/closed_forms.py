"""The updates of torch's optimizers from the state that a step leaves behind: rules and coefficients per group.

`csrc/updates.h` derives the formulas. Hyper-parameters may be numbers or tensors; nothing here waits for a device. All
arithmetic is in float64, but for the bias corrections that torch itself computes in the dtype of the step counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Adamax, AdamW, Optimizer, RMSprop
from torch.optim.optimizer import _default_to_fused_or_foreach

from fastfs.rules import Rule

Group = dict[str, Any]
Number = float | Tensor

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

    @property
    def states(self) -> tuple[str, ...]:
        """Entries of a parameter's state that have to have its dtype."""
        return tuple(name for name in (self.first, self.second) if name is not None)


def closed_form(optimizer: Optimizer, group: Group) -> Form | None:
    """The closed form for the parameters of a group; None where a copy from before the step is needed.

    Only for the optimizers of torch themselves: a subclass may do anything in its step. RMSprop with weight decay and
    without momentum divides by the distance of lr wd to sqrt(square_avg) + eps, where digits, or all, may be lost.
    """
    kind = type(optimizer)
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
