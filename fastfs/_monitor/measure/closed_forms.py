"""The updates of torch's optimizers from the state that a step leaves behind: rules and coefficients per group.

`csrc/parameter_sums.h` derives the formulas. Hyper-parameters may be numbers or tensors; nothing here waits for a
device. All arithmetic is in float64, but for the bias corrections that torch itself computes in the dtype of the step
counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Adamax, AdamW, Optimizer, RMSprop
from torch.optim.optimizer import _default_to_fused_or_foreach

from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._monitor.capture.fingerprints import known_equal

Group = dict[str, Any]
Number = float | Tensor

_TINY = 1e-300  # in a denominator: as in `csrc/parameter_sums.h` 0 / 0 reads as no update
DTYPES = (torch.float32, torch.float64)  # in the 16-bit ones a parameter moves by what its rounding leaves


@dataclass(frozen=True)
class Form:
    """How to read the update of a group's parameters from the optimizer's state.

    `first` and `second` name entries of a parameter's state; a rule that has no state is given the gradient, or where
    that may be infinite without the update being so, the parameter.
    """

    rule: OptimizerRule
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
        return Form(OptimizerRule.LINEAR, "momentum_buffer" if group["momentum"] != 0 else None)
    if kind in (Adam, AdamW):
        return Form(OptimizerRule.ADAM, "exp_avg", "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq", steps=True)
    if kind is Adamax:
        return Form(OptimizerRule.ADAMAX, "exp_avg", "exp_inf", steps=True)
    if kind is RMSprop:
        if group["momentum"] > 0:
            return Form(OptimizerRule.LINEAR, "momentum_buffer")
        if _is_zero(group["weight_decay"]):
            return Form(OptimizerRule.RMSPROP, "square_avg", "grad_avg" if group["centered"] else None)
    return None


class Settings:
    """A group's hyper-parameters at a moment.

    Attributes:
        values: what is written to a tensor later does not change them.
    """

    def __init__(self, group: Group) -> None:
        self._seen = group.copy()
        del self._seen["params"]
        tensors = [v for v in self._seen.values() if isinstance(v, Tensor)]
        tensors += [v for pair in (self._seen.get("betas", ()),) for v in pair if isinstance(v, Tensor)]
        self._versions = [(v, v._version) for v in tensors]
        self.values = {k: _copied(v) for k, v in self._seen.items()} if tensors else self._seen

    def hold(self, group: Group, but: Sequence[str] = ()) -> bool:
        """Whether they, ``but`` for some, are still the same, as far as the host can tell."""
        for name, value in self._seen.items():
            now = group.get(name)
            if (
                now is not value
                and name not in but
                and (isinstance(now, Tensor) or isinstance(value, Tensor) or now != value)
            ):
                return False
        return bool(but) or all(tensor._version == version for tensor, version in self._versions)


def narrowest(group: Group) -> torch.dtype | None:
    """The least precise dtype of the tensors among the hyper-parameters."""
    values = [group.get(name) for name in ("lr", "momentum", "weight_decay", "eps", "dampening", "alpha")]
    values += group.get("betas", ())
    dtypes = [value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def coefficients(
    optimizer: Optimizer,
    group: Group,
    form: Form,
    count: int,
    steps: Sequence[Tensor],
    rewritten: bool,
    together: float | None = None,
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
        together: What all step counters are, if that is known.
    """
    lr = _double(group["lr"])
    sign = -1.0 if group["maximize"] else 1.0
    columns: list[Number]
    if type(optimizer) is SGD:
        columns = _sgd(group, lr, sign, rewritten)
    elif form.rule is OptimizerRule.LINEAR:  # RMSprop with momentum
        columns = [0.0, 0.0, -lr, 0.0]
    elif form.rule is OptimizerRule.RMSPROP:
        columns = [0.0, -lr * sign, 1.0 if group["centered"] else 0.0, _double(group["eps"])]
    else:
        away = isinstance(lr, Tensor) and not lr.is_cpu
        device = lr.device if isinstance(lr, Tensor) and away else steps[0].device
        columns = _adam(optimizer, group, lr, form, steps, device, together)
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
    optimizer: Optimizer,
    group: Group,
    lr: Number,
    form: Form,
    steps: Sequence[Tensor],
    device: torch.device,
    known: float | None,
) -> list[Number]:
    """Of Adam, AdamW and Adamax, with the bias corrections 1 - beta^t."""
    in_float = group["capturable"] or group["differentiable"]
    fused = group.get("fused") or False
    together: Tensor | float | None = None
    if known is not None and known > 0 and (not in_float or fused):
        together = known
    elif not in_float or fused:
        together = torch.stack(list(steps)).to(device, torch.float64, non_blocking=True)
        if known_equal(together, together[:1].expand_as(together)):
            number = together[0].item()  # on the CPU: nothing waits
            together = number if number > 0 else together  # 0: no step has been made

    def correction(beta: Number) -> Number:
        if together is not None:
            return 1.0 - _double(beta) ** together
        powers = [beta**t for t in steps] if isinstance(beta, Tensor) else torch._foreach_pow(beta, list(steps))
        return (1.0 - torch.stack(list(powers))).to(device, torch.float64, non_blocking=True)

    beta1, beta2 = group["betas"]
    first = correction(beta1)
    if form.rule is OptimizerRule.ADAMAX:
        return [-lr / first]
    decoupled = group.get("decoupled_weight_decay", type(optimizer) is AdamW)
    decay = _double(group["weight_decay"]) if decoupled else 0.0
    keep = 1.0 - lr * decay
    return [-lr * decay / keep, -lr / (first * keep), correction(beta2) ** -0.5, _double(group["eps"])]


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


