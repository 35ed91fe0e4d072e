"""One measured step from hooks to payload: what is asked of which part, and in which order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._monitor import payload
from fastfs._monitor.capture.capture import Capture
from fastfs._monitor.capture.passes import Pass
from fastfs._monitor.measure import decrease_reasons as decrease_reasons
from fastfs._monitor.measure import row_reasons, trust
from fastfs._monitor.measure.aligned_decrease import Aligned, LossScale, aligned
from fastfs._monitor.measure.assessment import ProbeSums, UpdateAssessor
from fastfs._monitor.measure.fingerprints import Fingerprint
from fastfs._monitor.measure.gradient_treatment import GradientFactor
from fastfs._monitor.measure.learned_structure import Kind, Knowledge
from fastfs._monitor.measure.measured_update import MeasuredUpdate
from fastfs._monitor.measure.modes import BatchMode, JvpMode
from fastfs._monitor.measure.observation import (
    Look,
    changed_choices,
    graphs_of,
    is_linear,
    reported,
    unscaled,
    without_update,
)
from fastfs._monitor.measure.parameters import Parameters
from fastfs._monitor.measure.probe import ProbeMode
from fastfs._monitor.measure.replay_checks import ReplayChecks
from fastfs._monitor.measure.row_sums import LayerSums, RowSums, totals
from fastfs._monitor.payload import Names
from fastfs._monitor.record.recorder import Record
from fastfs._network.guard import WriteError
from fastfs._network.layers import Layer
from fastfs._stats import FeatureStats, ParameterStats
from fastfs.formula import _relations

__all__ = ["Engine"]

Push = Callable[[Tensor, Callable[[Tensor], list[Record]]], None]


@dataclass
class Engine:
    """Measures one training step.

    Attributes:
        layers, names: the watched layers, and what columns are of.
        mode: how features are seen.
        amplify: whether an update that rounding hides is measured enlarged.
        quantiles: of the rows.
        capture, parameters, factor, scale: the parts that have watched the step.
        device: of sums.
        push: takes a payload and what makes records of it; ``put`` a record that is on the host.
    """

    model: nn.Module
    layers: Sequence[Layer]
    names: Names
    mode: BatchMode | ProbeMode
    amplify: bool
    quantiles: Sequence[float]
    capture: Capture
    parameters: Parameters
    factor: GradientFactor
    scale: LossScale
    device: torch.device
    push: Push
    put: Callable[[Record], None]

    def __post_init__(self) -> None:
        self.knowledge = Knowledge(self.model, len(self.layers), self.capture, self.device)
        self.knowledge.look(self.parameters.tensors)
        self.assessor = UpdateAssessor(self.parameters.tensors, self.device)
        self.replay_checks = ReplayChecks(len(self.layers), self.device)
        self._loss_scale: Tensor | None = None  # of the step that is under way
        self._found_inf: Tensor | None = None
        self._written: Tensor | None = None  # a parameter, since the forward: bool () on the device
        self._rehearsed = False  # compiled forwards of the step that is under way have been run as they are written
        self._eager_precision: list[float] | None = None  # of that
        self._idle = set(range(len(self.layers)))  # layers that have run in no measured step
        self._counted: tuple[tuple[int, ...], Tensor] = (), torch.zeros(0)  # elements of layers, and roots of them
        self._proven: list[list[Tensor]] = []  # choices of the forward that has proven itself in this step

    # Around the optimizers

    def before(self, optimizer: torch.optim.Optimizer, index: int, *, first: bool, measured: bool) -> None:
        if first:
            if self.knowledge.look(self.parameters.tensors):
                self.factor.watch()
                self.replay_checks.clear()
            self._loss_scale = self.scale.take(self.device)
            if measured:
                self._before_measuring()
        self.parameters.before(index, measured, self.factor)

    def _before_measuring(self) -> None:
        tensors = self.parameters.tensors
        if isinstance(self.mode, ProbeMode):
            self.mode.before_step(self.knowledge.perturbed, tensors)
            if self.replay_checks.due(None):
                self.replay_checks.record(
                    None, self._totals([self.mode.prove(self.knowledge.perturbed, tensors)]).stats
                )
            return
        passes = self.capture.waiting
        if not passes:
            return
        now = Fingerprint(tensors, passes[-1].fingerprint)
        prints = [p.fingerprint for p in passes if p.fingerprint is not None]
        if prints:
            written = torch.stack([now.differs(each).to(self.device) for each in prints]).any()
            if any(now.changed_objects(each) for each in prints):
                written = torch.ones_like(written)
            self._written = written
        if self._refusal(passes) is not None:
            return
        kind = graphs_of(passes)
        if self.replay_checks.due(kind):
            self._rehearse(passes)
            seen = self.mode.prove(passes, self.knowledge.perturbed, tensors)
            self._proven = seen.choices
            self.replay_checks.record(kind, self._totals(seen.rows).stats)

    def _rehearse(self, passes: Sequence[Pass]) -> None:
        """Before compiled graphs run again: an eager forward, whose every operation can be seen.

        At every measured step: a forward may write now and then only.
        """
        assert isinstance(self.mode, BatchMode)
        if self.mode.runs_compiled and not self._rehearsed:
            seen = self.mode.rehearse(passes, self.knowledge.perturbed, self.parameters.tensors)
            self._eager_precision = seen.coarsest
            self._rehearsed = True

    @staticmethod
    def _refusal(passes: Sequence[Pass]) -> int | None:
        """Why a second forward cannot be the first one again, as far as the host knows; None if nothing is known."""
        if any(p.other_weights for p in passes):
            return row_reasons.OTHER_WEIGHTS
        return row_reasons.DEPENDENT if any(p.dependent for p in passes) else None

    def after(self, optimizer: torch.optim.Optimizer, index: int, *, measured: bool) -> None:
        self.parameters.after(index, measured)
        found: Tensor | None = getattr(optimizer, "found_inf", None)
        if found is not None:
            self._found_inf = found.detach().to(self.device, torch.float64).reshape(()).clone()

    @property
    def idle(self) -> list[Layer]:
        """Layers that have run in no measured step so far."""
        return [layer for layer in self.layers if layer.index in self._idle]

    def renew(self) -> None:
        """Forget what is kept from step to step for the sake of speed."""
        self.parameters.renew()
        self.factor.renew()

    def close(self) -> None:
        self.clear()
        self.factor.close()

    def state_dict(self) -> dict[str, Any]:
        """What the next measurement takes from the last one."""
        kappa = None if self.assessor.kappa is None else self.assessor.kappa.cpu()
        return {
            "layers": [layer.name for layer in self.layers],
            "kappa": kappa,
            "knowledge": self.knowledge.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.assessor.kappa = None if state["kappa"] is None else state["kappa"].to(self.device)
        self.knowledge.load_state_dict(state["knowledge"])

    def clear(self) -> None:
        """Forget the step that is over."""
        self.parameters.clear()
        self.factor.clear()
        self._loss_scale = self._found_inf = self._written = None
        self._rehearsed, self._eager_precision = False, None
        self._proven = []
        self.mode.clear()

    # After them

    def measure(self, step: int, loss: Tensor | None, started: float) -> bool:
        """Measure the step and push its payload. False if there was nothing to measure.

        Raises:
            WriteError: a second forward would have changed what training owns.
        """
        mode = self.mode
        passes: list[Pass] = []
        if not isinstance(mode, ProbeMode):
            passes = self.capture.collect()
            if not passes:
                return False
            if any(p.writes_parameters for p in passes):
                raise WriteError("a parameter has another version after it", inputs=False)
        found = self.parameters.take(self.device)
        moved = (found.reason == decrease_reasons.MOVED).any()
        if passes:
            ran = [any(p.visits[i] for p in passes) for i in range(len(self.layers))]
        else:
            ran = [count > 0 for count, _ in self.capture.squares()]
        key = self.capture.kind(ran)
        kind, learned = self.knowledge.learn(mode, passes, self.parameters.tensors, step, key)
        if learned is not None:
            columns = {name: self.names.padded(column) for name, column in learned.columns.items()}
            self.put(replace(learned, columns=columns))
        scale = self._loss_scale
        assert scale is not None
        if isinstance(mode, ProbeMode):
            scale = torch.ones_like(scale)
            loss = mode.loss if loss is None else loss
            done = self._aligned(
                mode.with_gradients(found, self.parameters.previous, self.parameters.tensors), kind, scale
            )
        else:
            done = self._aligned(found, kind, scale)
        cuts = torch.zeros(len(self.layers), dtype=torch.bool, device=self.device) if kind is None else kind.cuts
        look = self._look(passes, kind, found.stats, torch.where(cuts, done.decrease * scale, torch.nan))
        verdict, sums_of = look.verdict, look.sums
        graphs = None if isinstance(mode, ProbeMode) else graphs_of(passes)
        verdict = self.replay_checks.refuse_unrepeated(graphs, verdict, look.eps, look.depth)
        self.replay_checks.count_step(graphs)
        self._idle -= {i for i, code in enumerate(look.absent) if code != row_reasons.NOT_RUN}
        verdict = trust.refuse(verdict, row_reasons.MOVED, moved.expand_as(verdict.valid))
        verdict, cuts = self._refused(verdict, cuts, passes, look.absent)
        sums = FeatureStats(unscaled(reported(verdict, sums_of.stats), scale))
        residual = torch.where(cuts, _relations.residual(done.decrease, sums.update_dot_backward), torch.nan)
        residual_se = sums_of.dot_se * (1.0 - residual).abs()
        linear = is_linear(residual, residual_se, look.curvature)
        self.knowledge.angles(key, sums.cos_angle, verdict.valid & cuts & (linear == 1))
        tensors = {
            "sums": self.names.with_groups(sums.sums),
            "reason": self.names.worst(verdict.reason),
            "amplified": self.names.worst(verdict.amplified.long()),
            "angle_se": sums_of.angle_se,
            "update_se": sums_of.update_se,
            "residual_se": residual_se,
            "quantiles": sums_of.quantiles,
            "residual": residual,
            "linear": linear,
            "aligned": _columns(done),
            "decrease_reason": done.reason,
            "loss_scale": scale,
        }
        if self.assessor.kappa is not None:
            tensors["kappa"] = self.assessor.kappa
        common = {"step": step, "time": time.time(), "loss": None, "micro_batches": max(len(passes), 1)}
        if any(self._proven):
            tensors["choices_changed"], common["choices"] = changed_choices(self._proven, look.choices, self.device)
        names, rows, quantiles, method = self.names, sums_of.rows, self.quantiles, mode.method
        self._push(
            tensors,
            loss,
            common,
            lambda parts: payload.measured(parts, names, rows, quantiles, method, common),
            step,
            started,
        )
        return True

    def predict(self, step: int, loss: Tensor | None, started: float) -> None:
        """Aligned decrease of the step, and what the feature speed formula makes of it with the last angle."""
        stats = self.parameters.take(self.device)
        scale = self._loss_scale
        assert scale is not None
        found = self.capture.squares()
        kind = self.knowledge.kind(self.capture.kind([count > 0 for count, _ in found]))
        done = self._aligned(stats, kind, scale)
        backward = self._norms([parts for _, parts in found])
        if self.scale.given:
            backward = backward / scale
        root = self._roots([count for count, _ in found])
        if kind is None:
            speed = torch.full_like(backward, torch.nan)
        else:
            # Section 2, the feature speed formula, with the last angle that was measured.
            speed = _relations.predicted_update_norm(done.decrease, kind.cosine, backward)
            cuts = kind.cuts & self._accumulated() if self.capture.rewritten else kind.cuts
            speed = torch.where(cuts & (speed > 0), speed, torch.nan)
        tensors = {
            "aligned": _columns(done),
            "decrease_reason": done.reason,
            "backward_rms": backward / root,
            "update_rms": speed / root,
            "loss_scale": scale,
        }
        common = {"step": step, "time": time.time(), "loss": None}
        names = self.names
        self._push(tensors, loss, common, lambda parts: payload.predicted(parts, names, common), step, started)

    def _accumulated(self) -> Tensor:
        """Whether nothing but backwards and zeros was written to gradients before the last backward: bool ()."""
        if not self.capture.rewritten:
            return torch.ones((), dtype=torch.bool, device=self.device)
        return ~torch.stack([flag.to(self.device, non_blocking=True) for flag in self.capture.rewritten]).any()

    def _roots(self, counts: Sequence[int]) -> Tensor:
        """Of the numbers of elements, nan for 0: float64 (L,); the last ones are kept."""
        key = tuple(counts)
        if self._counted[0] != key:
            roots = [count**0.5 or torch.nan for count in key]
            self._counted = key, torch.tensor(roots, dtype=torch.float64).to(self.device, non_blocking=True)
        return self._counted[1]

    def _norms(self, layers: Sequence[Sequence[tuple[Tensor, float]]]) -> Tensor:
        """Per layer the root of the sum over its parts, nan without any: float64 (L,)."""
        if all(len(parts) == 1 and not parts[0][0].dim() for parts in layers):
            return torch.stack([parts[0][0].to(self.device, non_blocking=True) for parts in layers])
        rows = [[(x if x.dim() else x.square().view(1), factor) for x, factor in parts] for parts in layers]
        return self._squares(rows).sqrt()

    def _squares(self, layers: Sequence[Sequence[tuple[Tensor, float]]]) -> Tensor:
        """Per layer the sum over its parts of sum of squares times factor, nan without any: float64 (L,)."""
        flat = [part for parts in layers for part in parts]
        if len(flat) == len(layers) and len({len(rows) for rows, _ in flat}) == 1 and all(layers):  # few operations
            factors = torch.tensor([factor for _, factor in flat], dtype=torch.float64)
            sums = torch.stack([rows for rows, _ in flat]).to(self.device).sum(dim=1)
            return sums * factors.to(self.device, non_blocking=True)
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        totals = [[rows.sum().to(self.device) * factor for rows, factor in parts] for parts in layers]
        return torch.stack([sum(parts, zero) if parts else zero + torch.nan for parts in totals])

    def skipped(self, step: int, reason: str) -> None:
        """Say that gradients led to no step."""
        self.put(Record(kind="skipped", step=step, time=time.time(), scalars={"reason": reason}, columns={}))

    def _push(
        self,
        tensors: dict[str, Tensor],
        loss: Tensor | None,
        common: dict[str, Any],
        decode: Callable[[dict[str, Tensor]], Record],
        step: int,
        started: float,
    ) -> None:
        if loss is not None:
            tensors["loss"] = loss.to(self.device, torch.float64)
        if self._found_inf is not None:
            tensors["found_inf"] = self._found_inf
        vector, split = payload.pack(tensors)
        common["overhead_seconds"] = self.capture.seconds + time.perf_counter() - started

        def records(host: Tensor) -> list[Record]:
            parts = split(host)
            if "found_inf" in parts and parts["found_inf"].item() > 0:
                reason = "the gradient scaler found gradients that are not finite"
                return [Record(kind="skipped", step=step, time=common["time"], scalars={"reason": reason}, columns={})]
            return [decode(parts)]

        self.push(vector, records)

    # The parts of a measurement

    def _look(self, passes: list[Pass], kind: Kind | None, updates: ParameterStats, decrease: Tensor) -> Look:
        """Sums over features with their verdict, and all that comes with them."""
        mode, now, layers = self.mode, self.parameters.tensors, len(self.layers)
        depth = self.assessor.depth(None if kind is None else kind.structure, layers)
        if isinstance(mode, ProbeMode):
            sums = self._totals([mode.measure(self.knowledge.perturbed, now)])
            eps = self._on_device(mode.coarsest)
            return Look(self.assessor.assess_replay(sums, eps, depth), sums, eps, depth, mode.absent())
        if self._refusal(passes) is not None:
            sums = self._totals([mode.unmoved(p) for p in passes])
            eps = self._on_device(self.assessor.precision(layers, passes, None))
            sums = replace(sums, stats=without_update(sums.stats))
            return Look(self.assessor.assess_replay(sums, eps, depth), sums, eps, depth, self._absent(passes))
        self._rehearse(passes)
        previous = self.parameters.previous
        if isinstance(mode, JvpMode):
            seen = mode.along(passes, self.knowledge.perturbed, previous, now)
        else:
            seen = mode.measure(passes)
        sums = self._totals(seen.rows)
        coarsest = self.assessor.precision(layers, passes, seen.coarsest or self._eager_precision)
        eps = self._on_device(coarsest)
        look = Look(self.assessor.assess_replay(sums, eps, depth), sums, eps, depth, [], choices=seen.choices)
        if isinstance(mode, JvpMode):
            look.verdict = self._same(self.assessor.assess_tangent(sums, eps, decrease), passes)
        elif self.amplify:

            def probe(kappa: Tensor) -> ProbeSums:
                rows = mode.amplified(passes, self.knowledge.perturbed, previous, now, kappa)
                return ProbeSums(*map(self._totals, rows))

            def exact() -> FeatureStats:
                return self._totals(mode.in_float32(passes, self.knowledge.perturbed, previous)).stats

            verdict, look.sums, look.curvature = self.assessor.assess_amplified(
                sums, eps, depth, max(coarsest, default=0.0), updates, decrease, probe, exact
            )
            look.verdict = self._same(verdict, passes)
        look.absent = self._absent(passes)
        return look

    def _same(self, verdict: trust.AssessedUpdate, passes: list[Pass]) -> trust.AssessedUpdate:
        """Backward vectors are those of the training step: with torch.compile, of another forward perhaps."""
        if not self.knowledge.perturbed.compiled:
            return verdict
        assert isinstance(self.mode, BatchMode)
        seen = self.mode.eager(passes, self.knowledge.perturbed, self.parameters.previous)
        return self.assessor.refuse_other_masks(verdict, self._totals(seen.rows).stats)

    def _absent(self, passes: Sequence[Pass]) -> list[int]:
        """Per layer why it has no rows, or not the right ones; 0 where it has."""
        codes = []
        for index in range(len(self.layers)):
            visits = [visit for p in passes for visit in p.visits[index]]
            if not visits:
                hidden = self.capture.hidden(index)
                codes.append(row_reasons.IN_GRAPH if hidden else row_reasons.NOT_RUN)
            elif any(visit.absent == row_reasons.UNMATCHED for visit in visits):
                codes.append(row_reasons.UNMATCHED)
            elif index in self.mode.astray:
                codes.append(row_reasons.OTHER_CALLS)
            elif not any(visit.measurable for visit in visits):
                codes.append(visits[0].absent or row_reasons.NO_GRAPH)
            elif isinstance(self.mode, JvpMode) and index in self.mode.cut:
                codes.append(row_reasons.DETACHED)
            else:
                codes.append(0)
        return codes

    def _refused(
        self, verdict: trust.AssessedUpdate, cuts: Tensor, passes: Sequence[Pass], absent: Sequence[int]
    ) -> tuple[trust.AssessedUpdate, Tensor]:
        """What speaks against all rows of a step, and against single ones."""
        everywhere = torch.ones_like(verdict.valid)
        if self.capture.dropped:
            verdict, cuts = trust.refuse(verdict, row_reasons.LEFT_OUT, everywhere), torch.zeros_like(cuts)
        if self._written is not None:
            verdict = trust.refuse(verdict, row_reasons.WRITTEN, everywhere & self._written)
        if self.capture.rewritten:
            verdict = trust.refuse(verdict, row_reasons.REWRITTEN, everywhere & ~self._accumulated())
        code = self._refusal(passes)
        if code is not None:
            verdict = trust.refuse(verdict, code, everywhere)
        if any(absent):
            codes = torch.tensor(absent, dtype=torch.int64).to(self.device, non_blocking=True)
            verdict = trust.refuse_codes(verdict, codes)
        return verdict, cuts

    def _totals(self, rows: list[RowSums]) -> LayerSums:
        return totals(rows, self.quantiles, self.device)

    def _on_device(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64).to(self.device, non_blocking=True)

    def _aligned(self, found: MeasuredUpdate, kind: Kind | None, scale: Tensor) -> Aligned:
        if kind is None:
            return Aligned.unknown(len(self.layers), self.device)
        return aligned(found, kind.incidence, scale if self.scale.given else None)


def _columns(done: Aligned) -> Tensor:
    """In the order of ``payload.ALIGNED``."""
    return torch.stack([done.decrease, done.parameter_norm, done.update_norm, done.gradient_norm])
