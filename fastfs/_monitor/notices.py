"""The monitor's warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

from fastfs._network.layers import Layer

__all__ = ["IN_GRAPHS", "Notices"]

IN_GRAPHS = "run inside graphs of torch.compile, which can be seen from torch 2.13 on"


class Notices:
    """Warns once for each kind of trouble, and says at which step.

    Args:
        step: Returns the number of the current step.
    """

    def __init__(self, step: Callable[[], int]) -> None:
        self._step = step
        self._given: set[str] = set()

    def warn(self, kind: str, message: str) -> None:
        """Warns, unless there was a warning of this kind."""
        if kind not in self._given:
            self._given.add(kind)
            text = f"fastfs.Monitor: step {self._step()} {message}. Training goes on; said once."
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def hidden(self, layers: Sequence[Layer]) -> None:
        """Warns that layers run in compiled graphs without taps."""
        self.warn(
            "hidden",
            f"has no features of {', '.join(repr(layer.name) for layer in layers[:20])}: they {IN_GRAPHS}; "
            f"this is torch {torch.__version__}",
        )

    def idle(self, layers: Sequence[Layer]) -> None:
        """Warns that layers have not run in any measured step."""
        first = layers[0]
        below = [f"{first.name}.{name}" for name, _ in first.module.named_children()]
        others = f". Below it: {', '.join(below[:20])}" if below else ""
        names = ", ".join(repr(layer.name) for layer in layers[:20])
        self.warn(
            "idle",
            f"has no forward of {names}: the model does not call {'them' if len(layers) > 1 else 'it'} in this step, "
            f"and the rows are empty{others}",
        )

    def unseen(self, dropped_graphs: int) -> None:
        """Warns that no training forward was seen; ``dropped_graphs`` compiled graphs without guards were found."""
        again = (
            "Graphs of torch.compile that know of no hooks were found and dropped: they are made again"
            if dropped_graphs
            else "The model that was given must be the one that the loop calls, with gradient"
        )
        self.warn(
            "unseen",
            "is to be measured, but no forward and backward of the model was seen before it: nothing is recorded. "
            + again,
        )

    def unused(self, backwards: int, optimizer: str) -> None:
        """Warns that backwards were seen, but no step of the optimizer."""
        self.warn(
            "unused",
            f"was never reached: {backwards} backwards of the model were seen, but no step() of {optimizer}. "
            "Give the optimizer whose step() the loop calls",
        )
