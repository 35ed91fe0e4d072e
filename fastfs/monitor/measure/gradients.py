"""What became of gradients between ``backward()`` and the optimizer's step: nothing, a factor, or something else.

D_l takes the gradients as ``backward()`` computed them and the update that the optimizer made. In between a loop may
scale gradients: clipping, a gradient scaler. So a few elements of every gradient are kept at the end of each backward,
and compared with what the step is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastfs.monitor.capture.taps import OFF, Hook, Switch
from fastfs.monitor.measure import reasons
from fastfs.monitor.measure.fingerprints import KEPT, Places, Samples, real

__all__ = ["GradientFactor", "Gradients", "Look"]

_PLAIN = {Tensor, type(None)}
_WITNESSES = 2  # of each kind
_ROUNDINGS = 4.0  # of an element, in units of eps: what a product by a factor, or two, leaves
_CANCELLED = 64 * 2.0**-52  # of the squares that a squared distance is computed from


@dataclass
class Look:
    """Gradients at a moment: which tensors, and samples of them.

    Attributes:
        gradients: of every parameter, None where there is none.
        versions: of those tensors.
        kinds: dtypes of the dense ones, layouts of others.
        key: the same object as long as parameters, and kinds and shapes of their gradients, are the same.
    """

    gradients: list[Tensor | None]
    versions: list[int]
    kinds: list[torch.dtype | torch.layout | None]
    key: list[object]
    places: Places
    views: list[list[Any]] | None
    samples: Samples

    def again(self) -> Samples:
        """Samples of the same tensors now."""
        assert self.views is not None
        return self.places.read(self.views)

    def written(self) -> list[int]:
        """Indices of the tensors whose version is another one now."""
        pairs = zip(self.gradients, self.versions, strict=True)
        return [i for i, (g, version) in enumerate(pairs) if g is not None and g._version != version]

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these parameters' gradients are the same tensors, not written to since."""
        if len(parameters) != len(self.gradients):
            return False
        for p, gradient, version in zip(parameters, self.gradients, self.versions, strict=True):
            now = p.grad
            if now is not gradient or (now is not None and now._version != version):
                return False
        return True


class Gradients:
    """Looks at the gradients of one optimizer's parameters."""

    def __init__(self) -> None:
        self._key: list[object] = []
        self._places = Places(())
        self._last: tuple[list[Tensor | None], list[int], list[list[Any]]] | None = None

    def look(self, parameters: Sequence[Tensor], *, keep: bool = False) -> Look:
        """The gradients now.

        Args:
            parameters: whose.
            keep: keep what it takes to look at the same tensors again; else only where they are small.
        """
        gradients = [p.grad for p in parameters]
        versions = [0 if g is None else g._version for g in gradients]
        with torch.no_grad():
            kinds = [None if g is None else g.dtype if g.layout is torch.strided else g.layout for g in gradients]
            plain, different = gradients, set(kinds)
            if any(isinstance(kind, torch.layout) for kind in different):
                pairs = zip(kinds, gradients, strict=True)
                plain = [None if isinstance(kind, torch.layout) else g for kind, g in pairs]
            odd = any(isinstance(kind, torch.dtype) and kind.is_complex for kind in different)
            if odd or not _PLAIN.issuperset(map(type, plain)):
                plain = [None if g is None else real(g) for g in plain]
            self._refresh(parameters, plain, kinds)
            pointers = [0 if g is None else g.data_ptr() for g in plain]
            last = self._last
            if last is not None and last[1] == pointers and all(map(_same, last[0], gradients)):
                views = last[2]
            else:
                views = self._places.views(plain)
            kept = keep or self._places.bytes <= KEPT
            self._last = (gradients, pointers, views) if kept else None
            return Look(
                gradients, versions, kinds, self._key, self._places, views if kept else None, self._places.read(views)
            )

    def forget(self) -> None:
        """Let go of the gradients."""
        self._last = None

    def _refresh(self, parameters: Sequence[Tensor], plain: Sequence[Tensor | None], kinds: Sequence[object]) -> None:
        key = [*map(id, parameters), *kinds, *(None if g is None else g.shape for g in plain)]
        key += [p.dtype for p in parameters]
        if key != self._key:
            self._key = key
            self._places = Places([None if g is None else real(p) for p, g in zip(parameters, plain, strict=True)])
            self._last = None


class _Witness(Hook):
    """Tells when a backward has added to a parameter's gradient."""

    def __init__(self, note: Callable[[], None]) -> None:
        self.note = note

    def __call__(self, _parameter: Tensor) -> None:
        self.note()


