"""JVP mode: the first-order update of the features of the training batch, by one forward in forward mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastfs._monitor.measure import trust
from fastfs._monitor.measure.capture_mode import ModeResources, StepInputs, UpdateEvidence
from fastfs._monitor.measure.loss_change import LossChange
from fastfs._monitor.measure.row_sums import LayerSums, RowSums, Triple, from_direction, from_replay
from fastfs._monitor.measure.training_mode import ReplaySums, TrainingMode, model_at
from fastfs._network.perturbed import load_forward_mode, tangents

__all__ = ["JvpMode"]


class JvpMode(TrainingMode):
    """Measures the derivative of the features along the parameter update, by a forward in forward mode."""

    method = "jvp"
    needs_previous = True

    def __init__(self, resources: ModeResources) -> None:
        super().__init__(resources)
        self._runs_compiled = False
        load_forward_mode()

    @staticmethod
    def momentary_bytes(parameters: Sequence[Tensor]) -> int:
        """Returns the bytes of the direction of the derivative."""
        return sum(p.numel() * p.element_size() for p in parameters)

    def clear(self) -> None:
        """Forgets the step."""
        super().clear()
        self._rest: list[RowSums] = []  # of df - J dw, as if it were the backward vector

    def _replay(self, step: StepInputs) -> ReplaySums:
        previous = step.previous
        directions = [n.detach() - b for b, n in zip(previous, step.parameters, strict=True)]
        result = ReplaySums()
        for captured in step.forwards:
            with step.model.duals(previous, directions) as duals:
                replay = self._run_one(captured, model_at(step.model, duals), see=tangents)
            triples = self._triples(captured, replay.after)
            if self._resources.nonlinear:
                plain = self._run_one(captured, model_at(step.model, step.parameters))
                others = self._triples(captured, plain.after)
                self._rest.append(from_replay(list(map(_with_rest, others, triples))))
                replay = dataclasses.replace(replay, scalars=plain.scalars)
            result.add(from_direction(triples), replay)
            self._cut_off |= replay.cut
        return result

    def _nonlinear(self, eps: Tensor, depth: Tensor) -> Tensor | None:
        if not self._rest:
            return None
        sums = self._resources.totals(self._rest)
        stats, spread = sums.stats, sums.spread
        rest, update = stats.backward_sq, stats.update_sq
        covariances = [spread[:, 5] * rest.square(), spread[:, 4] * rest * update, spread[:, 3] * update.square()]
        noise = 2 * trust.rounding_variance(eps, depth) * stats.before_sq
        return torch.stack([rest, update, *covariances, noise], dim=1)

    def _repeat(self, step: StepInputs) -> ReplaySums:
        return self._eager(step, step.parameters)

    def _loss_change(self, step: StepInputs, result: ReplaySums) -> LossChange | None:
        # The forward in forward mode runs at the parameters before the step.
        return super()._loss_change(step, result) if self._resources.nonlinear else None

    def _assess(
        self, step: StepInputs, evidence: UpdateEvidence, sums: LayerSums, eps: Tensor, coarsest: float
    ) -> tuple[trust.AssessedUpdate, LayerSums, Tensor | None]:
        verdict = self._resources.assessor.assess_tangent(sums, eps, evidence.decrease)
        return self._same_function(verdict, step), sums, None


def _with_rest(visits: Sequence[Triple], directions: Sequence[Triple]) -> list[Triple]:
    """Returns the rows of a layer before and after the step with df - J dw in place of the backward vector."""
    result = []
    for visit, direction in zip(visits, directions, strict=True):
        before, after, change = (
            x.to(torch.float32) if x.element_size() < 4 else x for x in (*visit[:2], direction.after)
        )
        result.append(Triple(before, after, after - before - change, visit.choice))
    return result
