"""The updates of the parameters of all optimizers, in one order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfs._monitor.capture.fingerprints import Fingerprint
from fastfs._monitor.measure.full_checks import both
from fastfs._monitor.measure.gradient_treatment import GradientFactor, Treatment, one_factor
from fastfs._monitor.measure.measured_update import OF_STEP, MeasuredUpdate
from fastfs._monitor.measure.parameter_sample import CHUNK, SAMPLING
from fastfs._monitor.measure.sampled_calls import SampledCalls
from fastfs._monitor.measure.update_meter import UpdateMeter
from fastfs._monitor.measure.update_plans import Names
from fastfs._monitor.optimizers import TrainingOptimizer
from fastfs._record import decrease_reasons
from fastfs._stats import ParameterStats

__all__ = ["Parameters"]

_VARIANCE, _SAMPLED = map(SAMPLING.index, ("dot_variance", "sampled"))
_QUADRATIC = [ParameterStats.names.index(n) for n in ("parameter_dot_update", "update_sq", "gradient_sq")]
_OF_LAST = [ParameterStats.names.index(n) for n in ("parameter_sq", "count")]


class Parameters:
    """The parameters of all optimizers: optimizer by optimizer, group by group.

    Args:
        optimizers: The optimizers of the loop.
        snapshot: Copy the parameters before measured steps.
        sampled_every: In steps that are not measured, one of so many chunks of a parameter is read; 1 for all.
        least_chunk: The least elements of a chunk.
        names: Names the parameters of an optimizer in messages.
    """

    def __init__(
        self,
        optimizers: Sequence[TrainingOptimizer],
        *,
        snapshot: bool,
        sampled_every: int = 1,
        least_chunk: int = CHUNK,
        names: Names | None = None,
    ) -> None:
        self._optimizers = tuple(optimizers)
        self._copies = snapshot
        self._sampled_every = sampled_every
        self._least_chunk = least_chunk
        self._names = names
        self._meters: list[UpdateMeter] = []
        self._copying: list[UpdateMeter] = []
        self.renew()
        self._results: list[list[MeasuredUpdate]] = [[] for _ in optimizers]
        self._treatments: list[Treatment | None] = [None for _ in optimizers]
        self._common: list[Tensor | None] = []  # what gradients were multiplied by, in each step since the last take()
        self._complete = [True for _ in optimizers]  # whether all gradients were sampled before the step
        self._factor: GradientFactor | None = None
        self._entries: list[Fingerprint | None] = [None for _ in optimizers]
        self._moved: list[Tensor | None] = [None for _ in optimizers]

    def renew(self) -> None:
        """Begins anew, as if no step had been seen."""
        # Closed forms do not hold for a wrapper, whose step may do more than that of the optimizer within it.
        self._meters = [
            UpdateMeter(
                found.optimizer,
                copy_all=found.copied,
                sampled=SampledCalls(self._sampled_every, number, self._least_chunk),
                names=self._names,
            )
            for number, found in enumerate(self._optimizers)
        ]
        self._copying = [
            meter if meter.copy_all else UpdateMeter(meter.optimizer, copy_all=True, names=self._names)
            for meter in self._meters
        ]

    @property
    def tensors(self) -> list[Tensor]:
        return [p for meter in self._meters for p in meter.parameters]

    def groups(self) -> list[list[Tensor]]:
        """Returns the parameters of every optimizer."""
        return [meter.parameters for meter in self._meters]

    @property
    def summed(self) -> list[int]:
        """Indices of parameters whose gradients were sums over ranks in the last step, of which this has a summand."""
        found, first = [], 0
        for meter, copying in zip(self._meters, self._copying, strict=True):
            found += [first + index for index in {*meter.summed, *copying.summed}]
            first += len(meter.parameters)
        return sorted(found)

    @property
    def previous(self) -> list[Tensor]:
        """The parameters before the last measured step; empty without ``snapshot``."""
        return [p for meter in self._copying for p in meter.previous] if self._copies else []

    @property
    def snapshot_bytes(self) -> int:
        """Memory of all copies."""
        meters = {id(meter): meter for meter in (*self._meters, *(self._copying if self._copies else ()))}
        return sum(meter.copied_bytes for meter in meters.values())

    def enter(self, index: int) -> None:
        """Notes that a step with a closure begins."""
        self._entries[index] = Fingerprint(self._meters[index].parameters)
        self._moved[index] = None

    def evaluate(self, index: int) -> None:
        """Notes that its closure is evaluated, so that the gradients are those of the parameters as they are now."""
        entry = self._entries[index]
        if entry is not None:
            self._moved[index] = Fingerprint(self._meters[index].parameters, entry).differs(entry)

    def before(self, index: int, measured: bool, factor: GradientFactor | None = None) -> None:
        """To be called right before the step of an optimizer.

        Args:
            index: Of the optimizer.
            measured: Whether the step is a measured one, whose update is verified.
            factor: Finds what was done to the gradients since the backward; None if nothing was.
        """
        meter, self._factor = self._of(index, measured), factor
        if factor is None:
            self._treatments[index] = None
            meter.before()
            return
        parameters = meter.parameters
        gradients = factor.snapshot(index, parameters)
        self._treatments[index] = factor.compare(index, gradients)
        meter.before(gradients, complete=measured or gradients.complete)
        self._complete[index] = gradients.complete

    def after(self, index: int, measured: bool) -> None:
        """To be called right after the step. The gradients of the result are those of the backward."""
        meter = self._of(index, measured)
        found, scale = meter.after(exact=measured), getattr(meter.optimizer, "grad_scale", None)
        treatment, self._treatments[index] = self._treatments[index], None
        if treatment is not None and self._factor is not None:
            # An update that was verified although only representatives were sampled shows that something has changed.
            passed = both(treatment.uniform, both(meter.passed, self._complete[index] or not meter.verified))
            if meter is self._meters[index] or passed is False:
                self._factor.record_step(index, passed, complete=self._complete[index])
        if (treatment is not None and treatment.factor is not None) or scale is not None:
            known = None if treatment is None else treatment.known
            found = _of_backward(found, *(known or _nothing_done(found.reason)), scale)
        self._common.append(_divided(None if treatment is None else treatment.common, scale))
        moved, self._moved[index], self._entries[index] = self._moved[index], None, None
        if moved is not None:
            found = _unless_moved(found, moved)
        self._results[index].append(found)

    def take_factor(self, device: torch.device) -> Tensor:
        """Returns by what all gradients were multiplied between the backward and the steps since the last call.

        Float64 () on the device: 1 if nothing was done, NaN if they were not treated alike.
        """
        found, self._common = self._common, []
        return one_factor(found, device)

    def take(self, device: torch.device) -> MeasuredUpdate:
        """Returns the update of all parameters since the last call; zeros for an optimizer that did not step.

        <g, dw> and |g| are of the gradients that the backward computed, including a loss scale.
        """
        if len(self._results) == 1 and len(self._results[0]) == 1:
            found = self._results[0][0]
            if found.reason.device == device and found.stats.device == device:
                self._results[0].clear()
                return found
        sums, codes = [], []
        samplings: list[Tensor | None] = []
        for meter, results in zip(self._meters, self._results, strict=True):
            size = len(meter.parameters)
            if not results:
                sums.append(torch.zeros((size, len(ParameterStats.names)), dtype=torch.float64, device=device))
                codes.append(torch.zeros(size, dtype=torch.int64, device=device))
                samplings.append(None)
                continue
            total = results[0].stats.sums.to(device, non_blocking=True)
            code = results[0].reason.to(device, non_blocking=True)
            for found in results[1:]:
                own = found.stats.sums.to(device, non_blocking=True)
                total = total + own
                code = torch.where(code == decrease_reasons.FINE, found.reason.to(device, non_blocking=True), code)
                total[:, _OF_LAST] = own[:, _OF_LAST]
                total[:, _QUADRATIC] = torch.nan  # of the update in all, these do not follow
            sums.append(total)
            codes.append(code)
            samplings.append(_together([found.sampling for found in results], device))
            results.clear()
        if len(sums) == 1:
            return MeasuredUpdate(ParameterStats(sums[0]), codes[0], sampling=samplings[0])
        sampling = None
        if any(each is not None for each in samplings):
            zeros = [total.new_zeros((total.shape[0], len(SAMPLING))) for total in sums]
            sampling = torch.cat([z if s is None else s for s, z in zip(samplings, zeros, strict=True)])
        return MeasuredUpdate(ParameterStats(torch.cat(sums)), torch.cat(codes), sampling=sampling)

    def clear(self) -> None:
        """Forgets the steps since the last call of `take`."""
        for results in self._results:
            results.clear()
        self._common = []
        for meter in (*self._meters, *self._copying):
            meter.forget()
        self._treatments = [None for _ in self._treatments]
        self._moved = [None for _ in self._moved]
        self._entries = [None for _ in self._entries]

    def _of(self, index: int, measured: bool) -> UpdateMeter:
        return (self._copying if measured and self._copies else self._meters)[index]


def _of_backward(found: MeasuredUpdate, factor: Tensor, code: Tensor, scale: Tensor | None) -> MeasuredUpdate:
    """Returns the update with the gradients that the backward computed, not those that the step was given.

    Args:
        found: The update.
        factor: See :class:`Treatment`.
        code: See :class:`Treatment`.
        scale: By what a fused optimizer divided the gradients itself; None for nothing.
    """
    sums, sampling = found.stats.sums, found.sampling
    if factor.device != sums.device:
        factor, code = factor.to(sums.device, non_blocking=True), code.to(sums.device, non_blocking=True)
    if scale is not None:
        factor = factor / scale.to(sums.device, torch.float64, non_blocking=True)
    columns = dict(zip(ParameterStats.names, sums.unbind(dim=1), strict=True))
    dot, update, gradient = columns["dot"], columns["update_sq"], columns["gradient_sq"]
    # Without an update the factor does not matter, and without a gradient there is nothing to scale.
    nothing = (gradient == 0) & (code != decrease_reasons.CHANGED) & (code != decrease_reasons.UNSEEN)
    if sampling is not None:  # zeros of a sample do not show that all are zero
        nothing = nothing & (sampling[:, _SAMPLED] == 0)
        update = torch.where(sampling[:, _SAMPLED] == 0, update, 1.0)
    still = (update == 0) | nothing
    columns["dot"] = torch.where(still, 0.0, dot / factor)
    columns["gradient_sq"] = torch.where(nothing, 0.0, gradient / factor.square())
    reason = torch.where((found.reason == decrease_reasons.FINE) & ~still, code, found.reason)
    if sampling is not None:
        variance = torch.where(still, 0.0, sampling[:, _VARIANCE] / factor.square())
        sampling = torch.stack([variance, sampling[:, _SAMPLED]], dim=1)
    return MeasuredUpdate(ParameterStats(torch.stack(list(columns.values()), dim=1)), reason, sampling=sampling)


def _together(samplings: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """The columns `SAMPLING` of several steps of one optimizer together."""
    # The steps read the same elements, so their errors are not independent: standard errors are added.
    given = [each.to(device, non_blocking=True) for each in samplings if each is not None]
    if len(given) < 2:
        return given[0] if given else None
    both = torch.stack(given)
    variance = both[..., _VARIANCE].sqrt().sum(dim=0).square()
    return torch.stack([variance, both[..., _SAMPLED].amax(dim=0)], dim=1)


def _divided(common: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """Returns the factor of the gradients that a fused optimizer has divided by a scale."""
    if scale is None:
        return common
    inverse = scale.to(torch.float64).reshape(()).reciprocal()
    return inverse if common is None else common.to(inverse.device, non_blocking=True) * inverse


def _nothing_done(like: Tensor) -> tuple[Tensor, Tensor]:
    """Factors and codes of unchanged gradients."""
    return torch.ones_like(like, dtype=torch.float64), torch.zeros_like(like)


def _unless_moved(found: MeasuredUpdate, moved: Tensor) -> MeasuredUpdate:
    """The update; unknown if the parameters had moved when the gradients were computed."""
    moved = moved.to(found.reason.device, non_blocking=True)
    sums = found.stats.sums.clone()
    sums[:, OF_STEP].masked_fill_(moved, torch.nan)
    reason = torch.where(moved, decrease_reasons.MOVED, found.reason)
    return MeasuredUpdate(ParameterStats(sums), reason, sampling=found.sampling)
