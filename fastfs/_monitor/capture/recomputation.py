"""Matches layer calls in the recomputation of a checkpoint with the layer calls of the forward.

A reentrant checkpoint runs its part of the model without gradient, and again in the backward. A layer may be called
several times in one checkpoint or in several, and checkpoints may be nested. A call in the forward and its
recomputation share the context of the autograd function around them.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Sequence
from typing import Any

from torch.autograd.function import BackwardCFunction

from fastfs._monitor.capture.forward_capture import ForwardCapture, LayerCall
from fastfs._record.row_reasons import UNMATCHED

__all__ = ["Recomputation", "contexts"]

Context = weakref.ref[Any]


def contexts() -> list[Context]:
    """Returns the contexts of autograd functions on the stack: innermost first, up to the first ``backward``."""
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
    """A layer call inside a backward.

    Args:
        forwards: Captures in which layers were called without gradient.
        layer: Index of the layer that is called now.
        shape: Shape of its features.
    """

    def __init__(self, forwards: Sequence[ForwardCapture], layer: int, shape: Sequence[int]) -> None:
        self._contexts = contexts()
        self._waiting = [
            (captured, call)
            for captured in forwards
            for call in ([] if captured.dropped else captured.calls[layer])
            if not call.inside and call.before is not None and call.shape == shape
        ]

    @property
    def brings_gradients(self) -> bool:
        """Whether gradients will arrive at the recomputed features.

        They do not for a non-reentrant checkpoint, which only recomputes saved tensors, outside of any function.
        """
        return bool(self._contexts)

    def counterpart(self) -> tuple[ForwardCapture, LayerCall] | None:
        """Returns the call in the forward that this call repeats, or None if it is ambiguous."""
        now = self._now()
        for captured, call in self._waiting:
            if now is not None and call.contexts and call.contexts[0]() is now:
                return captured, call
        return self._waiting[0] if len(self._waiting) == 1 else None

    def goes_deeper(self) -> None:
        """Notes that the call is in a nested checkpoint, whose own recomputation comes later."""
        now = self._now()
        if now is None or len(self._contexts) < 2:
            return
        for _, call in self._waiting:
            around = [each() for each in call.contexts]
            if now in around[1:] and (call.renewed is None or call.renewed() is not now):
                call.renewed = self._contexts[-1]
                call.contexts = self._contexts[:-1] + call.contexts[around.index(now) :]
                return

    def refuse(self) -> None:
        """Excludes all calls that this one could repeat from the measurement."""
        for _, call in self._waiting:
            call.refuse(UNMATCHED)

    def _now(self) -> Any:
        """Returns the context of the checkpoint that is recomputed."""
        return self._contexts[-1]() if self._contexts else None
