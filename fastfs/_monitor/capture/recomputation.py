"""Which run of a layer in a recomputation is which one of the forward.

A reentrant checkpoint runs its part of the model without gradients, and again in the backward. A layer may run several
times in one of them, in several of them, and they may be nested. What a run of the forward and its recomputation have
in common is the context of the autograd function around them.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Sequence
from typing import Any

from torch.autograd.function import BackwardCFunction

from fastfs._monitor.capture.passes import Pass, Visit
from fastfs._monitor.row_reasons import UNMATCHED

__all__ = ["Recomputation", "contexts"]

Context = weakref.ref[Any]


def contexts() -> list[Context]:
    """Of the autograd functions whose ``forward`` Python is inside of, up to one whose ``backward`` it is inside of."""
    found: list[Context] = []
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("forward", "backward") and code.co_argcount and code.co_varnames[0] != "self":
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, BackwardCFunction):
                found.append(weakref.ref(context))
                if code.co_name == "backward":
                    break
        frame = frame.f_back
    return found


class Recomputation:
    """A run of a layer in a backward.

    Args:
        passes: in which layers ran without gradients.
        layer: that runs now.
        shape: of its features.
    """

    def __init__(self, passes: Sequence[Pass], layer: int, shape: Sequence[int]) -> None:
        self._contexts = contexts()
        self._waiting = [
            (passed, visit)
            for passed in passes
            for visit in ([] if passed.dropped else passed.visits[layer])
            if not visit.inside and visit.before is not None and visit.shape == shape
        ]

    @property
    def brings_gradients(self) -> bool:
        """Not that of a checkpoint which is not reentrant: that gives saved tensors alone, outside of any function."""
        return bool(self._contexts)

    def counterpart(self) -> tuple[Pass, Visit] | None:
        """The run in the forward that this one repeats; None if that is not known."""
        now = self._now()
        for passed, visit in self._waiting:
            if now is not None and visit.contexts and visit.contexts[0]() is now:
                return passed, visit
        return self._waiting[0] if len(self._waiting) == 1 else None

    def goes_deeper(self) -> None:
        """It is without gradients again, in a checkpoint within the one that is recomputed, which comes later."""
        now = self._now()
        if now is None or len(self._contexts) < 2:
            return
        for _, visit in self._waiting:
            around = [each() for each in visit.contexts]
            if now in around[1:] and (visit.renewed is None or visit.renewed() is not now):
                visit.renewed = self._contexts[-1]
                visit.contexts = self._contexts[:-1] + visit.contexts[around.index(now) :]
                return

    def refuse(self) -> None:
        """Nothing is to be measured of any run that this one could be of."""
        for _, visit in self._waiting:
            visit.before, visit.absent = None, UNMATCHED

    def _now(self) -> Any:
        """The context of the checkpoint that is recomputed."""
        return self._contexts[-1]() if self._contexts else None
