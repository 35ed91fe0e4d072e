"""What is kept of one forward of the model: its inputs and state, and the rows of every visit of a watched layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from fastfs._monitor.capture.fingerprints import Fingerprint
from fastfs._monitor.capture.sampling import Kept
from fastfs._network.autograd_graph import Edge, Trace
from fastfs._network.state import ForwardState

__all__ = ["Pass", "Visit"]


class Visit:
    """One call of a watched layer: the rows kept of its features, and of the backward vector once it has come.

    ``before`` is None if the features cannot be measured; ``absent`` says why, as a code of
    :data:`fastfs._monitor.row_reasons.REASONS`. If they were in the graph and no gradient ever comes, the
    backward vector is zero.
    """

    __slots__ = ("absent", "backward", "before", "contexts", "inside", "parts", "renewed", "shape")

    def __init__(self, shape: torch.Size, before: Kept | None, inside: bool, absent: int = 0) -> None:
        self.shape = shape
        self.before = before
        self.backward: Tensor | None = None
        self.parts: dict[int, Tensor] = {}  # of the backward vector, by the number of the backward that brought them
        self.inside = inside  # known to be in the autograd graph
        self.absent = absent
        # Of the checkpoints around it, the innermost first; and of that in whose recomputation it was last seen.
        self.contexts: list[weakref.ref[Any]] = []
        self.renewed: weakref.ref[Any] | None = None

    def arrive(self, number: int, rows: Tensor) -> None:
        """A part of the backward vector."""
        self.parts[number] = self.parts[number] + rows if number in self.parts else rows

    def settle(self, counts: Callable[[int], bool]) -> bool:
        """Add up the parts that count; whether there are any."""
        wanted = [rows for number, rows in self.parts.items() if counts(number)]
        self.parts = {}
        for rows in wanted:
            self.backward = rows if self.backward is None else self.backward + rows
        return bool(wanted)

    @property
    def measurable(self) -> bool:
        return self.before is not None and (self.inside or self.backward is not None)


class Pass:
    """One forward of the model with gradient: a micro-batch. Empty until inputs and state are set."""

    def __init__(self, layers: int, turn: int) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.state: ForwardState | None = None
        self.turn = turn  # which step it is of
        self.bytes = 0  # of the memory budget
        self.inputs = 0  # of these, for copies of the inputs
        self.dropped = False  # could not be captured
        self.visits: list[list[Visit]] = [[] for _ in range(layers)]
        # Where the visits stand in the graph, until it is traced; and inputs with their versions, until it is over.
        self.edges: list[list[Edge | None]] = [[] for _ in range(layers)]
        self.inputs_seen: list[tuple[Tensor, int]] = []
        self.has_backward = False
        self.backwards: set[int] = set()  # their numbers
        self.fingerprint: Fingerprint | None = None  # of the parameters, when it began
        self.since = 0  # autograd's sequence number when it began
        # What the structure follows from: the graph, or what tells that it is one that is known already.
        self.trace: Trace | None = None
        self.signature: Hashable = None
        self.reached: dict[int, set[int]] = {}  # outputs that backwards came to, by the number of the backward
        self.outputs: list[int] = []  # of these, those that training's came to
        # Why a second forward would not be this one.
        self.writes_inputs = False
        self.writes_parameters = False
        self.other_weights = False
        self.dependent = False  # its inputs depend on trained parameters
        # A parameter and its gradient as they were when the next pass began: same object later, still accumulating.
        self.witness: tuple[Tensor, weakref.ref[Tensor]] | None = None

    def with_(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: ForwardState) -> Pass:
        """The same visits, for a forward on other inputs and in another state."""
        other = Pass(0, self.turn)
        other.args, other.kwargs, other.state, other.visits = args, kwargs, state, self.visits
        other.writes_inputs = self.writes_inputs
        return other

    def drop(self) -> None:
        """Give up, and give back the memory, also that of copies which the autograd graph keeps alive."""
        self.dropped = True
        self.args, self.kwargs, self.state, self.fingerprint, self.trace = (), {}, None, None, None
        for visit in (visit for visits in self.visits for visit in visits):
            visit.before = visit.backward = None
            visit.parts = {}
        self.visits, self.edges, self.inputs_seen, self.bytes = [], [], [], 0

    def accumulates(self) -> bool:
        """False if the gradient of this pass has been thrown away by ``zero_grad()`` (to None)."""
        if self.witness is None:
            return True
        parameter, gradient = self.witness
        return parameter.grad is not None and parameter.grad is gradient()
