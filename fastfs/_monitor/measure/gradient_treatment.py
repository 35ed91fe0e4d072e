"""What became of gradients between ``backward()`` and the optimizer's step: nothing, a factor, or something else.

D_l takes the gradients as ``backward()`` computed them and the update that the optimizer made. In between a loop may
scale gradients: clipping, a gradient scaler. So a few elements of every gradient are kept at the end of each backward,
and compared with what the step is given. Where that has shown one common factor in the last steps (`occasions`), a few
gradients, the witnesses, stand for all, as long as identities and versions say that all were treated in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastfs._monitor.capture.fingerprints import Places, Samples
from fastfs._monitor.capture.taps import EVERYTHING, OFF, Guarded, Switch
from fastfs._monitor.measure import decrease_reasons
from fastfs._monitor.measure.full_checks import Occasions
from fastfs._monitor.measure.gradient_snapshots import Gradients, GradientSnapshot, same

__all__ = ["GradientFactor", "Treatment"]

_WITNESSES = 2  # of each kind
_ROUNDINGS = 4.0  # of an element, in units of eps: what a product by a factor, or two, leaves
_CANCELLED = 64 * 2.0**-52  # of the squares that a squared distance is computed from


@dataclass
class Treatment:
    """What was done to the gradients of P parameters between backward and step.

    Attributes:
        factor: by which they were multiplied, float64 (P,) on the device, nan where it was something else; None if it
            is known that nothing was done.
        code: of :mod:`fastfs._monitor.measure.decrease_reasons`, int64 (P,); None with the factor.
        good: whether all were treated alike, so that witnesses may stand for them; bool () on a device.
    """

    factor: Tensor | None
    code: Tensor | None
    good: Tensor | bool

    @property
    def known(self) -> tuple[Tensor, Tensor] | None:
        """Factor and code, if anything was done."""
        return None if self.factor is None or self.code is None else (self.factor, self.code)


class GradientFactor:
    """By which factor the gradients that a step is given differ from those that ``backward()`` computed.

    All gradients are looked at when a backward is over. That one runs is told by hooks on a few parameters (the
    smallest vectors and matrices, the first and the last parameter) and by :meth:`note`.

    Args:
        parameters: of every optimizer; asked anew each time, since groups may be added.
        switch: nothing is looked at while it is off.
        always: notice backwards all the same, so that steps that a gradient scaler skips are seen.
        failed: called with an exception in a hook; it does not reach the training loop.
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
        self._gradients: list[Gradients] = []
        self._occasions: list[Occasions] = []
        self.renew()
        self._running: set[int] = set()  # backwards that were noted and are not over: one may run within another
        self._seen = False
        self._turn = 0  # how often everything was forgotten
        self._handles: list[RemovableHandle] = []
        self.watch()

    def renew(self) -> None:
        """Begin anew, as if no gradient had been looked at."""
        self._gradients = [Gradients() for _ in self._parameters()]
        self._occasions = [Occasions() for _ in self._gradients]
        self._ends: list[GradientSnapshot] = []  # at the end of the last backward, by optimizer

    def watch(self) -> None:
        """Choose witnesses among the parameters as they are now."""
        self.close()
        own = [p for each in self._parameters() for p in each if p.requires_grad and p.is_leaf]
        small = sorted(own, key=lambda p: p.numel())
        chosen = [p for p in small if p.dim() < 2][:_WITNESSES] + [p for p in small if p.dim() > 1][:_WITNESSES]
        for p in {id(p): p for p in (*chosen, *own[:1], *own[-1:])}.values():
            self._handles.append(p.register_post_accumulate_grad_hook(Guarded(self._witness, self.failed)))

    # In a backward

    def _witness(self, _parameter: Tensor) -> None:
        self.note()

    def note(self) -> None:
        """A backward that adds to gradients is running in this thread. To be called from any hook in it."""
        if self._switch.level == OFF and not self._always:
            return
        number = torch._C._current_graph_task_id()
        if number == -1 or number in self._running:
            return
        self._running.add(number)
        self._seen, turn = True, self._turn
        engine = torch.autograd.Variable._execution_engine
        # Queued again from the queue: behind what others, like DistributedDataParallel, queue in this backward.
        over = Guarded(functools.partial(self._over, number, turn), self.failed)
        engine.queue_callback(Guarded(lambda: engine.queue_callback(over), self.failed))

    def _over(self, number: int, turn: int) -> None:
        self._running.discard(number)
        # If all was forgotten since, the optimizers have stepped within this backward: there is nothing to compare.
        if turn == self._turn and not self._running and self._switch.level != OFF:
            self._ends = []
            for own, each, occasions in zip(self._gradients, self._parameters(), self._occasions, strict=True):
                complete = self._switch.level == EVERYTHING or occasions.due()
                look = own.look(each, complete=complete)
                if look.complete:
                    own.choose(look)
                self._ends.append(look)

    # After it

    def begin(self) -> None:
        """A forward begins outside of a backward: what has not ended until now has failed."""
        self._running.clear()

    @property
    def waiting(self) -> bool:
        """Whether a backward has been seen since :meth:`clear`."""
        return self._seen

    def thrown_away(self) -> bool:
        """Whether a backward was seen whose gradients are gone: ``zero_grad()`` without a step."""
        return self._seen and all(p.grad is None for each in self._parameters() for p in each)

    def written_since_backward(self) -> bool:
        """Whether a gradient is another tensor, or was written to, since the last backward, and none runs now.

        Asked of the host alone, so what was written through ``.data`` is not seen. False if no backward was looked at.
        """
        if torch._C._current_graph_task_id() != -1:
            return False
        return not all(look.is_of(each) for look, each in zip(self._ends, self._parameters(), strict=False))

    def nonzero(self) -> Tensor:
        """Whether any gradient is not zero now, by its samples: bool (), on the device of the first parameter."""
        found: list[Tensor] = []
        for own, each in zip(self._gradients, self._parameters(), strict=True):
            found += [(flat != 0).any() for flat in own.look(each).samples.flats]
        home = next((p.device for each in self._parameters() for p in each), torch.device("cpu"))
        if not found:
            return torch.zeros((), dtype=torch.bool, device=home)
        return torch.stack([x.to(home, non_blocking=True) for x in found]).any()

    def look(self, index: int, parameters: Sequence[Tensor], *, complete: bool = False) -> GradientSnapshot:
        """The gradients of an optimizer right before its step: all, or the witnesses if those were looked at before."""
        last = self._ends[index] if self._ends else None
        complete = complete or last is None or last.complete
        return self._gradients[index].look(parameters, keep=True, complete=complete, like=last)

    def judged(self, index: int, good: Tensor | bool, *, complete: bool) -> None:
        """A step is over: whether the next ones may rely on it, and whether it was looked at in full itself."""
        occasions = self._occasions[index]
        if complete:
            occasions.looked(good)
        elif good is False:
            occasions.again()
        else:
            occasions.relied()
            if good is not True:
                occasions.told(good)

    @torch.no_grad()
    def compare(self, index: int, now: GradientSnapshot) -> Treatment:
        """What was done to the gradients of an optimizer since the backward."""
        count, home = now.places.count, now.places.home
        within = torch._C._current_graph_task_id() != -1  # gradients go before they can be asked
        if within or not self._ends:
            if within:
                return Treatment(None, None, False)
            return _everywhere(torch.full((), torch.nan, device=home), decrease_reasons.UNSEEN, count, False)
        then = self._ends[index]
        if not then.complete:
            return self._by_witnesses(then, now)
        untouched = all(map(same, then.gradients, now.gradients)) and not then.written()
        if untouched and then.samples.known_same(now.samples):
            return Treatment(None, None, True)
        if then.places is now.places:
            squares = _squares(then.samples, now.samples)
        else:
            # Parameters may have been added since; other gradients may be there.
            old = then.samples.wide()
            old = torch.nn.functional.pad(old, (0, 0, 0, count - old.shape[0]))
            rows = torch.stack([old.to(home, non_blocking=True), now.samples.wide()], dim=1)
            squares = (rows @ rows.mT).flatten(1)
        found = _factors(squares, _precision(now.places), untouched)
        return Treatment(found.factor, found.code, found.alike if now.treated(then) is not None else False)

    def _by_witnesses(self, then: GradientSnapshot, now: GradientSnapshot) -> Treatment:
        """One factor for all, or nothing is known."""
        count, home = now.places.count, now.places.home
        treated = None if now.places is not then.places or now.complete else now.treated(then)
        if treated is None:
            return _everywhere(torch.full((), torch.nan, device=home), decrease_reasons.CHANGED, count, False)
        if then.samples.known_same(now.samples):
            return Treatment(None, None, True)
        few = then.samples.places
        found = _factors(_squares(then.samples, now.samples), _precision(few), not treated)
        common = torch.where(found.alike, found.common, torch.nan)
        good: Tensor | bool = bool(found.alike) if found.alike.is_cpu else found.alike
        code = torch.where(
            found.alike,
            decrease_reasons.FINE,
            torch.where(found.empty, decrease_reasons.EMPTY, decrease_reasons.CHANGED),
        )
        return _everywhere(common, code, count, good)

    def clear(self) -> None:
        """Forget the backwards so far, and let go of their gradients."""
        self._seen = False
        self._turn += 1
        self._ends = []
        self._running.clear()
        for own in self._gradients:
            own.forget()

    def close(self) -> None:
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _squares(then: Samples, now: Samples) -> Tensor:
    """<a, a>, <a, b>, <b, a>, <b, b> of every tensor's samples before and after: float64 (P, 4)."""
    places, parts = now.places, []
    for number in range(len(places.blocks)):
        flats = torch.cat([then.flats[number], now.flats[number]])
        rows = places.rows(number, flats).transpose(0, 1)
        parts.append((rows @ rows.mT).flatten(1))
    if not parts:
        return torch.zeros((places.count, 4), dtype=torch.float64, device=places.home)
    return places.gather(parts)


