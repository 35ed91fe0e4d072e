"""What a loop did to gradients between ``backward()`` and the optimizer's step: nothing, a factor, or something else.

D_l needs the gradients as ``backward()`` computed them and the update that the optimizer made. In between a loop may
scale gradients (clipping, a gradient scaler). So a few elements of every gradient are copied at the end of each
backward and compared with the gradients that the step is given. Once that has shown one common factor in the last steps
(`full_checks`), a few gradients represent all, as long as identities and versions show that all were treated alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastfs._monitor.capture.backwards import queue_last
from fastfs._monitor.capture.fingerprints import Places, Samples
from fastfs._monitor.capture.taps import EVERYTHING, OFF, Guarded, Switch
from fastfs._monitor.measure.full_checks import FullCheckSchedule
from fastfs._monitor.measure.gradient_snapshots import GradientSampler, GradientSnapshot, same
from fastfs._record import decrease_reasons

__all__ = ["GradientFactor", "Treatment", "one_factor"]

_HOOKED = 2  # vectors, and matrices, that have a hook
_ROUNDINGS = 4.0  # rounding errors of a product by one or two factors, in units of eps
_ALIKE = 1e-3  # relative difference up to which optimizers were given gradients with the same factor
_CANCELLED = 64 * 2.0**-52  # rounding error of a squared distance, relative to the squares that it is computed from


@dataclass
class Treatment:
    """What was done to the gradients of P parameters between backward and step.

    Attributes:
        factor: By what they were multiplied, float64 (P,) on the device, NaN where they were changed otherwise; None if
            the host knows that nothing was done.
        code: Why a factor is not known, int64 (P,): a code of :mod:`fastfs._record.decrease_reasons`; None if
            `factor` is None.
        uniform: Whether all were treated alike, so that a few may represent them; a bool, or bool () on a device.
        common: The one factor of all gradients, float64 () on the device: NaN if they were not multiplied alike, 0 if
            no sample differs from zero; None if nothing was done.
    """

    factor: Tensor | None
    code: Tensor | None
    uniform: Tensor | bool
    common: Tensor | None = None

    @property
    def known(self) -> tuple[Tensor, Tensor] | None:
        """Factor and code, None if nothing was done."""
        return None if self.factor is None or self.code is None else (self.factor, self.code)


class GradientFactor:
    """Finds the factor between the gradients that a step is given and those that ``backward()`` computed.

    Gradients are sampled at the end of each backward. Hooks on a few parameters (the smallest vectors and matrices, the
    first and the last parameter) and :meth:`note` detect that a backward runs.

    Args:
        parameters: Returns the parameters of every optimizer, including those that were added since.
        switch: Nothing is sampled while it is off.
        always: Detect backwards even then, so that steps that a gradient scaler skips are noticed.
        failed: Called with an exception in a hook, which does not reach the training loop.
    """

    def __init__(
        self,
        parameters: Callable[[], Sequence[Sequence[Tensor]]],
        switch: Switch,
        *,
        always: bool,
        failed: Callable[[Exception], None],
    ) -> None:
        self.failed = failed
        self._parameters = parameters
        self._switch = switch
        self._always = always
        self._samplers: list[GradientSampler] = []
        self._schedules: list[FullCheckSchedule] = []
        self.renew()
        self._running: set[int] = set()  # backwards that were noted and are not over: one may run within another
        self._seen = False
        self._clears = 0  # number of calls of clear()
        self._handles: list[RemovableHandle] = []
        self.watch()

    def renew(self) -> None:
        """Begins anew, as if no gradient had been sampled."""
        self._samplers = [GradientSampler() for _ in self._parameters()]
        self._schedules = [FullCheckSchedule() for _ in self._samplers]
        self._ends: list[GradientSnapshot] = []  # at the end of the last backward, by optimizer

    def watch(self) -> None:
        """Hooks a few of the parameters as they are now."""
        self.close()
        own = [p for each in self._parameters() for p in each if p.requires_grad and p.is_leaf]
        small = sorted(own, key=lambda p: p.numel())
        chosen = [p for p in small if p.dim() < 2][:_HOOKED] + [p for p in small if p.dim() > 1][:_HOOKED]
        for p in {id(p): p for p in (*chosen, *own[:1], *own[-1:])}.values():
            self._handles.append(p.register_post_accumulate_grad_hook(Guarded(self._hook, self.failed)))

    # In a backward

    def _hook(self, _parameter: Tensor) -> None:
        self.note()

    def note(self) -> None:
        """Notes that a backward that adds to gradients runs in this thread. To be called from any hook in it."""
        if self._switch.level == OFF and not self._always:
            return
        number = torch._C._current_graph_task_id()
        if number == -1 or number in self._running:
            return
        self._running.add(number)
        self._seen, clears = True, self._clears
        queue_last(functools.partial(self._over, number, clears), self.failed)

    def _over(self, number: int, clears: int) -> None:
        self._running.discard(number)
        # After a clear() the optimizers have stepped within this backward, and there is nothing to compare.
        if clears == self._clears and not self._running and self._switch.level != OFF:
            self._ends = []
            for sampler, each, schedule in zip(self._samplers, self._parameters(), self._schedules, strict=True):
                complete = self._switch.level == EVERYTHING or schedule.due()
                snapshot = sampler.take(each, complete=complete)
                if snapshot.complete:
                    sampler.choose_representatives(snapshot)
                self._ends.append(snapshot)

    # After it

    def begin(self) -> None:
        """Notes that a forward begins outside of a backward: backwards that have not ended until now have failed."""
        self._running.clear()

    @property
    def waiting(self) -> bool:
        """Whether a backward has been seen since :meth:`clear`."""
        return self._seen

    def thrown_away(self) -> bool:
        """Returns whether the gradients of a backward are gone, by ``zero_grad()`` without a step."""
        return self._seen and all(p.grad is None for each in self._parameters() for p in each)

    def written_since_backward(self) -> bool:
        """Returns whether a gradient was replaced or written to since the last backward, and none runs now.

        Only the host is asked, so writes through ``.data`` are not detected. False if no backward was sampled.
        """
        if torch._C._current_graph_task_id() != -1:
            return False
        return not all(end.is_of(each) for end, each in zip(self._ends, self._parameters(), strict=False))

    def nonzero(self) -> Tensor:
        """Returns whether the samples of any gradient are not zero now: bool (), on the first parameter's device."""
        found: list[Tensor] = []
        for sampler, each in zip(self._samplers, self._parameters(), strict=True):
            found += [(flat != 0).any() for flat in sampler.take(each).samples.flats]
        home = next((p.device for each in self._parameters() for p in each), torch.device("cpu"))
        if not found:
            return torch.zeros((), dtype=torch.bool, device=home)
        return torch.stack([x.to(home, non_blocking=True) for x in found]).any()

    def snapshot(self, index: int, parameters: Sequence[Tensor]) -> GradientSnapshot:
        """Takes a snapshot of an optimizer's gradients right before its step, complete or not as after the backward."""
        last = self._ends[index] if self._ends else None
        complete = last is None or last.complete
        return self._samplers[index].take(parameters, keep=True, complete=complete, like=last)

    def record_step(self, index: int, passed: Tensor | bool, *, complete: bool) -> None:
        """Records a step that is over.

        Args:
            index: Of the optimizer.
            passed: Whether the next steps can do without a full check.
            complete: Whether this one was checked in full.
        """
        schedule = self._schedules[index]
        if complete:
            schedule.record_full_check(passed)
        elif passed is False:
            schedule.restart()
        else:
            schedule.record_host_check()
            if passed is not True:
                schedule.record_late_result(passed)

    @torch.no_grad()
    def compare(self, index: int, now: GradientSnapshot) -> Treatment:
        """Returns what was done to the gradients of an optimizer since the backward.

        Args:
            index: Of the optimizer.
            now: Its gradients right before the step.
        """
        count, home = now.places.count, now.places.home
        within = torch._C._current_graph_task_id() != -1  # a step in the backward frees gradients before its end
        if within or not self._ends:
            if within:
                return Treatment(None, None, False)
            return _everywhere(torch.full((), torch.nan, device=home), decrease_reasons.UNSEEN, count, False)
        then = self._ends[index]
        if not then.complete:
            return self._compare_representatives(then, now)
        untouched = all(map(same, then.tensors, now.tensors)) and not then.written()
        if untouched and then.samples.known_same(now.samples):
            return Treatment(None, None, True)
        if then.places is now.places:
            squares = _squares(then.samples, now.samples)
        else:
            # Parameters may have been added since, and other gradients may be there.
            old = then.samples.wide()
            old = torch.nn.functional.pad(old, (0, 0, 0, count - old.shape[0]))
            rows = torch.stack([old.to(home, non_blocking=True), now.samples.wide()], dim=1)
            squares = (rows @ rows.mT).flatten(1)
        found = _factors(squares, _precision(now.places), untouched)
        uniform = found.alike if now.all_written_since(then) is not None else False
        return Treatment(found.factor, found.code, uniform, found.shared)

    def _compare_representatives(self, then: GradientSnapshot, now: GradientSnapshot) -> Treatment:
        """The same for the representatives: one factor for all, or none is known."""
        count, home = now.places.count, now.places.home
        written = None if now.places is not then.places or now.complete else now.all_written_since(then)
        if written is None:
            return _everywhere(torch.full((), torch.nan, device=home), decrease_reasons.CHANGED, count, False)
        if then.samples.known_same(now.samples):
            return Treatment(None, None, True)
        few = then.samples.places
        found = _factors(_squares(then.samples, now.samples), _precision(few), not written)
        common = torch.where(found.alike, found.common, torch.nan)
        uniform: Tensor | bool = bool(found.alike) if found.alike.is_cpu else found.alike
        code = torch.where(
            found.alike,
            decrease_reasons.FINE,
            torch.where(found.empty, decrease_reasons.EMPTY, decrease_reasons.CHANGED),
        )
        return replace(_everywhere(common, code, count, uniform), common=found.shared)

    def clear(self) -> None:
        """Forgets the backwards so far, and releases their gradients."""
        self._seen = False
        self._clears += 1
        self._ends = []
        self._running.clear()
        for sampler in self._samplers:
            sampler.forget()

    def close(self) -> None:
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def one_factor(found: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Returns the factor that the gradients of several steps have in common: float64 () on the device.

    Args:
        found: `Treatment.common` of each.
        device: Of the result.

    Returns:
        The factor, NaN if they differ; 1 if nothing was done.
    """
    given = [each for each in found if each is not None]
    if not given:
        return torch.ones((), dtype=torch.float64, device=device)
    ones = [torch.ones((), dtype=torch.float64, device=device)] * (len(given) < len(found))
    each = torch.stack([*(factor.to(device, torch.float64, non_blocking=True) for factor in given), *ones])
    known = each != 0
    largest, smallest = (torch.where(known, each, sign * torch.inf) for sign in (-1, 1))
    high, low = largest.max(), smallest.min()
    alike = known.any() & ((high - low) <= _ALIKE * high.abs())  # NaN is not alike
    return torch.where(alike, high, torch.nan)


def _squares(then: Samples, now: Samples) -> Tensor:
    """<a, a>, <a, b>, <b, a>, <b, b> of every tensor's samples a before and b after: float64 (P, 4)."""
    places, parts = now.places, []
    for number in range(len(places.blocks)):
        flats = torch.cat([then.flats[number], now.flats[number]])
        rows = places.rows(number, flats).transpose(0, 1)
        parts.append((rows @ rows.mT).flatten(1))
    if not parts:
        return torch.zeros((places.count, 4), dtype=torch.float64, device=places.home)
    return places.gather(parts)


def _everywhere(factor: Tensor, code: int | Tensor, count: int, uniform: Tensor | bool) -> Treatment:
    """The same for all parameters."""
    codes = code if isinstance(code, Tensor) else torch.full((), code, dtype=torch.int64, device=factor.device)
    common = factor.to(torch.float64)
    return Treatment(common.expand(count), codes.expand(count), uniform, common)


@dataclass
class _Factors:
    """Factors of gradients.

    Attributes:
        factor, code: Of every parameter, (P,); see :class:`Treatment`.
        common: Factor of all gradients that are parallel to what they were, ().
        alike: Whether it is the factor of all, ().
        empty: Whether all samples are zero, ().
    """

    factor: Tensor
    code: Tensor
    common: Tensor
    alike: Tensor
    empty: Tensor

    @property
    def shared(self) -> Tensor:
        """The factor of all: NaN if there is none, 0 if all samples are zero, ()."""
        return torch.where(self.empty, 0.0, torch.where(self.alike, self.common, torch.nan))


def _factors(squares: Tensor, precision: tuple[float, float], same: bool) -> _Factors:
    """Returns factors and reasons.

    Args:
        squares: From `_squares`, float64 (P, 4).
        precision: From `_precision`.
        same: Whether no write was detected, so that the factor is 1 where all samples are zero.
    """
    relative, absolute = precision
    before, product, _, now = squares.unbind(dim=1)
    filled = (before > 0) & (now > 0)
    ratio = product / before
    rest = now - ratio * product
    limit = now * relative + absolute
    alone = filled & (rest <= limit)
    # Sums over those that are parallel, so that a parameter that was changed otherwise does not affect the others.
    weights = torch.where(alone[:, None], squares, 0.0).sum(dim=0)
    common = weights[1] / weights[0]
    distance = now - 2.0 * common * product + common.square() * before
    agree = alone & (distance <= limit)
    empty = (before == 0) & (now == 0)
    everyone = (agree | empty).all() & agree.any()
    if same:
        others = torch.where(empty.all(), 1.0, torch.where(everyone, common, torch.nan))
    else:
        others = torch.where(everyone, common, torch.nan)
    factor = torch.where(agree, common, torch.where(alone, ratio, torch.where(empty, others, torch.nan)))
    why = torch.where(empty, decrease_reasons.EMPTY, decrease_reasons.CHANGED)
    return _Factors(factor, torch.where(factor.isnan(), why, decrease_reasons.FINE), common, everyone, empty.all())


def _precision(places: Places) -> tuple[float, float]:
    """Squared relative, and squared absolute, distance that rounding in the least precise dtype explains."""
    infos = [torch.finfo(block.dtype) for block in places.blocks if block.dtype.is_floating_point]
    eps = max((info.eps for info in infos), default=0.0)
    smallest = max((info.smallest_normal * info.eps for info in infos), default=0.0)
    return (_ROUNDINGS * eps) ** 2 + _CANCELLED, 64 * smallest**2