class GradientFactor:
    """By which factor the gradients that a step is given differ from those that ``backward()`` computed.

    All gradients are looked at when a backward is over. That one runs is told by hooks on a few parameters (the
    smallest vectors and matrices, the first and the last parameter) and by :meth:`note`.

    Args:
        parameters: of every optimizer; asked anew each time, since groups may be added.
        switch: nothing is looked at while it is off.
        always: notice backwards all the same, so that steps that a gradient scaler skips are seen.
    """

    def __init__(self, parameters: Callable[[], Sequence[Sequence[Tensor]]], switch: Switch, *, always: bool) -> None:
        self._parameters = parameters
        self._switch = switch
        self._always = always
        self._gradients = [Gradients() for _ in parameters()]
        self._ends: list[Look] = []  # at the end of the last backward, by optimizer
        self._running: set[int] = set()  # backwards that were noted and are not over: one may run within another
        self._seen = False
        self._turn = 0  # how often everything was forgotten
        self._handles: list[RemovableHandle] = []
        self.watch()

    def watch(self) -> None:
        """Choose witnesses among the parameters as they are now."""
        self.close()
        own = [p for each in self._parameters() for p in each if p.requires_grad and p.is_leaf]
        small = sorted(own, key=lambda p: p.numel())
        chosen = [p for p in small if p.dim() < 2][:_WITNESSES] + [p for p in small if p.dim() > 1][:_WITNESSES]
        for p in {id(p): p for p in (*chosen, *own[:1], *own[-1:])}.values():
            self._handles.append(p.register_post_accumulate_grad_hook(_Witness(self.note)))

    # In a backward

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
        engine.queue_callback(lambda: engine.queue_callback(lambda: self._over(number, turn)))

    def _over(self, number: int, turn: int) -> None:
        self._running.discard(number)
        # If all was forgotten since, the optimizers have stepped within this backward: there is nothing to compare.
        if turn == self._turn and not self._running and self._switch.level != OFF:
            self._ends = [own.look(each) for own, each in zip(self._gradients, self._parameters(), strict=True)]

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

    def look(self, index: int, parameters: Sequence[Tensor]) -> Look:
        """The gradients of an optimizer right before its step."""
        return self._gradients[index].look(parameters, keep=True)

    @torch.no_grad()
    def compare(self, index: int, now: Look) -> tuple[Tensor, Tensor] | None:
        """What was done to the gradients of an optimizer since the backward.

        Returns:
            None if it is known that nothing was done. Else per parameter, on the device: the factor by which they were
            multiplied, float64 (P,), nan where it was something else; and a code of
            :mod:`fastfs.monitor.measure.reasons`, int64 (P,).
        """
        count, home = now.places.count, now.places.home
        within = torch._C._current_graph_task_id() != -1  # gradients go before they can be asked
        if within or not self._ends:
            value, code = (1.0, reasons.FINE) if within else (torch.nan, reasons.UNSEEN)
            factor = torch.full((count,), value, dtype=torch.float64, device=home)
            return factor, torch.full((count,), code, dtype=torch.int64, device=home)
        then = self._ends[index]
        same = all(map(_same, then.gradients, now.gradients)) and not then.written()
        if same and then.samples.known_same(now.samples):
            return None
        if then.places is now.places:
            parts = []
            for number in range(len(now.places.blocks)):
                flats = torch.cat([then.samples.flats[number], now.samples.flats[number]])
                rows = now.places.rows(number, flats).transpose(0, 1)
                parts.append((rows @ rows.mT).flatten(1))
            squares = now.places.gather(parts) if parts else torch.zeros((count, 4), dtype=torch.float64, device=home)
        else:
            # Parameters may have been added since; other gradients may be there.
            old = then.samples.wide()
            old = torch.nn.functional.pad(old, (0, 0, 0, count - old.shape[0]))
            rows = torch.stack([old.to(home, non_blocking=True), now.samples.wide()], dim=1)
            squares = (rows @ rows.mT).flatten(1)
        return _factors(squares, _precision(now.places), same)

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


def _factors(squares: Tensor, precision: tuple[float, float], same: bool) -> tuple[Tensor, Tensor]:
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
    why = torch.where(empty, reasons.EMPTY, reasons.CHANGED)
    return factor, torch.where(factor.isnan(), why, reasons.FINE)


def _precision(places: Places) -> tuple[float, float]:
    """What rounding of the least precise dtype explains."""
    infos = [torch.finfo(block.dtype) for block in places.blocks if block.dtype.is_floating_point]
    eps = max((info.eps for info in infos), default=0.0)
    smallest = max((info.smallest_normal * info.eps for info in infos), default=0.0)
    return (_ROUNDINGS * eps) ** 2 + _CANCELLED, 64 * smallest**2


def _same(a: object, b: object) -> bool:
    return a is b
