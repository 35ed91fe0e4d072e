"""One measured step from hooks to payload: calls the parts of the measurement in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastfs._monitor import payload
from fastfs._monitor.capture.capture import Capture
from fastfs._monitor.capture.fingerprints import Fingerprint
from fastfs._monitor.capture.forward_capture import ForwardCapture
from fastfs._monitor.measure import trust
from fastfs._monitor.measure.aligned_decrease import Aligned, LossScale, aligned
from fastfs._monitor.measure.assessment import UpdateAssessor
from fastfs._monitor.measure.capture_mode import CaptureMode, StepInputs, UpdateEvidence
from fastfs._monitor.measure.casts import CastSamples
from fastfs._monitor.measure.gradient_treatment import GradientFactor
from fastfs._monitor.measure.layer_norms import LayerNorms
from fastfs._monitor.measure.learned_structure import LearnedStructure, StepKey, StepStructure
from fastfs._monitor.measure.measured_update import MeasuredUpdate
from fastfs._monitor.measure.observation import changed_choices, reported, unscaled
from fastfs._monitor.measure.parameters import Parameters
from fastfs._monitor.measure.replay_checks import ReplayChecks
from fastfs._monitor.payload import StepCodec
from fastfs._monitor.ranks import Ranks
from fastfs._network.guard import CollectiveError, WriteError
from fastfs._network.layers import Layer, parameter_names
from fastfs._network.perturbed import Perturbed
from fastfs._record import decrease_reasons, row_reasons
from fastfs._record.ranks.part import RankPart
from fastfs._record.ranks.run_store import RankError

__all__ = ["Engine"]

T = TypeVar("T")
Push = Callable[[Tensor, Callable[[Tensor], list[RankPart]]], None]


@dataclass
class Engine:
    """Measures one training step.

    Attributes:
        model: The module that the training loop calls.
        layers: The watched layers.
        mode: How the features are seen.
        ranks: Where this process stands among those of the run.
        assessor: Decides how far to trust the sums.
        capture: Hooks of the training step.
        parameters: What the optimizers do to the parameters.
        factor: What happens to gradients between backward and step.
        scale: The loss scale.
        casts: Samples of the parameters, to see what casts take of a step.
        device: Device of the sums.
        push: Takes the vector of a step and the function that decodes its host copy.
        put: Takes a part that is on the host.
    """

    model: nn.Module
    layers: Sequence[Layer]
    mode: CaptureMode
    ranks: Ranks
    assessor: UpdateAssessor
    capture: Capture
    parameters: Parameters
    factor: GradientFactor
    scale: LossScale
    casts: CastSamples
    device: torch.device
    push: Push
    put: Callable[[RankPart], None]

    def __post_init__(self) -> None:
        self.learned = LearnedStructure(self.model, len(self.layers), self.device)
        self._perturbed: Perturbed
        self._note_parameters()
        self.replay_checks = ReplayChecks(len(self.layers), self.device)
        self._norms = LayerNorms(self.device)
        self._loss_scale: Tensor | None = None  # of the current step
        self._found_inf: Tensor | None = None
        self._written: Tensor | None = None  # whether a parameter was written to since the forward, bool ()
        self._agreed: StepInputs | None = None  # of second forwards that all ranks are about to run
        self._unrefused = False  # the mode will run second forwards after this step
        self._idle = set(range(len(self.layers)))  # layers that have run in no measured step

    # Around the optimizers

    def before(self, optimizer: torch.optim.Optimizer, index: int, step: int, *, first: bool, measured: bool) -> None:
        """Called right before an optimizer steps; ``first`` in this training step."""
        if first:
            if self._note_parameters():
                self.factor.watch()
                self.replay_checks.clear()
            self._loss_scale = self.scale.take(self.device)
            if measured:
                self._before_measuring(step)
        self.parameters.before(index, measured, self.factor)

    def after(self, optimizer: torch.optim.Optimizer, index: int, *, measured: bool) -> None:
        """Called right after an optimizer has stepped."""
        self.parameters.after(index, measured)
        found: Tensor | None = getattr(optimizer, "found_inf", None)
        if found is not None:
            self._found_inf = found.detach().to(self.device, torch.float64).reshape(()).clone()

    def _note_parameters(self) -> bool:
        """Returns whether the trained parameters have changed since the last step."""
        parameters = self.parameters.tensors
        change = self.learned.note_parameters(parameters)
        if change == "tensors":
            self._perturbed = Perturbed(self.model, parameters)
            names = parameter_names(self.model, parameters)
            self.capture.set_parameters(names)
            self.ranks.note_parameters(names)
        return change != "none"

    def _before_measuring(self, step: int) -> None:
        mode, parameters, forwards = self.mode, self.parameters.tensors, self.capture.waiting
        self.casts.take(parameters)
        if mode.captures_training:
            if not forwards:
                self.ranks.meet(step, "", "no forward and backward of the model was seen before the step")
                return
            self._written = self._written_since(forwards, parameters)
        inputs = StepInputs(forwards, self._perturbed, parameters, self._previous)
        self._run(lambda: mode.prepare(inputs))
        refused = mode.refusal(forwards)
        graphs = None if refused is not None else mode.graphs(forwards)
        due = refused is None and (mode.checks_every_step or self.replay_checks.due(graphs))
        self.ranks.meet(step, f"{len(forwards)} forwards{', which are checked' * due}{f' ({refused})' * bool(refused)}")
        self._unrefused = refused is None
        self._agree(inputs, due)
        if due:
            self.replay_checks.record(graphs, self._run(lambda: mode.check(inputs)))

    def _run(self, forwards: Callable[[], T]) -> T:
        """Runs forwards of the monitor's own, which may communicate only if the ranks have agreed to run them."""
        self.capture.replayer.collectives = self.ranks.alone or self.ranks.together
        self.capture.replayer.together = self.ranks.together
        try:
            return forwards()
        except CollectiveError as error:
            self.ranks.together = True
            raise RankError(f"{error}: from the next measured step on, all ranks measure together") from error

    def accompany(self) -> None:
        """Runs the second forwards that the other ranks run, if this rank has failed before it began with them.

        Their results are not used.
        """
        agreed, self._agreed = self._agreed, None
        if agreed is not None and not self.capture.replayer.begun:
            self._run(lambda: self.mode.accompany(agreed))

    def _agree(self, inputs: StepInputs, due: bool) -> None:
        """Notes whether all ranks have agreed to run second forwards now."""
        self._agreed = inputs if due and self.ranks.together else None
        self.capture.replayer.begun = False

    def _written_since(self, forwards: Sequence[ForwardCapture], parameters: Sequence[Tensor]) -> Tensor | None:
        """Returns whether a parameter was written to since one of the forwards began: bool (), None if unknown."""
        now = Fingerprint(parameters, forwards[-1].fingerprint)
        prints = [p.fingerprint for p in forwards if p.fingerprint is not None]
        if not prints:
            return None
        written = torch.stack([now.differs(each).to(self.device) for each in prints]).any()
        if any(now.changed_objects(each) for each in prints):
            written = torch.ones_like(written)
        return written

    def _previous(self) -> list[Tensor]:
        return self.parameters.previous

    # Between steps

    @property
    def idle(self) -> list[Layer]:
        """Layers that have run in no measured step so far."""
        return [layer for layer in self.layers if layer.index in self._idle]

    def renew(self) -> None:
        """Discards what is cached from step to step."""
        self.parameters.renew()
        self.factor.renew()

    def clear(self) -> None:
        """Forgets the step that is over."""
        self.parameters.clear()
        self.factor.clear()
        self._loss_scale = self._found_inf = self._written = self._agreed = None
        self.mode.clear()
        self.casts.forget()

    def close(self) -> None:
        """Forgets the step and removes the hooks on parameters."""
        self.clear()
        self.factor.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next measurement takes from the last one."""
        kappa = None if self.assessor.kappa is None else self.assessor.kappa.cpu()
        return {
            "layers": [layer.name for layer in self.layers],
            "kappa": kappa,
            "learned_structure": self.learned.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state."""
        self.assessor.kappa = None if state["kappa"] is None else state["kappa"].to(self.device)
        self.learned.load_state_dict(state["learned_structure"])

    # After the optimizers

    def measure(self, step: int, loss: Tensor | None, started: float) -> bool:
        """Measures the step and pushes its payload.

        Args:
            step: Number of the step.
            loss: The logged loss; None if there is none.
            started: When the measurement of the step began, as ``time.perf_counter()`` counts.

        Returns:
            False if there was nothing to measure.

        Raises:
            WriteError: A second forward would change what training owns.
        """
        mode = self.mode
        forwards: list[ForwardCapture] = []
        if mode.captures_training:
            forwards = self.capture.collect()
            if not forwards:
                self.ranks.meet_again("its forwards are gone")
                return False
            if any(p.writes_parameters for p in forwards):
                raise WriteError("a parameter has another version after it", inputs=False)
        self.ranks.meet_again()
        inputs = StepInputs(forwards, self._perturbed, self.parameters.tensors, self._previous)
        self._agree(inputs, self._unrefused)
        update = self.parameters.take(self.device)
        moved = (update.reason == decrease_reasons.MOVED).any()
        if forwards:
            ran = [any(p.calls[i] for p in forwards) for i in range(len(self.layers))]
        else:
            ran = [count > 0 for count, _ in self.capture.backward_norms()]
        key = self.capture.step_key(ran)
        structure, cuts_to_record = self.learned.learn(mode.structure(inputs, self.learned), key)
        assert self._loss_scale is not None
        reference = mode.reference(inputs, update, loss, self._loss_scale)
        scale = reference.scale
        done = self._aligned(reference.update, structure, scale)
        depth = self.assessor.depth(None if structure is None else structure.structure, len(self.layers))
        decrease = torch.full_like(depth, torch.nan)
        if structure is not None and self.ranks.alone:  # of several, <b, df> is that of their sums only
            decrease = torch.where(structure.cuts, done.decrease * scale, torch.nan)
        evidence = UpdateEvidence(update.stats, decrease, depth)
        observed = self._run(lambda: mode.observe(inputs, evidence))
        graphs = mode.graphs(forwards)
        verdict = self.replay_checks.refuse_unrepeated(graphs, observed.verdict, observed.eps, depth, mode.unrepeated)
        self.replay_checks.count_step(graphs)
        self._idle -= {i for i, code in enumerate(observed.absent) if code != row_reasons.NOT_RUN}
        verdict = trust.refuse(verdict, row_reasons.MOVED, moved.expand_as(verdict.valid))
        verdict = self._refused(verdict, forwards, observed.absent)
        sums = observed.sums
        fields = {
            "sums": unscaled(reported(verdict, sums.stats), scale),
            "spread": sums.spread,
            "reason": verdict.reason,
            "amplified": verdict.amplified,
            "quantiles": sums.quantiles,
            **payload.aligned_fields(done),
            "loss_scale": scale,
            # An ordinary unscale gives 1.
            "gradient_factor": self.parameters.take_factor(self.device) * self._loss_scale,
        }
        facts = self._facts(key, structure) | {
            "rows": [list(pair) for pair in sums.rows],
            "margin": sums.margin,
            "method": mode.method,
        }
        if self.ranks.link is not None or observed.loss is not None:
            fields["total"] = done.total
        if self.casts.names:
            incidence = None if structure is None else structure.incidence
            kinds = self.ranks.kinds(self.device)
            fields["casts"] = self.casts.sums(inputs.parameters, incidence, kinds, done.dots)
            facts["casts"] = self.casts.names
        if observed.loss is not None:
            fields |= observed.loss.fields(loss, scale, sums.stats, observed.eps)
        if verdict.odd is not None and not self.ranks.alone:  # for the residual of the run
            fields["odd"] = verdict.odd / torch.stack([scale, torch.ones_like(scale), torch.ones_like(scale)])[:, None]
            fields["eps"] = observed.eps
        if observed.nonlinear is not None:
            fields["nonlinear"] = observed.nonlinear
        if observed.curvature is not None:
            fields["curvature"] = observed.curvature
        if len(self.ranks.place.peers) > 1:
            fields["inputs"] = mode.input_sums(forwards)
            facts["placed"] = mode.placed(forwards)
        if self.assessor.kappa is not None:
            fields["kappa"] = self.assessor.kappa
        if observed.details is not None:
            fields |= observed.details.fields
            facts["details"] = observed.details.facts
        if self.capture.dropped:
            facts["cut"] = None
        if cuts_to_record is not None:
            facts["structure"] = payload.structure_facts(cuts_to_record)
        codec = StepCodec("measured", step, self.ranks.refresh(), facts)
        codec.scalars["micro_batches"] = max(len(forwards), 1)
        if any(observed.checked_choices):
            fields["choices_changed"], codec.scalars["choices"] = changed_choices(
                observed.checked_choices, observed.choices, self.device
            )
        self._push(codec, fields, reference.loss, started)
        return True

    def predict(self, step: int, loss: Tensor | None, started: float) -> None:
        """Computes the aligned decrease of the step. The record predicts the features' speed from it.

        Args:
            step: Number of the step.
            loss: The logged loss; None if there is none.
            started: When the measurement of the step began, as ``time.perf_counter()`` counts.
        """
        update = self.parameters.take(self.device)
        scale = self._loss_scale
        assert scale is not None
        found = self.capture.backward_norms()
        key = self.capture.step_key([count > 0 for count, _ in found])
        structure = self.learned.find(key)
        done = self._aligned(update, structure, scale)
        backward = self._norms.norms([parts for _, parts in found])
        if self.scale.given:
            backward = backward / scale
        fields = {**payload.aligned_fields(done), "backward_norm": backward, "loss_scale": scale}
        if self.ranks.link is not None:
            fields["total"] = done.total
        if self.capture.rewritten:
            fields["accumulated"] = self._accumulated()
        facts = self._facts(key, structure) | {"counts": [count for count, _ in found]}
        self._push(StepCodec("predicted", step, self.ranks.refresh(), facts), fields, loss, started)

    def skipped(self, step: int, reason: str, *, before: bool = False) -> None:
        """Records that gradients led to no measured step; ``before`` if the step itself is still to come."""
        self.put(payload.skipped_part(step, time.time(), reason, self.ranks.place, before=before))

    @staticmethod
    def _facts(key: StepKey, structure: StepStructure | None) -> dict[str, Any]:
        """Returns what the record has to know of a step with this key."""
        touched, ran = key
        return {"touched": list(touched), "ran": list(ran), "cut": None if structure is None else structure.cut}

    def _push(self, codec: StepCodec, fields: dict[str, Tensor], loss: Tensor | None, started: float) -> None:
        if loss is not None:
            fields["loss"] = loss.to(self.device, torch.float64)
        if self._found_inf is not None:
            fields["found_inf"] = self._found_inf
        vector = codec.encode(fields)
        codec.scalars["overhead_seconds"] = self.capture.seconds + time.perf_counter() - started
        self.push(vector, codec.decode)

    def _aligned(self, update: MeasuredUpdate, structure: StepStructure | None, scale: Tensor) -> Aligned:
        self.ranks.note_summed(self.parameters.summed)
        if structure is None:
            return Aligned.unknown(len(self.layers), self.device, len(self.ranks.place.shares))
        factor = scale if self.scale.given else None
        return aligned(update, structure.incidence, factor, self.ranks.kinds(self.device))

    def _accumulated(self) -> Tensor:
        """Returns whether only backwards and zeroing wrote to gradients before the last backward: bool ()."""
        if not self.capture.rewritten:
            return torch.ones((), dtype=torch.bool, device=self.device)
        return ~torch.stack([flag.to(self.device, non_blocking=True) for flag in self.capture.rewritten]).any()

    def _refused(
        self, verdict: trust.AssessedUpdate, forwards: Sequence[ForwardCapture], absent: Sequence[int]
    ) -> trust.AssessedUpdate:
        """Refuses all rows of the step, or single ones, for what else has happened in it."""
        everywhere = torch.ones_like(verdict.valid)
        if self.capture.dropped:
            verdict = trust.refuse(verdict, row_reasons.LEFT_OUT, everywhere)
        if self._written is not None:
            verdict = trust.refuse(verdict, row_reasons.WRITTEN, everywhere & self._written)
        if self.capture.rewritten:
            verdict = trust.refuse(verdict, row_reasons.REWRITTEN, everywhere & ~self._accumulated())
        code = self.mode.refusal(forwards)
        if code is not None:
            verdict = trust.refuse(verdict, code, everywhere)
        if any(absent):
            codes = torch.tensor(absent, dtype=torch.int64).to(self.device, non_blocking=True)
            verdict = trust.refuse_codes(verdict, codes)
        return verdict
