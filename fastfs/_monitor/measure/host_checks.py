"""Checks on the host that replace the verification of an update: did this step go like the last verified one?

An optimizer writes to its parameters and its state equally often in every step. If versions have moved by as much as in
the last verified step, if tensors, addresses and hyper-parameters are the same before and after the step, and if every
step counter has moved by one, then the update is that of the closed form. Writes through `.data` within the step are
not detected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfs._monitor.capture import fingerprints
from fastfs._monitor.measure.gradient_snapshots import GradientSnapshot, same
from fastfs._monitor.measure.hyper_parameters import HyperParameters
from fastfs._monitor.measure.kernel_arguments import PartState, state_of
from fastfs._monitor.measure.update_plans import Plan
from fastfs._network.placements import local, version
from fastfs._record import decrease_reasons

__all__ = ["HostChecks", "StateBefore"]

_SCHEDULED = ("lr", "momentum", "betas", "weight_decay", "initial_lr", "max_lr", "min_lr", "max_momentum")


@dataclass
class StateBefore:
    """Parameters and optimizer state before a step.

    Attributes:
        states: State of the parts of the closed calls, in order; None where some is missing.
        tensors: Parameters of these parts, and the tensors of the states.
        versions: Versions of these tensors.
        pointers: Addresses of the parameters.
    """

    states: list[PartState | None]
    tensors: list[Tensor]
    versions: list[int]
    pointers: list[int]


class HostChecks:
    """Compares the steps of one optimizer with the last one that was verified."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._moves: list[int] = []  # of versions, in the last step
        self._counts: list[float | None] = []  # step counters after it, by part
        self._hyper_parameters: list[HyperParameters] = []

    def changed(self, plan: Plan, groups: Sequence[dict[str, Any]]) -> bool:
        """Returns whether anything has changed since the last step besides hyper-parameters that are scheduled."""
        if plan is not self._plan or len(groups) != len(self._hyper_parameters):
            return True
        pairs = zip(self._hyper_parameters, groups, strict=True)
        return not all(last.unchanged(group, ignore=_SCHEDULED) for last, group in pairs)

    @staticmethod
    def before(optimizer: Any, plan: Plan) -> StateBefore | None:
        """Returns parameters and state before a step; None if the optimizer has not made its state yet."""
        if not plan.settled:
            return None
        states = [state_of(optimizer, part) for call in plan.calls if call.closed for part in call.parts]
        tensors = [p for call in plan.calls if call.closed for p in call.params]
        pointers = [local(p).data_ptr() for p in tensors]
        for state in states:
            if state is not None:
                tensors += state.tensors
        return StateBefore(states, tensors, list(map(version, tensors)), pointers)

    def after(
        self,
        optimizer: Any,
        plan: Plan,
        gradients: GradientSnapshot,
        used: list[HyperParameters],
        before: StateBefore | None,
    ) -> tuple[list[int] | None, list[PartState | None], list[float | None]]:
        """Checks a step that is over.

        Args:
            optimizer: The optimizer.
            plan: Of the step.
            gradients: Gradients that the step was given.
            used: Hyper-parameters of all groups before the step.
            before: What :meth:`before` has returned.

        Returns:
            A code of :mod:`fastfs._record.decrease_reasons` for every parameter, None if all checks pass; the
            states now, by part of the closed calls; and by part the step counter of all its parameters, if known.
        """
        closed = [part for call in plan.calls if call.closed for part in call.parts]
        now = [state_of(optimizer, part) for part in closed]
        groups = optimizer.param_groups
        last, self._plan, self._hyper_parameters = self._plan, plan, used
        unknown: list[float | None] = [None] * len(closed)
        if last is not plan:  # other parameters, whose counters may differ
            self._moves, self._counts = [], unknown
        if before is None or None in now or None in before.states:
            self._moves, self._counts = [], unknown
            return [decrease_reasons.NOT_THE_UPDATE] * len(gradients.tensors), now, unknown
        tensors = [p for call in plan.calls if call.closed for p in call.params]
        pointers = [local(p).data_ptr() for p in tensors]
        for state in now:
            assert state is not None
            tensors += state.tensors
        moves = [version(t) - start for t, start in zip(tensors, before.versions, strict=False)]
        earlier = self._counts if last is plan and self._counts else unknown  # those of another plan are of other parts
        counts = [_common_count(state, count) for state, count in zip(now, earlier, strict=True)]
        passed = (
            last is plan
            and moves == self._moves
            and len(tensors) == len(before.tensors)
            and all(map(same, tensors, before.tensors))
            and pointers == before.pointers
            and all(map(_moved_by_one, now, counts, earlier))
        )
        codes = [decrease_reasons.FINE] * len(gradients.tensors)
        if not passed:
            for index in (index for call in plan.calls if call.closed for index in call.indices):
                codes[index] = decrease_reasons.NOT_THE_UPDATE
        for call in plan.calls:
            indices = iter(call.indices)
            for part in call.parts:
                own = [next(indices) for _ in part.params]
                if call.closed and not used[part.group].unchanged(groups[part.group]):
                    for index in own:
                        codes[index] = codes[index] or decrease_reasons.SETTINGS
        for index in gradients.written():
            codes[index] = codes[index] or decrease_reasons.REWRITTEN
        self._moves, self._counts = moves, counts
        return (codes if any(codes) else None), now, (counts if passed else unknown)


def _common_count(state: PartState | None, before: float | None) -> float | None:
    """The step counter that all parameters have, if that is known without waiting for a device."""
    assert state is not None
    if not _readable(state):
        return None
    first = float(fingerprints.on_host(state.counters[0]))
    if before is not None and first == before + 1:  # if another counter has not moved by one, its version differs
        return first
    alike = torch.equal(torch.stack(state.counters), state.counters[0].expand(len(state.counters)))
    return first if alike else None


def _moved_by_one(state: PartState | None, now: float | None, before: float | None) -> bool:
    """Whether the counters have; of those on a device the versions tell as much."""
    assert state is not None
    return not _readable(state) or (now is not None and before is not None and now == before + 1)


def _readable(state: PartState) -> bool:
    return bool(state.counters) and not isinstance(fingerprints.on_host(state.counters[0]), Tensor)
