"""What an `UpdateMeter` keeps from before a step until after it, and the checks of the step that need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfs._monitor.capture.fingerprints import Samples, Views, real
from fastfs._monitor.measure.gradient_snapshots import GradientSnapshot
from fastfs._monitor.measure.host_checks import StateBefore
from fastfs._monitor.measure.hyper_parameters import Group, HyperParameters
from fastfs._monitor.measure.kernel_arguments import KernelArguments
from fastfs._monitor.measure.update_plans import Call, Plan
from fastfs._monitor.measure.update_verification import same_gradients, verify
from fastfs._record import decrease_reasons

__all__ = ["StepInProgress", "sample"]


@dataclass
class StepInProgress:
    """A step between `before` and `after`.

    Attributes:
        plan: How it is measured.
        gradients: Gradients that it was given.
        complete: Whether the update is verified by contents.
        hyper_parameters: Of all groups.
        state: Parameters and optimizer state, for the checks on the host.
        starts: For each call samples of its parameters; None where they are not verified.
        gradient_copies: Copies of the gradients; None where they are not copied.
        grad_scale: By what a fused optimizer divides the gradients itself; None for nothing.
    """

    plan: Plan
    gradients: GradientSnapshot
    complete: bool
    hyper_parameters: list[HyperParameters]
    state: StateBefore | None
    starts: list[Samples | None]
    gradient_copies: list[Tensor | None] | None
    grad_scale: Tensor | None

    def preserved_gradients(
        self, optimizer: Any, parameters: Sequence[Tensor], now: Samples, rewritten: Sequence[bool], made: Tensor | None
    ) -> tuple[Tensor | None, bool]:
        """Returns which gradients are those of before the step, or can be restored.

        Args:
            optimizer: The optimizer after its step.
            parameters: All its parameters.
            now: Samples of the gradients after the step.
            rewritten: By part of the calls, see `closed_forms.rewrites_gradients`.
            made: Whether a fused optimizer has made the step, bool (); None if it has.

        Returns:
            Bool (P,), None if all are; and whether gradients have to be copied from the next step on.
        """
        gradients = self.gradients
        if self.gradient_copies is not None:
            return None, False
        if not gradients.complete:
            return self._preserved_by_representatives(now)
        if self.grad_scale is None and not any(rewritten) and gradients.samples.known_same(now):
            return None, False
        preserved = ~gradients.samples.changed(now)
        explained: set[int] = set()
        parts = [part for call in self.plan.calls for part in call.parts]
        for part, rewrote in zip(parts, rewritten, strict=True):
            if not rewrote:
                continue
            ids = set(map(id, part.params))
            own = [id(p) in ids for p in parameters]
            explained |= {i for i, is_own in enumerate(own) if is_own}
            buffers = [
                None if g is None else real(optimizer.state[p]["momentum_buffer"] if is_own else g)
                for p, g, is_own in zip(parameters, gradients.tensors, own, strict=True)
            ]
            added = gradients.places.read(gradients.places.views(buffers))
            momentum = self.hyper_parameters[part.group].values["momentum"]
            restored = same_gradients(gradients.samples, now, added, momentum)
            mask = torch.tensor(own, dtype=torch.bool, device="cpu").to(preserved.device, non_blocking=True)
            preserved = torch.where(mask, restored, preserved)
        if self.grad_scale is not None:
            restored = same_gradients(gradients.samples, now, None, 1.0 / self.grad_scale.to(torch.float64))
            return (
                restored if made is None else restored | ~made.to(restored.device, non_blocking=True),
                False,
            )
        return preserved, not explained.issuperset(gradients.written())

    def _preserved_by_representatives(self, now: Samples) -> tuple[Tensor | None, bool]:
        """The same where only the representatives were sampled."""
        gradients = self.gradients
        written = gradients.written()
        if not written and gradients.samples.known_same(now):
            return None, False
        home = gradients.places.home
        flags = torch.ones(len(gradients.tensors), dtype=torch.bool, device="cpu")
        flags[written] = False
        unchanged = ~gradients.samples.changed(now).any().to(home, non_blocking=True)
        return flags.to(home, non_blocking=True) & unchanged, bool(written)

    def verify(
        self,
        call: Call,
        start: Samples | None,
        now: Samples,
        given: KernelArguments,
        groups: Sequence[Group],
        made: Tensor | None,
    ) -> Tensor | None:
        """Verifies the updates of a call.

        Args:
            call: One of the plan.
            start: Its entry in `starts`.
            now: Samples of the gradients after the step.
            given: The arguments of the call.
            groups: The groups of the optimizer after the step.
            made: Whether a fused optimizer has made the step, bool (); None if it has.

        Returns:
            Codes of :mod:`fastfs._record.decrease_reasons`, int64 (n,); None if the host knows that all
            updates are right, or for a call that is measured from copies.
        """
        if start is None:
            return None
        gradient = None
        if "cg" in call.rule.coefficients:  # the rule reads the gradient
            shared = call.shares_places and self.gradient_copies is None and self.gradients.complete
            gradient = now if shared else call.places.read(call.places.views(given.gradients))
        lists = [given.params]
        if any(part.form is not None and part.form.first is not None for part in call.parts):
            lists.append(given.first)
        if call.rule.states == 2:
            lists.append(given.second)
        doubts = [not self.hyper_parameters[part.group].unchanged(groups[part.group]) for part in call.parts]
        checked = verify(
            call.rule,
            call.places,
            start,
            sample(call, lists),
            gradient,
            given.table,
            uncertainty=given.uncertainty,
            made=made,
            doubted=any(doubts),
        )
        if checked is None:
            return None
        right, vague = checked
        code = torch.where(right, decrease_reasons.FINE, decrease_reasons.NOT_THE_UPDATE)
        if vague is not None:
            which = [doubt for part, doubt in zip(call.parts, doubts, strict=True) for _ in part.params]
            mask = torch.tensor(which, dtype=torch.bool, device="cpu").to(code.device, non_blocking=True)
            code = torch.where(mask & vague & right, decrease_reasons.SETTINGS, code)
        return code


def sample(call: Call, lists: Sequence[list[Tensor]]) -> Samples:
    """Returns samples of the parameters of a call, or of the parameters and their states."""
    views = []
    for number, tensors in enumerate(lists):
        plain = [real(t) for t in tensors] if call.converted else tensors
        cache = call.views.setdefault(number, Views())
        views.append(cache.of(call.places, plain))
    return call.places.read(*views)
