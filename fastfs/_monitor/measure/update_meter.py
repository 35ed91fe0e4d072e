"""UpdateMeter: what every step of an optimizer does to each parameter, without a second copy of the parameters.

For the optimizers of the table in `closed_forms` the update follows from what is left after the step, and one pass over
gradients, parameters and state measures it. For all others the parameters are copied before the step. A closed form is
verified by a few elements of each parameter, copied before the step, which have to have moved as it says.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS

from fastfs import _functional
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._monitor.capture.fingerprints import Samples
from fastfs._monitor.measure.closed_forms import ClosedForm, closed_form, rewrites_gradients
from fastfs._monitor.measure.gradient_snapshots import GradientSampler, GradientSnapshot
from fastfs._monitor.measure.host_checks import HostChecks
from fastfs._monitor.measure.hyper_parameters import Group, HyperParameters
from fastfs._monitor.measure.kernel_arguments import KernelArguments, kernel_arguments
from fastfs._monitor.measure.measured_update import (
    OF_UPDATE,
    MeasuredUpdate,
    UpdateAssembler,
    refuted,
    without_gradients,
)
from fastfs._monitor.measure.sampled_calls import SampledCall, SampledCalls
from fastfs._monitor.measure.step_in_progress import StepInProgress, sample
from fastfs._monitor.measure.update_plans import Call, Names, Part, Plan, has_closed_form, make_plan
from fastfs._network.placements import local
from fastfs._record import decrease_reasons

__all__ = ["UpdateMeter"]


class UpdateMeter:
    """Measures the update of every parameter in every step: <g, dw>, |dw|^2, |g|^2 and |w|^2.

    Call `before` right before the optimizer's step (in a step pre-hook, or the line above) and `after` right after it
    (in a step post-hook). Neither waits for a device, and neither changes anything that training sees. Gradients and
    hyper-parameters are those of `before`: others may clear or change them until `after`.

    If something else changes a parameter until `after` (a hook that clamps it, a step within the step), its closed form
    does not hold: its numbers are then NaN, with a reason, while an update from a copy includes the change. Gradients
    that the step rewrites are not known in the first such step, with a reason; from then on they are copied before
    each step.

    Every step is verified by contents, unless `before` is told that it need not be. Then identities and versions have
    to show that the step went like the last verified one (:mod:`fastfs._monitor.measure.host_checks`).

    Args:
        optimizer: Any optimizer with one update per step, so not LBFGS.
        copy_all: Copy all parameters before every step, for `previous`, and take every update from the copies.
        sampled: What is read of the parameters that have a closed form, in steps that need not be exact.
        names: Names the parameters in messages.

    Attributes:
        passed: Whether the last step was verified, or has passed the checks on the host, and nothing has changed, so
            that the next one need not be verified; a bool, or bool () on a device.
        verified: Whether it was verified.
        summed: Indices of parameters whose gradients were sums over ranks, of which this one has a summand.

    Raises:
        ValueError: For LBFGS, whose step evaluates the gradient several times.
    """

    def __init__(
        self, optimizer: Any, *, copy_all: bool = False, sampled: SampledCalls | None = None, names: Names | None = None
    ) -> None:
        if isinstance(optimizer, LBFGS):
            raise ValueError("UpdateMeter: expected an optimizer with one update per step, got LBFGS")
        self.optimizer = optimizer
        self.copy_all = copy_all
        self._names = names
        self.passed: Tensor | bool = False
        self.verified = False
        self.summed: list[int] = []
        self._gradients = GradientSampler()
        self._host_checks = HostChecks()
        self._copies: dict[Tensor, Tensor] = {}
        self._copies_gradients = False  # once the step was seen to write to them
        self._plan: Plan | None = None
        self._state: object = optimizer.state
        self._step: StepInProgress | None = None
        self._assemble = UpdateAssembler()
        self._sampled = SampledCalls() if sampled is None else sampled

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters of the optimizer, in the order of its groups, including groups that were added since."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def copied_bytes(self) -> int:
        """Memory of all copies, once every parameter that needs one has had a gradient."""
        total = 0
        for group in self.optimizer.param_groups:
            form = self._form(group)
            for p in group["params"]:
                if p in self._copies or not has_closed_form(self.optimizer, p, form):
                    total += local(p).nbytes
        return total

    @property
    def method(self) -> str:
        """How the parameters are measured, in a sentence."""
        counts: Counter[str] = Counter()
        name = type(self.optimizer).__name__
        for group in self.optimizer.param_groups:
            form = self._form(group)
            for p in group["params"]:
                if p in self._copies or not has_closed_form(self.optimizer, p, form):
                    counts["from a copy made before the step, exactly"] += 1
                else:
                    counts[f"by the closed form of {name}, up to {str(p.dtype).removeprefix('torch.')} rounding"] += 1
        parts = [f"{count} parameter{'s' * (count > 1)} {how}" for how, count in counts.items()]
        return "; ".join(parts) + "." if parts else "No parameters."

    @property
    def previous(self) -> list[Tensor]:
        """The parameters before the last step, in the order of `parameters`; overwritten by the next `before`.

        Raises:
            RuntimeError: Without `copy_all=True`, or for a parameter that was added after the last `before`.
        """
        if not self.copy_all:
            raise RuntimeError("UpdateMeter.previous: expected UpdateMeter(optimizer, copy_all=True)")
        parameters = self.parameters
        if not all(p in self._copies for p in parameters):
            raise RuntimeError("UpdateMeter.previous: expected a call of before() right before the last step")
        return [self._copies[p] for p in parameters]

    def before(self, gradients: GradientSnapshot | None = None, *, complete: bool = True) -> None:
        """Copies what the measurement needs. To be called right before the step, when all gradients are there.

        Args:
            gradients: A snapshot of the gradients, if there is one.
            complete: Verify the update by contents; else only if something has changed.

        Raises:
            ValueError: A parameter has a dtype, or it or its gradient a placement, that cannot be measured.
        """
        if gradients is None:
            gradients = self._gradients.take(self.parameters, keep=True)
        groups = self.optimizer.param_groups
        forms = [self._form(group) for group in groups]
        plan = self._plan
        known = plan is not None and plan.settled and plan.key is gradients.key and plan.forms == forms
        if plan is None or not known or self.optimizer.state is not self._state:
            self._state = self.optimizer.state  # load_state_dict makes a new one
            self._plan = plan = make_plan(self.optimizer, gradients, forms, copy_all=self.copy_all, names=self._names)
        scale = getattr(self.optimizer, "grad_scale", None)
        with torch.no_grad():
            self._copies_gradients = self._copies_gradients or plan.copies_gradients
            self._copy(plan.copied)
            state = self._host_checks.before(self.optimizer, plan)
            used = [HyperParameters(group) for group in groups]
            complete = complete or state is None or self._copies_gradients or scale is not None or self._found_inf()
            complete = complete or self._host_checks.changed(plan, groups)
            complete = complete or any(self._rewrites(used, part) for call in plan.calls for part in call.parts)
            starts: list[Samples | None] = [None] * len(plan.calls)
            if complete:
                starts = [sample(call, [call.params]) if call.closed else None for call in plan.calls]
            copies = None
            if self._copies_gradients:
                copies = [None if g is None else local(g).detach().clone() for g in gradients.tensors]
        self._step = StepInProgress(plan, gradients, complete, used, state, starts, copies, scale)

    def after(self, *, exact: bool = True) -> MeasuredUpdate:
        """Returns the statistics of the step that was just made: shape (P,), on the device of the first parameter.

        They are zero for parameters that had no gradient in this step, and the update is zero in a step that a fused
        optimizer skipped because GradScaler had found infinite gradients (`optimizer.found_inf`).

        Args:
            exact: Read all elements; else a sample of them, if the meter has one.

        Raises:
            RuntimeError: `before` was not called for this step, or state is missing.
        """
        if self._step is None:
            raise RuntimeError("UpdateMeter.after: expected a call of before() right before this step")
        step, self._step = self._step, None
        plan, used, gradients = step.plan, step.hyper_parameters, step.gradients
        groups = self.optimizer.param_groups
        with torch.no_grad():
            codes, states, counts = self._host_checks.after(self.optimizer, plan, gradients, used, step.state)
            of_parts = iter(zip(states, counts, strict=True))
            resample = step.complete or self._found_inf()
            now = gradients.resample() if resample else None
            rewritten = [
                resample and step.gradient_copies is None and self._rewrites(used, part)
                for call in plan.calls
                for part in call.parts
            ]
            made = self._made()
            preserved = None
            if now is not None:
                preserved, copy = step.preserved_gradients(self.optimizer, self.parameters, now, rewritten, made)
                self._copies_gradients = self._copies_gradients or copy
            source = gradients.tensors if step.gradient_copies is None else step.gradient_copies
            sums, call_codes, parts = [], [], iter(rewritten)
            for call, start in zip(plan.calls, step.starts, strict=True):
                known = [next(of_parts) if call.closed else (None, None) for _ in call.parts]
                given = kernel_arguments(
                    self.optimizer,
                    call,
                    [state for state, _ in known],
                    source,
                    self._copies,
                    used,
                    [next(parts) for _ in call.parts],
                    [count for _, count in known],
                )
                sums.append(_measure(call.rule, given, made, None if exact else self._sample(call, given, step)))
                call_codes.append(None if now is None else step.verify(call, start, now, given, groups, made))
            count = len(gradients.tensors)
            result = self._assemble(plan.calls, sums, call_codes, preserved, count, plan.device)
            passed: Tensor | bool = result.fine
            if step.complete and not result.fine:
                passed = (result.reason == decrease_reasons.FINE).all()
            if plan.unreadable or plan.summed:
                result = without_gradients(result, plan.unreadable, plan.summed)
            self.summed = plan.summed
            self.verified, self.passed = step.complete, codes is None and passed
            # What the checks on the host say of a step that was verified counts for the next ones alone.
            return result if codes is None or step.complete else refuted(result, codes)

    def forget(self) -> None:
        """Drops the step in progress, which is not going to be measured."""
        self._step = None
        self._gradients.forget()

    def _form(self, group: Group) -> ClosedForm | None:
        return None if self.copy_all else closed_form(self.optimizer, group)

    @torch.no_grad()
    def _copy(self, params: list[Tensor]) -> None:
        if not params and not self._copies:
            return
        old = self._copies
        self._copies = {}
        for p in params:
            copy = old.get(p)
            if copy is None or copy.shape != p.shape or copy.dtype != p.dtype or copy.device != p.device:
                copy = torch.empty_like(p, requires_grad=False)
            self._copies[p] = copy
        if len(old) > len(params):  # parameters without a gradient in this step keep their copies
            current = set(self.parameters)
            self._copies.update({p: c for p, c in old.items() if p in current and p not in self._copies})
        if params:
            torch._foreach_copy_([local(self._copies[p]) for p in params], [local(p).detach() for p in params])

    def _sample(self, call: Call, given: KernelArguments, step: StepInProgress) -> SampledCall | None:
        if not call.closed or call.is_complex:
            return None
        if step.complete or not call.knows_sampled:  # in other steps the host checks that the tensors are the same
            tensors = [given.gradients, given.params, given.first, *([given.second] if given.second else [])]
            sizes = [local(p).numel() for p in self.parameters]
            call.sampled, call.knows_sampled = self._sampled.find(sizes, call.indices, tensors, call.device), True
        return call.sampled

    def _rewrites(self, used: list[HyperParameters], part: Part) -> bool:
        return rewrites_gradients(self.optimizer, used[part.group].values, part.params)

    def _found_inf(self) -> bool:
        """Whether a fused optimizer decides on the device if it makes its step."""
        return getattr(self.optimizer, "found_inf", None) is not None

    def _made(self) -> Tensor | None:
        """Whether a fused optimizer has made its step, bool (); None if it has."""
        found_inf: Tensor | None = getattr(self.optimizer, "found_inf", None)
        return None if found_inf is None else found_inf.detach().reshape(()) == 0


def _measure(rule: OptimizerRule, given: KernelArguments, made: Tensor | None, sampled: SampledCall | None) -> Tensor:
    lists = (given.gradients, given.params, given.first, given.second)
    if sampled is None:
        sums = _functional.optimizer_stats(rule, *lists, given.table).sums
    else:
        reading = sampled.next()
        table = reading.coefficients(given.table)
        sums = _functional.optimizer_stats(rule, *lists, table, pieces=reading.pieces).sums
    if made is not None:  # if it was not, the state is that of an earlier step
        update = sums[:, OF_UPDATE]
        sums[:, OF_UPDATE] = torch.where(made.to(sums.device, non_blocking=True), update, 0.0)
    return sums if sampled is None else sampled.estimate(reading, sums)
