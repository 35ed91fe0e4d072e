"""Which parameters of an optimizer are measured by a closed form and which from a copy, and in which calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastfs._core import checks
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._monitor.capture.fingerprints import Places, Views, real
from fastfs._monitor.measure import closed_forms
from fastfs._monitor.measure.closed_forms import ClosedForm, rewrites_gradients
from fastfs._monitor.measure.gradient_snapshots import GradientSnapshot
from fastfs._monitor.measure.sampled_calls import SampledCall
from fastfs._network.placements import is_distributed, is_partial, own_part, same_placements, spread, summand
from fastfs._stats import ParameterStats

__all__ = ["Call", "Names", "ParameterOrder", "Part", "Plan", "has_closed_form", "make_plan"]

Names = Callable[[Sequence[Tensor]], Iterable[str]]
"""Returns the names of parameters, in their order."""


@dataclass
class Part:
    """Parameters of one group that are measured in the same way.

    Attributes:
        group: Index of the group.
        form: Their closed form; None if they are copied before the step.
        params: The parameters.
    """

    group: int
    form: ClosedForm | None
    params: list[Tensor] = field(default_factory=list)


@dataclass
class Call:
    """The parts that one call of `optimizer_stats` measures: those of one rule and device, with closed forms or not.

    Attributes:
        rule, device: Of all parts.
        parts: The parts.
        indices, params: Their parameters, and the positions of these among all parameters of the optimizer.
        is_complex: Whether a parameter is complex.
        is_spread: Whether a parameter is a DTensor.
        places: Which elements of the parameters verify the update.
        shares_places: Whether those are the places of the gradients, too.
        views: Views of the parameters at their places, and of the states behind them.
        sampled: How a sample of the parameters is read; None for completely.
        knows_sampled: Whether that has been found out.
    """

    rule: OptimizerRule
    device: torch.device
    parts: list[Part] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    is_complex: bool = False
    is_spread: bool = False
    places: Places = field(default_factory=lambda: Places(()))
    shares_places: bool = False
    views: dict[int, Views] = field(default_factory=dict)
    sampled: SampledCall | None = None
    knows_sampled: bool = False

    @property
    def closed(self) -> bool:
        return self.parts[0].form is not None

    @property
    def converted(self) -> bool:
        """Whether the kernel is given views of the tensors, and not the tensors themselves."""
        return self.is_complex or self.is_spread


@dataclass
class Plan:
    """How the parameters that have a gradient are measured, as long as nothing changes.

    Attributes:
        key: Of the `GradientSnapshot` that the plan is for.
        forms: The closed form of each group.
        settled: Whether the optimizer has made its state, so that the next plan would be the same.
        calls: What is measured together.
        copied: Parameters that are copied before the step.
        summed: Indices of parameters whose gradients are sums of which this rank has a summand.
        unreadable: Indices of parameters whose gradients are spread over ranks in another way.
        copies_gradients: Whether the step rewrites 16-bit gradients, which cannot be restored from the result.
        device: Device of the first parameter.
    """

    key: list[object]
    forms: list[ClosedForm | None]
    settled: bool
    calls: list[Call]
    copied: list[Tensor]
    summed: list[int]
    unreadable: list[int]
    copies_gradients: bool
    device: torch.device


def make_plan(
    optimizer: Any,
    gradients: GradientSnapshot,
    forms: list[ClosedForm | None],
    *,
    copy_all: bool,
    names: Names | None = None,
) -> Plan:
    """Returns how the parameters of an optimizer are measured that have these gradients.

    Args:
        optimizer: The optimizer right before its step.
        gradients: The gradients of its parameters.
        forms: The closed forms of its groups.
        copy_all: Whether parameters without a gradient are copied, too.
        names: Names the parameters in messages; None for their numbers.

    Raises:
        ValueError: A parameter has a dtype, or it or its gradient a placement, that cannot be measured.
    """
    calls: dict[tuple[OptimizerRule, torch.device, bool], Call] = {}
    copied: list[Tensor] = []
    summed: list[int] = []
    unreadable: list[int] = []
    settled, copies_gradients, index = True, False, -1
    for number, (group, form) in enumerate(zip(optimizer.param_groups, forms, strict=True)):
        parts: dict[tuple[OptimizerRule, torch.device, bool], Part] = {}
        for p in group["params"]:
            index += 1
            if gradients.tensors[index] is None:
                if copy_all:
                    copied.append(p)
                continue
            _check(optimizer, index, p, names)
            closed = has_closed_form(optimizer, p, form)
            if p.grad is not None and not same_placements(p, p.grad):
                if summand(p, p.grad) is not None:
                    summed.append(index)
                elif own_part(p, p.grad) is None:
                    unreadable.append(index)
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
                copies_gradients = True
            call.indices.append(index)
            call.params.append(p)
            call.is_complex = call.is_complex or p.is_complex()
            call.is_spread = call.is_spread or is_distributed(p)
    present = [i for i, g in enumerate(gradients.tensors) if g is not None]
    for call in calls.values():
        if call.closed:
            call.shares_places = call.indices == present and len(present) == len(gradients.tensors)
            call.places = gradients.places if call.shares_places else Places([real(p) for p in call.params])
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    return Plan(
        gradients.key, forms, settled, list(calls.values()), copied, summed, unreadable, copies_gradients, device
    )


def has_closed_form(optimizer: Any, p: Tensor, form: ClosedForm | None) -> bool:
    """Returns whether the closed form of its group holds for this parameter, with its dtypes and layouts."""
    dtype = p.dtype
    if form is None or dtype.to_real() not in closed_forms.DTYPES:
        return False
    if p.grad is not None and (p.grad.dtype != dtype or p.grad.layout is not torch.strided):
        return False
    if p.grad is not None and not same_placements(p, p.grad):
        return False
    if form.narrowest is not None and torch.finfo(form.narrowest).eps > torch.finfo(dtype).eps:
        return False  # the update has the precision of a hyper-parameter's dtype
    state = optimizer.state.get(p)
    if not state:
        return True  # torch makes it with the parameter's dtype
    for name in form.states:
        entry = state.get(name)
        if entry is not None and (entry.dtype != dtype or not same_placements(entry, p)):
            return False
    return True


def _check(optimizer: Any, index: int, p: Tensor, names: Names | None) -> None:
    if not is_partial(p) and p.dtype.to_real() in checks.DTYPES:
        return
    name = f"parameter {index}"
    if names is not None:
        name = f"parameter {list(names([p for group in optimizer.param_groups for p in group['params']]))[index]!r}"
    if is_partial(p):
        raise ValueError(f"{name} is a partial sum over ranks ({spread(p)}), expected it sharded or replicated")
    raise ValueError(f"{name} has dtype {p.dtype}, expected one of {', '.join(map(str, checks.DTYPES))}")


class ParameterOrder:
    """Puts the results of several calls into the order of the parameters."""

    def __init__(self) -> None:
        self._orders: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, results: Sequence[tuple[list[int], Tensor]], count: int, device: torch.device) -> Tensor:
        """Returns one row for each of `count` parameters, on the device; zeros for those without a result.

        Args:
            results: Indices of parameters, with a row for each.
            count: Number of parameters.
            device: Of the result.
        """
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
