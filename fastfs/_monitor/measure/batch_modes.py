"""Batch mode: the features of the training batch after the step, by one more forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from fastfs._monitor.measure import trust
from fastfs._monitor.measure.assessment import ProbeSums
from fastfs._monitor.measure.capture_mode import StepInputs, UpdateEvidence
from fastfs._monitor.measure.row_sums import LayerSums, RowSums, Triple, from_replay
from fastfs._monitor.measure.training_mode import ReplaySums, TrainingMode, model_at
from fastfs._network.perturbed import interpolate
from fastfs._stats import FeatureStats

__all__ = ["AmplifiedMode", "BatchMode"]


class BatchMode(TrainingMode):
    """Measures f(w + dw) - f(w): the second forward runs the model as it is after the step."""

    needs_previous = False

    def _replay(self, step: StepInputs) -> ReplaySums:
        if self._subsets and step.model.compiled:
            return self._eager(step, step.parameters)
        return self._run(step.forwards, self._forward, guarded=not self._runs_compiled)

    def _repeat(self, step: StepInputs) -> ReplaySums:
        return self._replay(step)

    def _assess(
        self, step: StepInputs, evidence: UpdateEvidence, sums: LayerSums, eps: Tensor, coarsest: float
    ) -> tuple[trust.AssessedUpdate, LayerSums, Tensor | None]:
        return self._resources.assessor.assess_replay(sums, eps, evidence.depth), sums, None


class AmplifiedMode(BatchMode):
    """Measures f(w + dw) - f(w) and, so that rounding does not hide it, f(w + kappa dw) - f(w - kappa dw)."""

    needs_previous = True
    row_copies = 6  # both sides of the enlarged update, and features before of a second forward

    @staticmethod
    def momentary_bytes(parameters: Sequence[Tensor]) -> int:
        """Returns the bytes of the parameters on both sides of the enlarged update."""
        return 2 * sum(p.numel() * p.element_size() for p in parameters)

    def _assess(
        self, step: StepInputs, evidence: UpdateEvidence, sums: LayerSums, eps: Tensor, coarsest: float
    ) -> tuple[trust.AssessedUpdate, LayerSums, Tensor | None]:
        totals, previous = self._resources.totals, step.previous

        def amplified(kappa: Tensor) -> ProbeSums:
            return ProbeSums(*map(totals, self._amplified(step, previous, kappa)))

        def exact() -> FeatureStats:
            return totals(self._in_float32(step, previous)).stats

        verdict, sums, curvature = self._resources.assessor.assess_amplified(
            sums, eps, evidence.depth, coarsest, evidence.stats, evidence.decrease, amplified, exact
        )
        return self._same_function(verdict, step), sums, curvature

    def _amplified(
        self, step: StepInputs, previous: Sequence[Tensor], kappa: Tensor
    ) -> tuple[list[RowSums], list[RowSums], list[RowSums]]:
        """Returns sums of rows for f(w - kappa dw) and f(w + kappa dw) against f(w), and against each other.

        Features before are recomputed if those of the training step come from a compiled graph, so that all are rounded
        at the same places.
        """
        model = step.model
        below, above = interpolate(previous, step.parameters, -kappa), interpolate(previous, step.parameters, kappa)
        result: tuple[list[RowSums], list[RowSums], list[RowSums]] = ([], [], [])
        for captured in step.forwards:
            base = self._base.get(captured)
            if base is None and model.compiled:
                base = self._run_one(captured, model_at(model, previous)).after
            minus, plus = (
                self._triples(captured, self._run_one(captured, model_at(model, v)).after, base) for v in (below, above)
            )
            central = [
                [Triple(m.after, p.after, p.backward, p.choice) for m, p in zip(*calls, strict=True)]
                for calls in zip(minus, plus, strict=True)
            ]
            for sums, triples in zip(result, (minus, plus, central), strict=True):
                sums.append(from_replay(triples))
        return result

    def _in_float32(self, step: StepInputs, previous: Sequence[Tensor]) -> list[RowSums]:
        """Returns sums of rows whose ``before_sq`` is that of a forward in float32; the other sums have no meaning."""

        def cast(x: Any) -> Any:
            return x.float() if isinstance(x, Tensor) and x.is_floating_point() and x.element_size() < 4 else x

        values = [cast(value) for value in previous]
        result = []
        for captured in step.forwards:
            assert captured.state is not None
            args, kwargs = tree_map(cast, (captured.args, captured.kwargs))
            exact = captured.with_(args, kwargs, captured.state.without_autocast(cast))
            after = self._run_one(exact, model_at(step.model, values), single=True).after
            triples = self._triples(exact, after)
            result.append(from_replay([[Triple(t.after, t.after, t.backward, t.choice) for t in v] for v in triples]))
        return result
