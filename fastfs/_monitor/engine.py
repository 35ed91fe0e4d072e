"""One measured step from hooks to payload: calls the parts of the measurement in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._monitor import payload, row_reasons
from fastfs._monitor.capture.capture import Capture
from fastfs._monitor.capture.fingerprints import Fingerprint
from fastfs._monitor.capture.forward_capture import ForwardCapture
from fastfs._monitor.measure import decrease_reasons, trust
from fastfs._monitor.measure.aligned_decrease import Aligned, LossScale, aligned
from fastfs._monitor.measure.assessment import UpdateAssessor
from fastfs._monitor.measure.capture_mode import CaptureMode, StepInputs, UpdateEvidence
from fastfs._monitor.measure.gradient_treatment import GradientFactor
from fastfs._monitor.measure.layer_norms import LayerNorms
from fastfs._monitor.measure.learned_structure import LearnedStructure, StepStructure
from fastfs._monitor.measure.measured_update import MeasuredUpdate
from fastfs._monitor.measure.observation import changed_choices, is_linear, reported, unscaled
from fastfs._monitor.measure.parameters import Parameters
from fastfs._monitor.measure.replay_checks import ReplayChecks
from fastfs._monitor.payload import ColumnLayout, MeasuredCodec, PredictedCodec, StepCodec
from fastfs._network.guard import WriteError
from fastfs._network.layers import Layer, parameter_names
from fastfs._network.perturbed import Perturbed
from fastfs._record.record import Record
from fastfs._stats import FeatureStats
from fastfs.formula import _relations

__all__ = ["Engine"]

_CERTAIN = 2.0  # standard errors that a sampled decrease has to be above zero for a prediction

Push = Callable[[Tensor, Callable[[Tensor], list[Record]]], None]


@dataclass
class Engine:
    """Measures one training step.

    Attributes:
        model: The module that the training loop calls.
        layers: The watched layers.
        layout: Entries of the record's columns.
        mode: How the features are seen.
        quantiles: Quantiles of the rows that are recorded.
        assessor: Decides how far to trust the sums.
        capture: Hooks of the training step.
        parameters: What the optimizers do to the parameters.
        factor: What happens to gradients between backward and step.
        scale: The loss scale.
        device: Device of the sums.
        push: Takes the vector of a step and the function that decodes its host copy.
        put: Takes a record that is on the host.
    """

    model: nn.Module
    layers: Sequence[Layer]
    layout: ColumnLayout
    mode: CaptureMode
    quantiles: Sequence[float]
    assessor: UpdateAssessor
    capture: Capture
    parameters: Parameters
    factor: GradientFactor
    scale: LossScale
    device: torch.device
    push: Push
    put: Callable[[Record], None]

    def __post_init__(self) -> None:
        self.learned = LearnedStructure(self.model, len(self.layers), self.device)
        self._perturbed: Perturbed
        self._note_parameters()
        self.replay_checks = ReplayChecks(len(self.layers), self.device)
        self._norms = LayerNorms(self.device)
        self._loss_scale: Tensor | None = None  # of the current step
        self._found_inf: Tensor | None = None
        self._written: Tensor | None = None  # whether a parameter was written to since the forward, bool ()
        self._idle = set(range(len(self.layers)))  # layers that have run in no measured step

    # Around the optimizers

    def before(self, optimizer: torch.optim.Optimizer, index: int, *, first: bool, measured: bool) -> None:
        """Called right before an optimizer steps; ``first`` in this training step."""
        if first:
            if self._note_parameters():
                self.factor.watch()
                self.replay_checks.clear()
            self._loss_scale = self.scale.take(self.device)
            if measured:
                self._before_measuring()
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
            self.capture.set_parameters(parameter_names(self.model, parameters))
        return change != "none"

    def _before_measuring(self) -> None:
        mode, parameters, forwards = self.mode, self.parameters.tensors, self.capture.waiting
        if mode.captures_training:
            if not forwards:
                return
            self._written = self._written_since(forwards, parameters)
        step = StepInputs(forwards, self._perturbed, parameters, self._previous)
        mode.prepare(step)
        if mode.refusal(forwards) is not None:
            return
        graphs = mode.graphs(forwards)
        if mode.checks_every_step or self.replay_checks.due(graphs):
            self.replay_checks.record(graphs, mode.check(step))

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
        self._loss_scale = self._found_inf = self._written = None
        self.mode.clear()

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
                return False
            if any(p.writes_parameters for p in forwards):
                raise WriteError("a parameter has another version after it", inputs=False)
        update = self.parameters.take(self.device)
        moved = (update.reason == decrease_reasons.MOVED).any()
        if forwards:
            ran = [any(p.calls[i] for p in forwards) for i in range(len(self.layers))]
        else:
            ran = [count > 0 for count, _ in self.capture.backward_norms()]
        key = self.capture.step_key(ran)
        inputs = StepInputs(forwards, self._perturbed, self.parameters.tensors, self._previous)
        structure, cuts_to_record = self.learned.learn(mode.structure(inputs, self.learned), key)
        if cuts_to_record is not None:
            self.put(payload.structure_record(step, self.layout, cuts_to_record))
        assert self._loss_scale is not None
        reference = mode.reference(inputs, update, loss, self._loss_scale)
        scale = reference.scale
        done = self._aligned(reference.update, structure, scale)
        if structure is None:
            cuts = torch.zeros(len(self.layers), dtype=torch.bool, device=self.device)
        else:
            cuts = structure.cuts
        depth = self.assessor.depth(None if structure is None else structure.structure, len(self.layers))
        decrease = torch.where(cuts, done.decrease * scale, torch.nan)
        observed = mode.observe(inputs, UpdateEvidence(update.stats, decrease, depth))
        graphs = mode.graphs(forwards)
        verdict = self.replay_checks.refuse_unrepeated(graphs, observed.verdict, observed.eps, depth, mode.unrepeated)
        self.replay_checks.count_step(graphs)
        self._idle -= {i for i, code in enumerate(observed.absent) if code != row_reasons.NOT_RUN}
        verdict = trust.refuse(verdict, row_reasons.MOVED, moved.expand_as(verdict.valid))
        verdict, cuts = self._refused(verdict, cuts, forwards, observed.absent)
        sums = FeatureStats(unscaled(reported(verdict, observed.sums.stats), scale))
        residual = torch.where(cuts, _relations.residual(done.decrease, sums.update_dot_backward), torch.nan)
        part = (1.0 - residual).abs()
        linear = is_linear(residual, observed.sums.dot_margin * part, observed.curvature)
        self.learned.keep_cosines(key, sums.cos_angle, verdict.valid & cuts & (linear == 1))
        fields = {
            "sums": self.layout.with_groups(sums.sums),
            "reason": self.layout.worst(verdict.reason),
            "amplified": self.layout.worst(verdict.amplified.long()),
            "angle_se": observed.sums.angle_se,
            "update_se": observed.sums.update_se,
            "residual_se": observed.sums.dot_se * part,
            "quantiles": observed.sums.quantiles,
            "residual": residual,
            "linear": linear,
            **payload.aligned_fields(done),
            "loss_scale": scale,
        }
        if self.assessor.kappa is not None:
            fields["kappa"] = self.assessor.kappa
        codec = MeasuredCodec(step, self.layout, observed.sums.rows, self.quantiles, mode.method)
        codec.scalars["micro_batches"] = max(len(forwards), 1)
        if any(observed.checked_choices):
            fields["choices_changed"], codec.scalars["choices"] = changed_choices(
                observed.checked_choices, observed.choices, self.device
            )
        self._push(codec, fields, reference.loss, started)
        return True

    def predict(self, step: int, loss: Tensor | None, started: float) -> None:
        """Computes the aligned decrease of the step, and predicts the features' speed with the last angle.

        Args:
            step: Number of the step.
            loss: The logged loss; None if there is none.
            started: When the measurement of the step began, as ``time.perf_counter()`` counts.
        """
        update = self.parameters.take(self.device)
        scale = self._loss_scale
        assert scale is not None
        found = self.capture.backward_norms()
        structure = self.learned.find(self.capture.step_key([count > 0 for count, _ in found]))
        done = self._aligned(update, structure, scale)
        backward = self._norms.norms([parts for _, parts in found])
        if self.scale.given:
            backward = backward / scale
        root = self._norms.root_counts([count for count, _ in found])
        if structure is None:
            speed = torch.full_like(backward, torch.nan)
        else:
            # Section 2, the feature speed formula, with the last measured angle.
            speed = _relations.predicted_update_norm(done.decrease, structure.cosine, backward)
            cuts = structure.cuts & self._accumulated() if self.capture.rewritten else structure.cuts
            if done.decrease_se is not None:  # the sample does not show that the decrease is positive
                cuts = cuts & (done.decrease > _CERTAIN * done.decrease_se)
            speed = torch.where(cuts & (speed > 0), speed, torch.nan)
        fields = {
            **payload.aligned_fields(done),
            "backward_rms": backward / root,
            "update_rms": speed / root,
            "loss_scale": scale,
        }
        self._push(PredictedCodec(step, self.layout), fields, loss, started)

    def skipped(self, step: int, reason: str) -> None:
        """Records that gradients led to no measured step."""
        self.put(payload.skipped_record(step, time.time(), reason))

    def _push(self, codec: StepCodec, fields: dict[str, Tensor], loss: Tensor | None, started: float) -> None:
        if loss is not None:
            fields["loss"] = loss.to(self.device, torch.float64)
        if self._found_inf is not None:
            fields["found_inf"] = self._found_inf
        vector = codec.encode(fields)
        codec.scalars["overhead_seconds"] = self.capture.seconds + time.perf_counter() - started
        self.push(vector, codec.decode)

    def _aligned(self, update: MeasuredUpdate, structure: StepStructure | None, scale: Tensor) -> Aligned:
        if structure is None:
            return Aligned.unknown(len(self.layers), self.device)
        return aligned(update, structure.incidence, scale if self.scale.given else None)

    def _accumulated(self) -> Tensor:
        """Returns whether only backwards and zeroing wrote to gradients before the last backward: bool ()."""
        if not self.capture.rewritten:
            return torch.ones((), dtype=torch.bool, device=self.device)
        return ~torch.stack([flag.to(self.device, non_blocking=True) for flag in self.capture.rewritten]).any()

    def _refused(
        self, verdict: trust.AssessedUpdate, cuts: Tensor, forwards: Sequence[ForwardCapture], absent: Sequence[int]
    ) -> tuple[trust.AssessedUpdate, Tensor]:
        """Refuses all rows of the step, or single ones, for what else has happened in it."""
        everywhere = torch.ones_like(verdict.valid)
        if self.capture.dropped:
            verdict, cuts = trust.refuse(verdict, row_reasons.LEFT_OUT, everywhere), torch.zeros_like(cuts)
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
        return verdict, cuts
