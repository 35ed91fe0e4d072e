"""The arguments of `optimizer_stats` for one call: gradients, parameters, states and coefficients of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfs._monitor.capture.fingerprints import real
from fastfs._monitor.measure.closed_forms import coefficient_uncertainty, coefficients
from fastfs._monitor.measure.completed_step import CompletedStep
from fastfs._monitor.measure.hyper_parameters import Group, HyperParameters
from fastfs._monitor.measure.update_plans import Call, Part
from fastfs._network.placements import local, own_part, summand

__all__ = ["KernelArguments", "PartState", "kernel_arguments", "state_of"]

_FROM_COPY = (1.0, 0.0, -1.0, 0.0)  # dw = w - s, with the copy as the state


@dataclass
class PartState:
    """The states and step counters of a part's parameters; lists are empty for what its closed form does not read."""

    first: list[Tensor]
    second: list[Tensor]
    counters: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.first, *self.second, *self.counters]


def state_of(optimizer: Any, part: Part) -> PartState | None:
    """Returns the state of a part, None if some of it is missing."""
    form = part.form
    if form is None or not (form.first or form.counted):
        return PartState([], [], [])
    state = optimizer.state
    try:
        own = [state[p] for p in part.params] if all(p in state for p in part.params) else []
        if len(own) < len(part.params):
            return None
        first = [] if form.first is None else [s[form.first] for s in own]
        second = [] if form.second is None else [s[form.second] for s in own]
        return PartState(first, second, [local(s["step"]) for s in own] if form.counted else [])
    except KeyError:
        return None


@dataclass
class KernelArguments:
    """Arguments of `optimizer_stats` for P parameters.

    Attributes:
        gradients, params, first, second: One tensor per parameter; `second` is empty for a rule with one state.
        table: Coefficients, float64 (P, C).
        uncertainty: Relative error of the update that is to be expected, float64 (P,); None for none.
    """

    gradients: list[Tensor]
    params: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    table: Tensor
    uncertainty: Tensor | None


def kernel_arguments(
    optimizer: Any,
    call: Call,
    states: Sequence[PartState | None],
    gradients: Sequence[Tensor | None],
    copies: dict[Tensor, Tensor],
    hyper_parameters: Sequence[HyperParameters],
    rewritten: Sequence[bool],
    known_counts: Sequence[float | None],
) -> KernelArguments:
    """Returns the arguments of one call.

    Args:
        optimizer: The optimizer after its step.
        call: The call.
        states: State of each part of the call.
        gradients: Gradients of all parameters of the optimizer.
        copies: Copies of parameters from before the step.
        hyper_parameters: Those of all groups, from before the step.
        rewritten: For each part whether its gradients were rewritten, see `closed_forms.rewrites_gradients`.
        known_counts: For each part the step counter of all its parameters, if the host knows it.

    Raises:
        RuntimeError: State is missing.
    """
    own: list[Tensor] = [gradients[i] for i in call.indices]  # type: ignore[misc]
    first: list[Tensor] = []
    second: list[Tensor] = []
    tables: list[Tensor] = []
    uncertainties: list[Tensor | int] = []
    begin = 0
    for part, state, rewrote, count in zip(call.parts, states, rewritten, known_counts, strict=True):
        form, params, group = part.form, part.params, hyper_parameters[part.group].values
        end = begin + len(params)
        if form is None:
            pairs = zip(params, own[begin:end], strict=True)
            dense = [_dense(optimizer, p, g, group if rewrote else None) for p, g in pairs]
            own[begin:end] = dense
            first += [real(copies[p]).to(g.dtype) for p, g in zip(params, dense, strict=True)]
            tables.append(torch.tensor([_FROM_COPY], dtype=torch.float64, device="cpu").expand(len(params), -1))
        else:
            if state is None:
                raise RuntimeError(
                    f"UpdateMeter.after: the optimizer's state has no {_missing(optimizer, part)}; "
                    "call it right after step()"
                )
            first += own[begin:end] if form.first is None else state.first
            second += params if form.second is None else state.second
            step = CompletedStep(group, state.counters, count, rewrote)
            tables.append(coefficients(form, step, len(params)))
            uncertainty = coefficient_uncertainty(form, step, call.device)
            uncertainties.append(uncertainty if uncertainty is not None else len(params))
        begin = end
    params = call.params
    if not call.closed:
        params = [real(p).to(g.dtype) for p, g in zip(params, own, strict=True)]
    elif call.converted:
        own, params, first, second = (list(map(real, x)) for x in (own, params, first, second))
    if call.rule.states < 2:
        second = []
    together = None
    if any(isinstance(each, Tensor) for each in uncertainties):
        zero = torch.zeros(1, dtype=torch.float64, device=call.device)
        together = torch.cat([each if isinstance(each, Tensor) else zero.expand(each) for each in uncertainties])
    return KernelArguments(own, params, first, second, _concatenated(tables, call.device), together)


def _missing(optimizer: Any, part: Part) -> str:
    form = part.form
    assert form is not None
    names = [*(["step"] if form.counted else []), *form.states]
    for p in part.params:
        for name in names:
            if name not in optimizer.state.get(p, {}):
                return repr(name)
    return "entries"


def _dense(optimizer: Any, p: Tensor, gradient: Tensor, rewritten: Group | None) -> Tensor:
    """The gradient as the op takes it, in the wider dtype of gradient and parameter."""
    part = own_part(p, gradient)
    if part is None and summand(p, gradient) is None:
        return real(torch.zeros_like(local(p)))  # of the update alone, since these elements are of others
    gradient = local(gradient) if part is None else part
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    gradient = gradient.to(torch.promote_types(gradient.dtype, p.dtype))
    if rewritten is not None:
        gradient = gradient - rewritten["momentum"] * local(optimizer.state[p]["momentum_buffer"])
    return real(gradient)


def _concatenated(tables: list[Tensor], device: torch.device) -> Tensor:
    """One table of coefficients, on the CPU if all of them are."""
    if len(tables) == 1:
        return tables[0].contiguous()
    if all(table.is_cpu for table in tables):
        return torch.cat(tables)
    return torch.cat([table.to(device, non_blocking=True) for table in tables])