def _everywhere(factor: Tensor, code: int | Tensor, count: int, good: Tensor | bool) -> Treatment:
    codes = code if isinstance(code, Tensor) else torch.full((), code, dtype=torch.int64, device=factor.device)
    return Treatment(factor.to(torch.float64).expand(count), codes.expand(count), good)


@dataclass
class _Factors:
    """Of every parameter, (P,); and of all together, ().

    Attributes:
        common: factor of those that are parallel to what they were.
        alike: whether it is the factor of all.
        empty: whether everything is zero.
    """

    factor: Tensor
    code: Tensor
    common: Tensor
    alike: Tensor
    empty: Tensor


def _factors(squares: Tensor, precision: tuple[float, float], same: bool) -> _Factors:
    """Factors and reasons from <a, a>, <a, b>, <b, a>, <b, b> of every parameter's samples before and after.

    Args:
        squares: float64 (P, 4).
        precision: squared relative distance that rounding explains, and squared absolute distance.
        same: no write has been seen: where everything is zero, the factor is 1.
    """
    relative, absolute = precision
    before, product, _, now = squares.unbind(dim=1)
    filled = (before > 0) & (now > 0)
    ratio = product / before
    rest = now - ratio * product
    limit = now * relative + absolute
    alone = filled & (rest <= limit)
    # Sums over those that are parallel: one parameter of another kind is not to spoil the factor of the others.
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
    """What rounding of the least precise dtype explains."""
    infos = [torch.finfo(block.dtype) for block in places.blocks if block.dtype.is_floating_point]
    eps = max((info.eps for info in infos), default=0.0)
    smallest = max((info.smallest_normal * info.eps for info in infos), default=0.0)
    return (_ROUNDINGS * eps) ** 2 + _CANCELLED, 64 * smallest**2
