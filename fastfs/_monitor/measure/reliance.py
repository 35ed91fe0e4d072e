"""Cheap checks on the host: whether a step has gone as those that were verified, so that it needs no verification.

An optimizer writes to its parameters and its state the same number of times in every step. Where versions have moved by
exactly as much as in the last step that was verified, where tensors, addresses and hyper-parameters are the same before
and after the step, and every counter has gone on by one, the update is the one that the closed form tells. Only what
is written through ``.data``, in the step itself, is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfs._monitor.capture import fingerprints
from fastfs._monitor.measure import decrease_reasons
from fastfs._monitor.measure.closed_forms import Settings
from fastfs._monitor.measure.gradient_snapshots import GradientSnapshot, same
from fastfs._monitor.measure.kernel_arguments import States, states_of
from fastfs._monitor.measure.update_plans import Plan

__all__ = ["Reliance", "StepSeen"]

_SCHEDULED = ("lr", "momentum", "betas", "weight_decay", "initial_lr", "max_lr", "min_lr", "max_momentum")


@dataclass
class StepSeen:
    """What was there before a step.

    Attributes:
        states: of the parts of the closed calls, in order; None where some are missing.
        tensors: parameters of these parts and what is in the states.
        versions: of these.
        pointers: of the parameters.
    """

    states: list[States | None]
    tensors: list[Tensor]
    versions: list[int]
    pointers: list[int]


class Reliance:
    """Compares steps of one optimizer with the last one that was verified."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._moves: list[int] = []  # of versions, in the last step
        self._counts: list[float | None] = []  # step counters after it, by part
        self._settings: list[Settings] = []

    def changed(self, plan: Plan, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether something else has changed since the last step than what schedules change."""
        if plan is not self._plan or len(groups) != len(self._settings):
            return True
        return not all(s.hold(g, but=_SCHEDULED) for s, g in zip(self._settings, groups, strict=True))

    @staticmethod
    def before(optimizer: Any, plan: Plan) -> StepSeen | None:
        """None if the state is not there yet."""
        if not plan.settled:
            return None
        states = [states_of(optimizer, part) for call in plan.calls if call.closed for part in call.parts]
        tensors = [p for call in plan.calls if call.closed for p in call.params]
        pointers = [p.data_ptr() for p in tensors]
        for state in states:
            if state is not None:
                tensors += state.tensors
        return StepSeen(states, tensors, [t._version for t in tensors], pointers)

    def after(
        self, optimizer: Any, plan: Plan, look: GradientSnapshot, settings: list[Settings], seen: StepSeen | None
    ) -> tuple[list[int] | None, list[States | None], list[float | None]]:
        """What speaks against the step.

        Returns:
            Codes of :mod:`fastfs._monitor.measure.decrease_reasons` by parameter, None if nothing does; the states now,
            by part
            of the closed calls; and by part the step counter that all of its parameters have, where that is known.
        """
        closed = [part for call in plan.calls if call.closed for part in call.parts]
        now = [states_of(optimizer, part) for part in closed]
        groups = optimizer.param_groups
        last, self._plan, self._settings = self._plan, plan, settings
        unknown: list[float | None] = [None] * len(closed)
        if last is not plan:  # other parameters, whose counters may differ
            self._moves, self._counts = [], unknown
        if seen is None or None in now or None in seen.states:
            self._moves, self._counts = [], unknown
            return [decrease_reasons.NOT_THE_UPDATE] * len(look.gradients), now, unknown
        tensors = [p for call in plan.calls if call.closed for p in call.params]
        pointers = [p.data_ptr() for p in tensors]
        for state in now:
            assert state is not None
            tensors += state.tensors
        moves = [t._version - version for t, version in zip(tensors, seen.versions, strict=False)]
        before = self._counts if last is plan and self._counts else unknown  # of another plan they are of other parts
        counts = [_count(state, count) for state, count in zip(now, before, strict=True)]
        known = (
            last is plan
            and moves == self._moves
            and len(tensors) == len(seen.tensors)
            and all(map(same, tensors, seen.tensors))
            and pointers == seen.pointers
            and all(map(_went_on, now, counts, before))
        )
        codes = [decrease_reasons.FINE] * len(look.gradients)
        if not known:
            for index in (index for call in plan.calls if call.closed for index in call.indices):
                codes[index] = decrease_reasons.NOT_THE_UPDATE
        for call in plan.calls:
            indices = iter(call.indices)
            for part in call.parts:
                mine = [next(indices) for _ in part.params]
                if call.closed and not settings[part.group].hold(groups[part.group]):
                    for index in mine:
                        codes[index] = codes[index] or decrease_reasons.SETTINGS
        for index in look.written():
            codes[index] = codes[index] or decrease_reasons.REWRITTEN
        self._moves, self._counts = moves, counts
        return (codes if any(codes) else None), now, (counts if known else unknown)


def _count(state: States | None, before: float | None) -> float | None:
    """The step counter that all have, if that is known without waiting for a device."""
    assert state is not None
    if not _readable(state):
        return None
    first = float(fingerprints.on_host(state.steps[0]))
    if before is not None and first == before + 1:  # every counter has moved as often as the first one, or is refused
        return first
    alike = torch.equal(torch.stack(state.steps), state.steps[0].expand(len(state.steps)))
    return first if alike else None


def _went_on(state: States | None, now: float | None, before: float | None) -> bool:
    """By one; of counters on a device the versions tell as much."""
    assert state is not None
    return not _readable(state) or (now is not None and before is not None and now == before + 1)


def _readable(state: States) -> bool:
    return bool(state.steps) and not isinstance(fingerprints.on_host(state.steps[0]), Tensor)
