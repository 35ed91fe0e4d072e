"""One measured step from hooks to payload: what is asked of which part, and in which order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastfs.formula import relations
from fastfs.monitor import payload
from fastfs.monitor.capture.capture import Capture
from fastfs.monitor.capture.passes import Pass
from fastfs.monitor.measure import trust
from fastfs.monitor.measure.aligned import Aligned, LossScale, aligned
from fastfs.monitor.measure.gradients import GradientFactor
from fastfs.monitor.measure.knowledge import Knowledge
from fastfs.monitor.measure.modes import BatchMode, JvpMode, ProbeMode
from fastfs.monitor.measure.parameters import Parameters
from fastfs.monitor.measure.sums import LayerSums, RowSums, totals
from fastfs.monitor.measure.verdict import Amplified, Judge
from fastfs.monitor.payload import Names
from fastfs.monitor.record.recorder import Record
from fastfs.network.layers import Layer
from fastfs.stats import FeatureStats, ParameterStats

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
        self._loss_scale: Tensor | None = None
        self._found_inf: Tensor | None = None
        self._written = False  # a parameter, since the forward
        self.cosine = torch.full((len(self.layers),), torch.nan, dtype=torch.float64, device=self.device)
        self.judge = Judge(self.parameters.tensors, self.device)

    # Around the optimizers

    def before(self, optimizer: torch.optim.Optimizer, index: int, *, first: bool, measured: bool) -> None:
        if first:
            if self.knowledge.look(self.parameters.tensors):
                self.factor.watch()
            self._written = measured and self.capture.written_since()
            self._loss_scale = self.scale.take(self.device)
            if measured and isinstance(self.mode, ProbeMode):
                self.mode.before_step(self.knowledge.perturbed, self.parameters.tensors)
        self.parameters.before(index, measured, self.factor)

    def after(self, optimizer: torch.optim.Optimizer, index: int, *, measured: bool) -> None:
        self.parameters.after(index, measured)
        found: Tensor | None = getattr(optimizer, "found_inf", None)
        if found is not None:
            self._found_inf = found.detach().to(self.device, torch.float64).reshape(()).clone()

    def close(self) -> None:
        self.clear()
        self.factor.close()

    def state_dict(self) -> dict[str, Any]:
        """What the next measurement takes from the last one."""
        kappa = None if self.judge.kappa is None else self.judge.kappa.cpu()
        return {
            "layers": [layer.name for layer in self.layers],
            "cosine": self.cosine.cpu(),
            "kappa": kappa,
            "knowledge": self.knowledge.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cosine = state["cosine"].to(self.device)
        self.judge.kappa = None if state["kappa"] is None else state["kappa"].to(self.device)
        self.knowledge.load_state_dict(state["knowledge"])

    def clear(self) -> None:
        """Forget the step that is over."""
        self.parameters.clear()
        self.factor.clear()
        self._loss_scale = self._found_inf = None
        if isinstance(self.mode, ProbeMode):
            self.mode.clear()

    # After them

    def measure(self, step: int, loss: Tensor | None, started: float) -> bool:
        """Measure the step and push its payload. False if there was nothing to measure."""
        passes: list[Pass] = []
        if not isinstance(self.mode, ProbeMode):
            passes = self.capture.collect()
            if not passes:
                return False
        stats = self.parameters.take(self.device).stats
        learned = self.knowledge.learn(self.mode, passes, self.parameters.tensors, step)
        if learned is not None:
            columns = {name: self.names.padded(column) for name, column in learned.columns.items()}
            self.put(replace(learned, columns=columns))
        scale = self._loss_scale
        assert scale is not None
        if isinstance(self.mode, ProbeMode):
            scale = torch.ones_like(scale)
            loss = self.mode.loss if loss is None else loss
            done = self._aligned_on_probe(stats)
        else:
            done = self._aligned(stats, scale)
        cuts = self.knowledge.cuts
        verdict, found = self._look(passes, stats, torch.where(cuts, done.decrease * scale, torch.nan))
        if self.capture.dropped:
            verdict = trust.refuse(verdict, trust.LEFT_OUT, torch.ones_like(verdict.valid))
            cuts = torch.zeros_like(cuts)
        if self._written:
            verdict = trust.refuse(verdict, trust.WRITTEN, torch.ones_like(verdict.valid))
        sums = FeatureStats(_unscaled(_reported(verdict, found.stats), scale))
        residual = torch.where(cuts, relations.residual(done.decrease, sums.update_dot_backward), torch.nan)
        self.cosine = torch.where(verdict.valid & cuts, sums.cos_angle, self.cosine)
        tensors = {
            "sums": self.names.with_groups(sums.sums),
            "reason": self.names.worst(verdict.reason),
            "amplified": self.names.worst(verdict.amplified.long()),
            "angle_se": found.angle_se,
            "update_se": found.update_se,
            "residual_se": found.dot_se * (1.0 - residual).abs(),
            "quantiles": found.quantiles,
            "residual": residual,
            "aligned": _columns(done),
            "loss_scale": scale,
        }
        if self.judge.kappa is not None:
            tensors["kappa"] = self.judge.kappa
        common = {"step": step, "time": time.time(), "loss": None, "micro_batches": max(len(passes), 1)}
        names, rows, quantiles, method = self.names, found.rows, self.quantiles, self.mode.method
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
        stats = self.parameters.take(self.device).stats
        scale = self._loss_scale
        assert scale is not None
        found = self.capture.squares()
        if self.knowledge.is_of([count for count, _ in found]):
            done = self._aligned(stats, scale)
        else:  # a layer has run that has not in any measured step: its parameters are upstream of who knows what
            done = Aligned.unknown(len(self.layers), self.device)
        squares = self._squares([parts for _, parts in found])
        counts = [float(count) or torch.nan for count, _ in found]
        count = torch.tensor(counts, dtype=torch.float64).to(self.device, non_blocking=True)
        backward = squares.sqrt() / scale
        # Section 2, the feature speed formula, with the last angle that was measured.
        speed = relations.predicted_update_norm(done.decrease, self.cosine, backward)
        speed = torch.where(self.knowledge.cuts, speed, torch.nan)
        tensors = {
            "aligned": _columns(done),
            "backward_rms": backward / count.sqrt(),
            "update_rms": torch.where(speed > 0, speed / count.sqrt(), torch.nan),
            "loss_scale": scale,
        }
        common = {"step": step, "time": time.time(), "loss": None}
        names = self.names
        self._push(tensors, loss, common, lambda parts: payload.predicted(parts, names, common), step, started)

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

    def _look(self, passes: list[Pass], updates: ParameterStats, decrease: Tensor) -> tuple[trust.Trusted, LayerSums]:
        """Sums over features with their verdict, and the sums that standard errors and quantiles come from."""
        structure = self.knowledge.structure
        mode, now = self.mode, self.parameters.tensors
        if isinstance(mode, ProbeMode):
            found = self._totals([mode.measure(self.knowledge.perturbed, now)])
            return self.judge.plain(found, passes, structure, mode.dtype), found
        if isinstance(mode, JvpMode):
            found = self._totals(mode.along(passes, self.knowledge.perturbed, self.parameters.previous, now))
            return self._same(self.judge.tangent(found, passes, decrease), passes), found
        found = self._totals(mode.measure(passes))
        if not self.amplify:
            return self.judge.plain(found, passes, structure), found

        def probe(kappa: Tensor) -> Amplified:
            rows = mode.amplified(passes, self.knowledge.perturbed, self.parameters.previous, now, kappa)
            return Amplified(*map(self._totals, rows))

        def exact() -> FeatureStats:
            return self._totals(mode.in_float32(passes, self.knowledge.perturbed, self.parameters.previous)).stats

        verdict, central = self.judge.amplified(found, passes, structure, updates, decrease, probe, exact)
        return self._same(verdict, passes), central

    def _same(self, verdict: trust.Trusted, passes: list[Pass]) -> trust.Trusted:
        """Backward vectors are those of the training step: with torch.compile, of another forward perhaps."""
        if not self.knowledge.perturbed.compiled:
            return verdict
        assert isinstance(self.mode, BatchMode)
        rows = self.mode.eager_difference(passes, self.knowledge.perturbed, self.parameters.previous)
        return self.judge.same_function(verdict, self._totals(rows).stats)

    def _totals(self, rows: list[RowSums]) -> LayerSums:
        return totals(rows, self.quantiles, self.device)

    def _aligned(self, stats: ParameterStats, factor: Tensor) -> Aligned:
        if self.knowledge.incidence is None:
            return Aligned.unknown(len(self.layers), self.device)
        return aligned(stats, self.knowledge.incidence, factor)

    def _aligned_on_probe(self, stats: ParameterStats) -> Aligned:
        """With the gradients of the probe; dw, |w| and |dw| are the same."""
        assert isinstance(self.mode, ProbeMode)
        found, which = self.mode.updates(self.parameters.previous, self.parameters.tensors)
        sums = stats.sums.clone()
        names = ParameterStats.names
        sums[:, names.index("dot")] = 0.0
        sums[:, names.index("gradient_sq")] = 0.0
        index = torch.tensor(which).to(self.device, non_blocking=True)
        sums[:, names.index("dot")].index_copy_(0, index, found.dot)
        sums[:, names.index("gradient_sq")].index_copy_(0, index, found.gradient_sq)
        one = torch.ones((), dtype=torch.float64, device=self.device)
        return self._aligned(ParameterStats(sums), one)


def _columns(done: Aligned) -> Tensor:
    """In the order of ``payload.ALIGNED``."""
    return torch.stack([done.decrease, done.parameter_norm, done.update_norm, done.gradient_norm])


def _reported(verdict: trust.Trusted, plain: FeatureStats) -> Tensor:
    """The verdict's sums where they come from an enlarged update; else what was seen, with the noise that may be in it.

    What the verdict takes out of a plain replay as noise is a guess: half of the most that it can be.
    """
    seen = plain.sums.clone()
    seen[:, FeatureStats.names.index("rounding_sq")] = verdict.stats.rounding_sq
    return torch.where(verdict.amplified[:, None], verdict.stats.sums, seen)


def _unscaled(sums: Tensor, scale: Tensor) -> Tensor:
    """Sums over features with the loss scale taken out of the backward vector."""
    names = FeatureStats.names
    result = sums.clone()
    for name, power in (("update_dot_backward", 1), ("abs_update_dot_backward", 1), ("backward_sq", 2)):
        result[:, names.index(name)] /= scale**power
    return result
