"""JVP mode: the first-order update of the features of the training batch, by one forward in forward mode."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastfs._monitor.measure import trust
from fastfs._monitor.measure.capture_mode import ModeResources, StepInputs, UpdateEvidence
from fastfs._monitor.measure.loss_change import LossChange
from fastfs._monitor.measure.row_sums import LayerSums, from_direction
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

    def _replay(self, step: StepInputs) -> ReplaySums:
        previous = step.previous
        directions = [n.detach() - b for b, n in zip(previous, step.parameters, strict=True)]
        result = ReplaySums()
        for captured in step.forwards:
            with step.model.duals(previous, directions) as duals:
                replay = self._run_one(captured, model_at(step.model, duals), see=tangents)
            result.add(from_direction(self._triples(captured, replay.after)), replay)
            self._cut_off |= replay.cut
        return result

    def _repeat(self, step: StepInputs) -> ReplaySums:
        return self._eager(step, step.parameters)

    def _loss_change(self, step: StepInputs, result: ReplaySums) -> LossChange | None:
        return None  # the forward runs at the parameters before the step

    def _assess(
        self, step: StepInputs, evidence: UpdateEvidence, sums: LayerSums, eps: Tensor, coarsest: float
    ) -> tuple[trust.AssessedUpdate, LayerSums, Tensor | None]:
        verdict = self._resources.assessor.assess_tangent(sums, eps, evidence.decrease)
        return self._same_function(verdict, step), sums, None
