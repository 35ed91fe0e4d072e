"""What the op that measures updates takes: gradients, parameters, states and coefficients of the parts of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfs._monitor.capture.fingerprints import real
from fastfs._monitor.measure import closed_forms
from fastfs._monitor.measure.closed_forms import Group, Settings, coefficients
from fastfs._monitor.measure.update_plans import Call, Part

__all__ = ["Arguments", "States", "arguments", "states_of"]

_SNAPSHOT = (1.0, 0.0, -1.0, 0.0)  # dw = w - s


@dataclass
class States:
    """First and second state and step counters of the parameters of a part, empty where its form has none."""

    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.first, *self.second, *self.steps]


def states_of(optimizer: Any, part: Part) -> States | None:
    """None where some are missing."""
    form = part.form
    if form is None or not (form.states or form.steps):
        return States([], [], [])
    state = optimizer.state
    try:
        kept = [state[p] for p in part.params] if all(p in state for p in part.params) else []
        if len(kept) < len(part.params):
            return None
        first = [] if form.first is None else [s[form.first] for s in kept]
        second = [] if form.second is None else [s[form.second] for s in kept]
        return States(first, second, [s["step"] for s in kept] if form.steps else [])
    except KeyError:
        return None


@dataclass
class Arguments:
    """Of the op.

    Attributes:
        table: coefficients, (P, C).
        uncertain: relative error of the update that is to be expected, (P,); None for none.
    """

    gradients: list[Tensor]
    params: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    table: Tensor
    uncertain: Tensor | None


def arguments(
    optimizer: Any,
    call: Call,
    states: Sequence[States | None],
    gradients: Sequence[Tensor | None],
    buffers: dict[Tensor, Tensor],
    settings: Sequence[Settings],
    rewritten: Sequence[bool],
    counts: Sequence[float | None],
) -> Arguments:
    """The arguments for one call.

    Args:
        optimizer: after its step.
        states: of the parts of the call.
        gradients: of all parameters.
        buffers: copies of parameters from before the step.
        settings: of all groups, from before the step.
        rewritten: by part, see ``closed_forms.rewrites_gradients``.
        counts: by part, the step counter that all its parameters are known to have, if that is known.

    Raises:
        RuntimeError: state is missing.
    """
    own: list[Tensor] = [gradients[i] for i in call.indices]  # type: ignore[misc]
    first: list[Tensor] = []
    second: list[Tensor] = []
    tables: list[Tensor] = []
    doubts: list[Tensor | int] = []
    begin = 0
    for part, state, does, together in zip(call.parts, states, rewritten, counts, strict=True):
        form, params, group = part.form, part.params, settings[part.group].values
        end = begin + len(params)
        if form is None:
            pairs = zip(params, own[begin:end], strict=True)
            dense = [_dense(optimizer, p, g, group if does else None) for p, g in pairs]
            own[begin:end] = dense
            first += [real(buffers[p]).to(g.dtype) for p, g in zip(params, dense, strict=True)]
            tables.append(torch.tensor([_SNAPSHOT], dtype=torch.float64, device="cpu").expand(len(params), -1))
        else:
            if state is None:
                raise RuntimeError(
                    f"UpdateMeter.after: the optimizer's state has no {_missing(optimizer, part)}; "
                    "call it right after step()"
                )
            first += own[begin:end] if form.first is None else state.first
            second += params if form.second is None else state.second
            tables.append(coefficients(optimizer, group, form, len(params), state.steps, does, together))
            doubt = closed_forms.uncertainty(group, form, state.steps, call.device)
            doubts.append(doubt if doubt is not None else len(params))
        begin = end
    params = call.params
    if not call.closed:
        params = [real(p).to(g.dtype) for p, g in zip(params, own, strict=True)]
    elif call.is_complex:
        own, params, first, second = (list(map(real, x)) for x in (own, params, first, second))
    if call.rule.states < 2:
        second = []
    uncertain = None
    if any(isinstance(doubt, Tensor) for doubt in doubts):
        zero = torch.zeros(1, dtype=torch.float64, device=call.device)
        uncertain = torch.cat([d if isinstance(d, Tensor) else zero.expand(d) for d in doubts])
    return Arguments(own, params, first, second, _together(tables, call.device), uncertain)


def _missing(optimizer: Any, part: Part) -> str:
    form = part.form
    assert form is not None
    names = [*(["step"] if form.steps else []), *form.states]
    for p in part.params:
        for name in names:
            if name not in optimizer.state.get(p, {}):
                return repr(name)
    return "entries"


def _dense(optimizer: Any, p: Tensor, gradient: Tensor, rewritten: Group | None) -> Tensor:
    """The gradient as the op takes it, of the wider dtype of gradient and parameter."""
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    gradient = gradient.to(torch.promote_types(gradient.dtype, p.dtype))
    if rewritten is not None:
        gradient = gradient - rewritten["momentum"] * optimizer.state[p]["momentum_buffer"]
    return real(gradient)


def _together(tables: list[Tensor], device: torch.device) -> Tensor:
    """Tables of coefficients as one: on the CPU if all of them are."""
    if len(tables) == 1:
        return tables[0].contiguous()
    if all(table.is_cpu for table in tables):
        return torch.cat(tables)
    return torch.cat([table.to(device, non_blocking=True) for table in tables])
