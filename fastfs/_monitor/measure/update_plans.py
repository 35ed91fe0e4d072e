"""How the parameters of an optimizer are measured in a step: by a closed form or from a copy, and in which calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastfs._core.checks import DTYPES
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._monitor.capture.fingerprints import Places, Views, real
from fastfs._monitor.measure import closed_forms
from fastfs._monitor.measure.closed_forms import Form, rewrites_gradients
from fastfs._monitor.measure.gradient_snapshots import GradientSnapshot
from fastfs._stats import ParameterStats

__all__ = ["Call", "InOrder", "Part", "Plan", "follows", "make_plan"]


@dataclass
class Part:
    """Parameters of one group that are measured in the same way."""

    group: int
    form: Form | None  # None: by a snapshot
    params: list[Tensor] = field(default_factory=list)


@dataclass
class Call:
    """The parts that one call of the op measures: those of one rule and device, closed or not."""

    rule: OptimizerRule
    device: torch.device
    parts: list[Part] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    is_complex: bool = False
    places: Places = field(default_factory=lambda: Places(()))
    shared: bool = False  # the places are those of the gradients
    views: dict[int, Views] = field(default_factory=dict)  # of the parameters, and of the states after them

    @property
    def closed(self) -> bool:
        return self.parts[0].form is not None


@dataclass
class Plan:
    """How the parameters that have a gradient are measured, as long as nothing changes."""

    key: list[object]  # of a GradientSnapshot
    forms: list[Form | None]
    settled: bool  # the optimizer has its state: nothing else will be found next time
    calls: list[Call]
    copied: list[Tensor]
    coarse: bool  # 16-bit gradients are rewritten by the step, so that they cannot be brought back


def make_plan(optimizer: Any, look: GradientSnapshot, forms: list[Form | None], *, snapshot: bool) -> Plan:
    """How the parameters of an optimizer are to be measured that have these gradients.

    Args:
        optimizer: right before its step.
        look: at the gradients of its parameters.
        forms: the closed forms of its groups.
        snapshot: whether parameters without a gradient are copied, too.

    Raises:
        ValueError: for a parameter of a dtype that cannot be measured, or a DTensor.
    """
    calls: dict[tuple[OptimizerRule, torch.device, bool], Call] = {}
    copied: list[Tensor] = []
    settled, coarse, index = True, False, -1
    for number, (group, form) in enumerate(zip(optimizer.param_groups, forms, strict=True)):
        parts: dict[tuple[OptimizerRule, torch.device, bool], Part] = {}
        for p in group["params"]:
            index += 1
            if look.gradients[index] is None:
                if snapshot:
                    copied.append(p)
                continue
            closed = follows(optimizer, p, form)
            check(index, p)
            if not closed:
                copied.append(p)
            elif form is not None and form.states and not optimizer.state.get(p):
                settled = False
            key = (form.rule if closed and form is not None else OptimizerRule.LINEAR, p.device, closed)
            call = calls.setdefault(key, Call(key[0], p.device))
            if key not in parts:
                parts[key] = Part(number, form if closed else None)
                call.parts.append(parts[key])
            parts[key].params.append(p)
            if p.element_size() < 4 and rewrites_gradients(optimizer, group, [p]):
                coarse = True
            call.indices.append(index)
            call.params.append(p)
            call.is_complex = call.is_complex or p.is_complex()
    present = [i for i, g in enumerate(look.gradients) if g is not None]
    for call in calls.values():
        if call.closed:
            call.shared = call.indices == present and len(present) == len(look.gradients)
            call.places = look.places if call.shared else Places([real(p) for p in call.params])
    return Plan(look.key, forms, settled, list(calls.values()), copied, coarse)


def follows(optimizer: Any, p: Tensor, form: Form | None) -> bool:
    """Whether the update of this parameter follows from the state."""
    dtype = p.dtype
    if form is None or dtype.to_real() not in closed_forms.DTYPES:
        return False
    if p.grad is not None and (p.grad.dtype != dtype or p.grad.layout is not torch.strided):
        return False
    if form.coarse is not None and torch.finfo(form.coarse).eps > torch.finfo(dtype).eps:
        return False  # the update has the precision of a hyper-parameter's dtype
    state = optimizer.state.get(p)
    if not state:
        return True  # torch makes it with the parameter's dtype
    for name in form.states:
        entry = state.get(name)
        if entry is not None and entry.dtype != dtype:
            return False
    return True


def check(index: int, p: Tensor) -> None:
    if hasattr(p, "to_local"):
        raise ValueError(f"parameter {index} is a {type(p).__name__}, expected a tensor of this rank alone")
    if p.dtype.to_real() not in DTYPES:
        raise ValueError(f"parameter {index} has dtype {p.dtype}, expected one of {', '.join(map(str, DTYPES))}")


class InOrder:
    """Puts results of calls into the order of the parameters."""

    def __init__(self) -> None:
        self._orders: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, results: Sequence[tuple[list[int], Tensor]], count: int, device: torch.device) -> Tensor:
        """One row for each of ``count`` parameters, on the device; zeros for those that no result has."""
        if len(results) == 1 and len(results[0][0]) == count:
            return results[0][1]
        if not results:
            return torch.zeros((count, len(ParameterStats.names)), dtype=torch.float64, device=device)
        rows = torch.cat(
            [results[0][1].new_zeros((1, *results[0][1].shape[1:]), device=device)]
            + [found.to(device, non_blocking=True) for _, found in results]
        )
        places = [0] * count
        for place, index in enumerate((i for indices, _ in results for i in indices), start=1):
            places[index] = place
        key = tuple(places)
        order = self._orders.get(key)
        if order is None or order.device != device:
            order = torch.tensor(places, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
            self._orders = {key: order}  # the last one: which parameters have gradients seldom changes
        return rows[order]
