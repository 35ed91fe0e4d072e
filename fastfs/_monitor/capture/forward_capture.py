"""What is kept of one forward of the model: inputs, state, and sampled rows of every call of a watched layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastfs._monitor.capture.fingerprints import Fingerprint
from fastfs._monitor.capture.sampling import KeptRows, SampleSubset
from fastfs._network.autograd_graph import Edge, Trace
from fastfs._network.state import ForwardState

__all__ = ["ForwardCapture", "LayerCall", "scalar_outputs"]


def scalar_outputs(output: Any) -> dict[int, Tensor]:
    """Returns copies of the tensors in a model's output that may be a loss, by their number among the tensors."""
    tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
    return {
        number: x.detach().clone()
        for number, x in enumerate(tensors)
        if type(x) is Tensor and x.layout is torch.strided and x.numel() == 1 and x.is_floating_point()
    }


class LayerCall:
    """One call of a watched layer: sampled rows of its features and, after the backward, of the backward vector.

    If the features were in the autograd graph and no gradient arrives, the backward vector is zero.

    Attributes:
        shape: Shape of the features.
        before: Sampled rows of the features; None if they cannot be measured.
        absent: Why ``before`` is None, as a code of :data:`fastfs._record.row_reasons.REASONS`; else 0.
        backward: The same rows of the backward vector, once :meth:`settle` has added up its parts.
        parts: Parts of the backward vector, by the number of the backward that computed them.
        inside: Whether the features are known to be in the autograd graph.
        contexts: Contexts of the checkpoints around the call, the innermost first.
        placed: What of the features this rank has, see :func:`fastfs._network.placements.placed`.
        placements: Placements of features that are a DTensor, which those of the backward vector have to equal.
        renewed: Context of the checkpoint in whose recomputation the call was last seen.
    """

    __slots__ = (
        "absent",
        "backward",
        "before",
        "contexts",
        "inside",
        "parts",
        "placed",
        "placements",
        "renewed",
        "shape",
    )

    def __init__(
        self,
        shape: torch.Size,
        before: KeptRows | None,
        inside: bool,
        absent: int = 0,
        placed: str | None = None,
        placements: object = None,
    ) -> None:
        self.shape = shape
        self.before = before
        self.backward: Tensor | None = None
        self.parts: dict[int, Tensor] = {}
        self.inside = inside
        self.absent = absent
        self.placed = placed
        self.placements = placements
        self.contexts: list[weakref.ref[Any]] = []
        self.renewed: weakref.ref[Any] | None = None

    def refuse(self, code: int) -> None:
        """Excludes the call from the measurement, for a reason of ``row_reasons``."""
        self.before, self.absent, self.parts = None, code, {}

    def arrive(self, number: int, rows: Tensor) -> None:
        """Adds the part of the backward vector that backward ``number`` has computed."""
        self.parts[number] = self.parts[number] + rows if number in self.parts else rows

    def settle(self, counts: Callable[[int], bool]) -> bool:
        """Adds up the parts whose backward counts; returns whether there are any."""
        wanted = [rows for number, rows in self.parts.items() if counts(number)]
        self.parts = {}
        for rows in wanted:
            self.backward = rows if self.backward is None else self.backward + rows
        return bool(wanted)

    @property
    def measurable(self) -> bool:
        """Whether rows were kept and the loss may depend on them."""
        return self.before is not None and (self.inside or self.backward is not None)


class ForwardCapture:
    """One training forward of the model, i.e. one micro-batch.

    Args:
        layers: Number of watched layers.
        generation: Number of the step that the forward belongs to, as :class:`StepCapture` counts steps.
    """

    def __init__(self, layers: int, generation: int) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.samples: SampleSubset | None = None  # of the batch, which the arguments are cut to; None for all
        self.state: ForwardState | None = None
        self.generation = generation
        self.bytes = 0  # charged to the memory budget
        self.inputs = 0  # of these, bytes for copies of the inputs
        self.dropped = False  # could not be captured
        self.calls: list[list[LayerCall]] = [[] for _ in range(layers)]
        # Position of each call in the graph until it is traced; inputs with their versions until the forward ends.
        self.edges: list[list[Edge | None]] = [[] for _ in range(layers)]
        self.inputs_seen: list[tuple[Tensor, int]] = []
        self.has_backward = False
        self.backwards: set[int] = set()  # numbers of the backwards that reached the forward
        self.fingerprint: Fingerprint | None = None  # of the parameters at the begin of the forward
        self.since = 0  # autograd's sequence number at the begin of the forward
        # The structure follows from the graph, or from the signature of a graph that is cached.
        self.trace: Trace | None = None
        self.signature: Hashable = None
        self.reached: dict[int, set[int]] = {}  # outputs that a backward reached, by the number of the backward
        self.scalars: dict[int, Tensor] = {}  # outputs that may be a loss, by their number
        self.losses: dict[int, tuple[int, Tensor]] = {}  # by backward the first of these it reached, and its gradient
        self.leaves = 0  # inputs that count as parameters, after the parameters
        self.outputs: list[int] = []  # of these, those that a training backward reached
        # Reasons why a second forward would differ from this one.
        self.writes_inputs = False
        self.writes_parameters = False
        self.other_weights = False
        self.dependent = False  # the inputs depend on trained parameters
        # A parameter and its gradient at the begin of the next forward: the same object later means accumulation.
        self.witness: tuple[Tensor, weakref.ref[Tensor]] | None = None

    def reach(self, backward: int, output: int, gradient: Tensor) -> None:
        """Notes that a backward has reached an output, of which it then goes on to others that depend on it."""
        self.reached.setdefault(backward, set()).add(output)
        if output in self.scalars and backward not in self.losses and type(gradient) is Tensor:
            self.losses[backward] = output, gradient.detach().clone()

    def settle(self, counts: Callable[[int], bool]) -> bool:
        """Keeps what backwards that count have brought; returns whether it is a backward vector of any layer."""
        settled = [call.settle(counts) for calls in self.calls for call in calls]
        self.outputs = sorted(set().union(*(found for number, found in self.reached.items() if counts(number))))
        self.losses = {number: found for number, found in self.losses.items() if counts(number)}
        return any(settled)

    def replayed_shape(self, shape: torch.Size) -> torch.Size | None:
        """Returns the shape in a second forward of features that had ``shape`` in the first; None if there is none."""
        return shape if self.samples is None else self.samples.shape(shape)

    def with_(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: ForwardState) -> ForwardCapture:
        """Returns a capture with the same layer calls, for a forward on other inputs and in another state."""
        other = ForwardCapture(0, self.generation)
        other.args, other.kwargs, other.state, other.calls = args, kwargs, state, self.calls
        other.samples, other.writes_inputs = self.samples, self.writes_inputs
        return other

    def drop(self) -> None:
        """Gives the capture up and frees its memory, including copies that the autograd graph keeps alive."""
        self.dropped = True
        self.args, self.kwargs, self.state, self.fingerprint, self.trace = (), {}, None, None, None
        for call in (call for calls in self.calls for call in calls):
            call.before = call.backward = None
            call.parts = {}
        self.calls, self.edges, self.inputs_seen, self.bytes = [], [], [], 0
        self.scalars, self.losses = {}, {}

    def accumulates(self) -> bool:
        """Returns False if ``zero_grad()`` (to None) has discarded the gradient of this forward."""
        if self.witness is None:
            return True
        parameter, gradient = self.witness
        return parameter.grad is not None and parameter.grad is gradient()