def parts_of(rule: OptimizerRule, x: Any, gradient: Any, first: Any, second: Any, columns: Sequence[Any]) -> list[Any]:
    """The parts of the update of single elements, whose sum it is; of RMSprop also what is lost where it cancels.

    Args:
        rule: how the update follows from the rest.
        x, gradient, first, second: elements of P parameters after the step, (P, W) in float64; None for what the rule
            does not have. Tensors or arrays of numpy, which take a fraction of the time on the CPU.
        columns: the coefficients, (P, 1) each.
    """
    if rule is OptimizerRule.LINEAR:
        return [columns[0] * x, columns[1] * gradient, columns[2] * first]
    if rule is OptimizerRule.ADAM:
        return [columns[0] * x, columns[1] * first / (columns[2] * second**0.5 + (columns[3] + _TINY))]
    if rule is OptimizerRule.ADAMAX:
        return [columns[0] * first / (second + _TINY)]
    centre = columns[2] * second * second
    variance = first - centre
    below = variance**0.5 + (columns[3] + _TINY)
    parts = [columns[0] * x / below, columns[1] * gradient / below]
    # Where the variance nearly cancels, the rounding of its parts is all there is of it.
    lost = (parts[0] + parts[1]) * ((first + centre) / (variance + _TINY))
    return [*parts, lost, -lost]


def uncertainty(group: Group, form: Form, steps: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """By how much, relatively, the bias corrections that torch uses may be off: float64 (count,); None for not at all.

    Powers of tensors are computed in their dtype, and 1 - beta^t cancels for the first steps.
    """
    if form.rule not in (OptimizerRule.ADAM, OptimizerRule.ADAMAX):
        return None
    betas = group["betas"]
    tensors = any(isinstance(beta, Tensor) for beta in betas)
    if not (tensors or group["capturable"] or group["differentiable"]):
        return None
    t = torch.stack(list(steps)).to(device, torch.float64, non_blocking=True)
    total = torch.zeros_like(t)
    for beta in betas[:1] if form.rule is OptimizerRule.ADAMAX else betas:
        total = total + 1.0 / (1.0 - _on(_double(beta), device) ** t)
    eps: float = torch.finfo(torch.float32).eps
    return total * (4.0 * eps)


def _on(value: Number, device: torch.device) -> Number:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return tuple(map(_copied, value)) if isinstance(value, (tuple, list)) else value


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
