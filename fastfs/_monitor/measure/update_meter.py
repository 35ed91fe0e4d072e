"""UpdateMeter: what every step of an optimizer does to each parameter, without a second copy of the parameters.

For SGD, Adam, AdamW, Adamax and RMSprop the update follows from what is left after the step (`closed_forms`), and one
pass over gradients, parameters and state measures it. For everything else the parameters are copied before the step.
A closed form is believed where a few elements of the parameter, copied before the step, have moved as it says.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS

from fastfs import _functional
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._monitor.capture.fingerprints import Samples, Views, real
from fastfs._monitor.measure import decrease_reasons
from fastfs._monitor.measure.closed_forms import Form, Group, Settings, closed_form, rewrites_gradients
from fastfs._monitor.measure.gradient_snapshots import Gradients, GradientSnapshot
from fastfs._monitor.measure.kernel_arguments import Arguments, arguments
from fastfs._monitor.measure.reliance import Reliance, StepSeen
from fastfs._monitor.measure.update_plans import Call, InOrder, Part, Plan, follows, make_plan
from fastfs._monitor.measure.update_verification import same_gradients, verify
from fastfs._stats import ParameterStats, span

__all__ = ["OF_STEP", "OF_UPDATE", "MeasuredUpdate", "UpdateMeter"]

# The columns of the sums that an unknown update, or an unknown update or gradient, leaves unknown.
OF_UPDATE = span(ParameterStats, "update")
OF_STEP = span(ParameterStats, "update", "gradient")


@dataclass
class MeasuredUpdate:
    """What a step did to P parameters.

    Attributes:
        stats: of shape (P,); nan where it is not known.
        reason: int64 (P,), on the same device: why not, a code of :mod:`fastfs._monitor.measure.decrease_reasons`; 0 if
            it is.
        fine: whether the host knows that all reasons are 0.
    """

    stats: ParameterStats
    reason: Tensor
    fine: bool = False


@dataclass
class _Step:
    """What was there before the step under way."""

    plan: Plan
    look: GradientSnapshot
    complete: bool  # the update is verified by contents
    settings: list[Settings]
    seen: StepSeen | None
    starts: list[Samples | None]  # of the parameters of every call
    copies: list[Tensor | None] | None  # of the gradients
    grad_scale: Tensor | None


class UpdateMeter:
    """Measures the update of every parameter in every step: <g, dw>, |dw|^2, |g|^2 and |w|^2.

    Call `before` right before the optimizer's step (in a step pre-hook, or the line above) and `after` right after it
    (in a step post-hook). Neither waits for a device, and neither changes anything that training sees. Gradients,
    learning rates and so on are those of `before`: others may clear or change them until `after`.

    What else changes a parameter until `after` (a hook that clamps it, a step in the step) makes a closed form untrue:
    then the numbers of that parameter are nan, with a reason; a snapshot has it in the update. Gradients that the step
    rewrites are missed once, with a reason; from then on they are copied before each step.

    Every step is verified by contents unless `before` is told that this one need not be: then identities and versions
    have to say that it was like the last one that was (:mod:`fastfs._monitor.measure.reliance`).

    Args:
        optimizer: Any optimizer with one update per step: not LBFGS.
        snapshot: Copy all parameters before every step, for `previous`, and take every update from the copies.

    Attributes:
        good: whether the last step was verified, or has passed the checks, and nothing has changed; bool () on a
            device. The next one need not be verified then.
        verified: whether it was verified.

    Raises:
        ValueError: for LBFGS, whose step evaluates the gradient several times.
    """

    def __init__(self, optimizer: Any, *, snapshot: bool = False) -> None:
        if isinstance(optimizer, LBFGS):
            raise ValueError("UpdateMeter: expected an optimizer with one update per step, got LBFGS")
        self.optimizer = optimizer
        self.snapshot = snapshot
        self.good: Tensor | bool = False
        self.verified = False
        self._gradients = Gradients()
        self._reliance = Reliance()
        self._buffers: dict[Tensor, Tensor] = {}
        self._copies_gradients = False  # once the step was seen to write to them
        self._plan: Plan | None = None
        self._state: object = optimizer.state
        self._step: _Step | None = None  # between before() and after()
        self._order = InOrder()
        self._fine = torch.zeros(0, dtype=torch.int64)

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters of the optimizer, in the order of its groups; also those added since."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def snapshot_bytes(self) -> int:
        """Memory of the copies in all, once every parameter that needs one has had a gradient."""
        total = 0
        for group in self.optimizer.param_groups:
            form = self._form(group)
            for p in group["params"]:
                if p in self._buffers or not follows(self.optimizer, p, form):
                    total += p.numel() * p.element_size()
        return total

    @property
    def exact(self) -> str:
        """How each part is measured, in a sentence."""
        kinds: Counter[str] = Counter()
        name = type(self.optimizer).__name__
        for group in self.optimizer.param_groups:
            form = self._form(group)
            for p in group["params"]:
                if p in self._buffers or not follows(self.optimizer, p, form):
                    kinds["from a copy made before the step, exactly"] += 1
                else:
                    kinds[f"by the closed form of {name}, up to {str(p.dtype).removeprefix('torch.')} rounding"] += 1
        parts = [f"{count} parameter{'s' * (count > 1)} {how}" for how, count in kinds.items()]
        return "; ".join(parts) + "." if parts else "No parameters."

    @property
    def previous(self) -> list[Tensor]:
        """The parameters before the last step, in the order of `parameters`; overwritten by the next `before`.

        Raises:
            RuntimeError: without `snapshot=True`, or for a parameter that was added after the last `before`.
        """
        if not self.snapshot:
            raise RuntimeError("UpdateMeter.previous: expected UpdateMeter(optimizer, snapshot=True)")
        parameters = self.parameters
        if not all(p in self._buffers for p in parameters):
            raise RuntimeError("UpdateMeter.previous: expected a call of before() right before the last step")
        return [self._buffers[p] for p in parameters]

    def before(self, look: GradientSnapshot | None = None, *, complete: bool = True) -> None:
        """Copies what needs to be; to be called right before the step, when all gradients are there.

        Args:
            look: at the gradients, if there has been one.
            complete: verify the update by contents; else only where something has changed.

        Raises:
            ValueError: for a parameter of a dtype that cannot be measured, or a DTensor.
        """
        if look is None:
            look = self._gradients.look(self.parameters, keep=True)
        groups = self.optimizer.param_groups
        forms = [self._form(group) for group in groups]
        plan = self._plan
        known = plan is not None and plan.settled and plan.key is look.key and plan.forms == forms
        if plan is None or not known or self.optimizer.state is not self._state:
            self._state = self.optimizer.state  # load_state_dict makes a new one
            self._plan = plan = make_plan(self.optimizer, look, forms, snapshot=self.snapshot)
        scale = getattr(self.optimizer, "grad_scale", None)
        with torch.no_grad():
            self._copies_gradients = self._copies_gradients or plan.coarse
            self._copy(plan.copied)
            seen = self._reliance.before(self.optimizer, plan)
            settings = [Settings(group) for group in groups]
            complete = complete or seen is None or self._copies_gradients or scale is not None or self._found_inf()
            complete = complete or self._reliance.changed(plan, groups)
            complete = complete or any(self._rewrites(settings, part) for call in plan.calls for part in call.parts)
            starts: list[Samples | None] = [None] * len(plan.calls)
            if complete:
                starts = [self._read(call, [call.params]) if call.closed else None for call in plan.calls]
            copies = None
            if self._copies_gradients:
                copies = [None if g is None else g.detach().clone() for g in look.gradients]
        self._step = _Step(plan, look, complete, settings, seen, starts, copies, scale)

    @property
    def look(self) -> GradientSnapshot:
        """The gradients that the step under way was given.

        Raises:
            RuntimeError: outside of `before` and `after`.
        """
        if self._step is None:
            raise RuntimeError("UpdateMeter.look: expected a call of before() right before this")
        return self._step.look

    def after(self) -> MeasuredUpdate:
        """The statistics of the step that was just made: shape (P,), on the device of the first parameter.

        Rows of zeros for parameters that had no gradient in this step, and no update in a step that a fused optimizer
        skipped because GradScaler had found infinite gradients (`optimizer.found_inf`).

        Raises:
            RuntimeError: if `before` was not called for this step, or state is missing.
        """
        if self._step is None:
            raise RuntimeError("UpdateMeter.after: expected a call of before() right before this step")
        step, self._step = self._step, None
        plan = step.plan
        with torch.no_grad():
            codes, states, counts = self._reliance.after(self.optimizer, plan, step.look, step.settings, step.seen)
            of_parts = iter(zip(states, counts, strict=True))
            whole = step.complete or self._found_inf()
            now = step.look.again() if whole else None
            rewritten = [
                whole and step.copies is None and self._rewrites(step.settings, part)
                for call in plan.calls
                for part in call.parts
            ]
            kept = None if now is None else self._kept(step, now, rewritten)
            source = step.look.gradients if step.copies is None else step.copies
            sums, verdicts, parts = [], [], iter(rewritten)
            for call, start in zip(plan.calls, step.starts, strict=True):
                found = [next(of_parts) if call.closed else (None, None) for _ in call.parts]
                given = arguments(
                    self.optimizer,
                    call,
                    [state for state, _ in found],
                    source,
                    self._buffers,
                    step.settings,
                    [next(parts) for _ in call.parts],
                    [count for _, count in found],
                )
                sums.append(self._measure(call.rule, given))
                verdicts.append(None if now is None else self._verify(step, call, start, now, given))
            result = self._result(step, sums, verdicts, kept)
            self.verified = step.complete
            if step.complete:
                # What the checks say of a step that was looked at counts for the next ones alone.
                self.good = codes is None and (result.fine or (result.reason == decrease_reasons.FINE).all())
                return result
            self.good = codes is None and result.fine
            return result if codes is None else _spoiled(result, codes)

    def forget(self) -> None:
        """Let go of the step under way: it is not going to be measured."""
        self._step = None
        self._gradients.forget()

    # What is measured how

    def _form(self, group: Group) -> Form | None:
        return None if self.snapshot else closed_form(self.optimizer, group)

    @torch.no_grad()
    def _copy(self, params: list[Tensor]) -> None:
        if not params and not self._buffers:
            return
        old = self._buffers
        self._buffers = {}
        for p in params:
            buffer = old.get(p)
            if buffer is None or buffer.shape != p.shape or buffer.dtype != p.dtype or buffer.device != p.device:
                buffer = torch.empty_like(p, requires_grad=False)
            self._buffers[p] = buffer
        if len(old) > len(params):  # parameters without a gradient in this step keep their buffers
            current = set(self.parameters)
            self._buffers.update({p: b for p, b in old.items() if p in current and p not in self._buffers})
        if params:
            torch._foreach_copy_([self._buffers[p] for p in params], [p.detach() for p in params])

    # After the step

    def _rewrites(self, settings: list[Settings], part: Part) -> bool:
        return rewrites_gradients(self.optimizer, settings[part.group].values, part.params)

    def _found_inf(self) -> bool:
        """Whether a fused optimizer decides on the device if it makes its step."""
        return getattr(self.optimizer, "found_inf", None) is not None

    def _kept(self, step: _Step, now: Samples, rewritten: list[bool]) -> Tensor | None:
        """Whether the gradients are those of before the step, or can be brought back: bool (P,); None if all are."""
        look, explained = step.look, set()
        if step.copies is not None:
            return None
        if not step.look.complete:
            return self._kept_by_few(step.look, now)
        if step.grad_scale is None and not any(rewritten) and look.samples.known_same(now):
            return None
        kept = ~look.samples.changed(now)
        parts = [part for call in step.plan.calls for part in call.parts]
        for part, does in zip(parts, rewritten, strict=True):
            if not does:
                continue
            ids = set(map(id, part.params))
            own = [id(p) in ids for p in self.parameters]
            explained |= {i for i, is_own in enumerate(own) if is_own}
            buffers = [
                None if g is None else real(self.optimizer.state[p]["momentum_buffer"] if is_own else g)
                for p, g, is_own in zip(self.parameters, look.gradients, own, strict=True)
            ]
            added = look.places.read(look.places.views(buffers))
            back = same_gradients(look.samples, now, added, step.settings[part.group].values["momentum"])
            mine = torch.tensor(own, dtype=torch.bool, device="cpu").to(kept.device, non_blocking=True)
            kept = torch.where(mine, back, kept)
        if step.grad_scale is not None:  # a fused optimizer takes it out of the gradients itself
            back = same_gradients(look.samples, now, None, 1.0 / step.grad_scale.to(torch.float64))
            made = self._made()
            return back if made is None else back | ~made.to(back.device, non_blocking=True)
        if not explained.issuperset(look.written()):
            self._copies_gradients = True
        return kept

    def _kept_by_few(self, look: GradientSnapshot, now: Samples) -> Tensor | None:
        """The same where the witnesses alone were looked at."""
        written = look.written()
        if not written and look.samples.known_same(now):
            return None
        self._copies_gradients = self._copies_gradients or bool(written)
        home = look.places.home
        flags = torch.ones(len(look.gradients), dtype=torch.bool, device="cpu")
        flags[written] = False
        return flags.to(home, non_blocking=True) & ~look.samples.changed(now).any().to(home, non_blocking=True)

    def _measure(self, rule: OptimizerRule, given: Arguments) -> Tensor:
        sums = _functional.optimizer_stats(
            rule, given.gradients, given.params, given.first, given.second, given.table
        ).sums
        made = self._made()
        if made is not None:  # else the step did nothing, and the state is that of the last one
            moved = sums[:, OF_UPDATE]
            sums[:, OF_UPDATE] = torch.where(made.to(sums.device, non_blocking=True), moved, 0.0)
        return sums

    def _made(self) -> Tensor | None:
        """Whether a fused optimizer made its step, bool (); None if it did."""
        found_inf: Tensor | None = getattr(self.optimizer, "found_inf", None)
        return None if found_inf is None else found_inf.detach().reshape(()) == 0

    def _verify(
        self,
        step: _Step,
        call: Call,
        start: Samples | None,
        now: Samples,
        given: Arguments,
    ) -> Tensor | None:
        """Whether the update is the one that the closed form tells: codes, int64 (n,); None by a snapshot."""
        if start is None:
            return None
        gradient = None
        if call.rule in (OptimizerRule.LINEAR, OptimizerRule.RMSPROP):
            shared = call.shared and step.copies is None and step.look.complete
            gradient = now if shared else call.places.read(call.places.views(given.gradients))
        lists = [given.params]
        if any(part.form is not None and part.form.first is not None for part in call.parts):
            lists.append(given.first)
        if call.rule.states == 2:
            lists.append(given.second)
        after = self._read(call, lists)
        groups = self.optimizer.param_groups
        doubts = [not step.settings[part.group].hold(groups[part.group]) for part in call.parts]
        checked = verify(
            call.rule,
            call.places,
            start,
            after,
            gradient,
            given.table,
            uncertain=given.uncertain,
            made=self._made(),
            doubted=any(doubts),
        )
        if checked is None:
            return None
        good, vague = checked
        code = torch.where(good, decrease_reasons.FINE, decrease_reasons.NOT_THE_UPDATE)
        if vague is not None:
            which = [does for part, does in zip(call.parts, doubts, strict=True) for _ in part.params]
            mask = torch.tensor(which, dtype=torch.bool, device="cpu").to(code.device, non_blocking=True)
            code = torch.where(mask & vague & good, decrease_reasons.SETTINGS, code)
        return code

    def _read(self, call: Call, lists: list[list[Tensor]]) -> Samples:
        """Samples of the parameters, and of the state behind them."""
        views = []
        for number, tensors in enumerate(lists):
            plain = [real(t) for t in tensors] if call.is_complex else tensors
            cache = call.views.setdefault(number, Views())
            views.append(cache.of(call.places, plain))
        return call.places.read(*views)

    def _result(
        self, step: _Step, sums: list[Tensor], codes: list[Tensor | None], kept: Tensor | None
    ) -> MeasuredUpdate:
        calls, count = step.plan.calls, len(step.look.gradients)
        parameters = self.parameters
        home = parameters[0].device if parameters else torch.device("cpu")
        total = self._order([(call.indices, part) for call, part in zip(calls, sums, strict=True)], count, home)
        found = [(call.indices, code) for call, code in zip(calls, codes, strict=True) if code is not None]
        if not found and kept is None:
            if self._fine.shape[0] != total.shape[0] or self._fine.device != total.device:
                self._fine = torch.full(
                    (total.shape[0],), decrease_reasons.FINE, dtype=torch.int64, device=total.device
                )
            return MeasuredUpdate(ParameterStats(total), self._fine, fine=True)
        reason = torch.zeros(count, dtype=torch.int64, device=total.device)
        if found:
            reason = self._order(found, count, home)
        bad = reason != decrease_reasons.FINE
        if kept is None:
            unknown = bad[:, None]
        else:
            kept = kept.to(total.device, non_blocking=True)
            unknown = torch.stack(_unknown(bad, ~kept), dim=1)
            reason = torch.where(bad | kept, reason, decrease_reasons.REWRITTEN)
        total[:, OF_STEP].masked_fill_(unknown, torch.nan)
        return MeasuredUpdate(ParameterStats(total), reason)


def _spoiled(found: MeasuredUpdate, codes: list[int]) -> MeasuredUpdate:
    """What is left of a step that was not verified, where something speaks against it."""
    reason = torch.tensor(codes, dtype=torch.int64, device="cpu").to(found.reason.device, non_blocking=True)
    sums = found.stats.sums
    sums[:, OF_STEP].masked_fill_((reason != decrease_reasons.FINE)[:, None], torch.nan)
    return MeasuredUpdate(
        ParameterStats(sums), torch.where(found.reason == decrease_reasons.FINE, reason, found.reason)
    )


def _unknown(update: Tensor, gradient: Tensor) -> list[Tensor]:
    """Which parameters' sums are unknown, per column of `OF_STEP`: those of an unknown update or gradient."""
    return [
        update | gradient if {"update", "gradient"} <= {*pair} else update if "update" in pair else gradient
        for pair in list(ParameterStats.factors.values())[OF_STEP]
    ]
