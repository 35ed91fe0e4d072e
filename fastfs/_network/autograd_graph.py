"""The autograd graph of one forward, as numbers: taken right after the forward, kept without the graph.

    edge_of(tensor)                         where a value stands in the graph: asked in the hook that sees the value
    trace(features, outputs, parameters)    one walk over the graph: a :class:`Trace`
    signature(features, outputs, ...)       whether a graph is the one that a Trace is known of, without a walk

A Trace refers to no node, tensor or closure: a node would keep alive the graph and what it has saved, and a cycle
through the autograd engine is never collected. ``fastfs._network.structure.join`` makes the structure of an optimizer
step out of the traces of its forwards.

    function  ->  its inputs: (function, output_nr)  ->  ...  ->  AccumulateGrad: a leaf, which is a parameter or not
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

__all__ = ["Edge", "Ints", "Trace", "edge_of", "signature", "trace"]

Edge = tuple[Any, int]
"""A value in the graph: the function that made it (``AccumulateGrad`` for a leaf) and which of its outputs it is."""

Ints = npt.NDArray[np.int64]

_LEAF = "torch::autograd::AccumulateGrad"
_UNKNOWN = -1  # for a visit or output outside of the graph, a function that takes no part in the numbering


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward's graph: N functions, E edges, L layers. Arrays are int64 unless said otherwise.

    Attributes:
        starts: (N + 1,) where the inputs of each function begin in ``targets``.
        targets: (E,) the functions that made these inputs.
        output_nrs: (E,) which of their outputs.
        names: of the kinds of functions, each once.
        kinds: (N,) the name of each function, as an index into ``names``.
        parameters: (N,) which parameter a leaf is; -1 for all else.
        sequence: (N,) the number that autograd gave the function in the forward, rising within a thread; -1 for leaves.
        visit_starts: (L + 1,) where the visits of each layer begin.
        visits: (V, 2) function and output of each visit; -1 for a visit outside of the graph.
        outputs: (O, 2) the same for the outputs.
        wide: bool (P,) parameters with two dimensions or more.
    """

    starts: Ints
    targets: Ints
    output_nrs: Ints
    names: tuple[str, ...]
    kinds: Ints
    parameters: Ints
    sequence: Ints
    visit_starts: Ints
    visits: Ints
    outputs: Ints
    wide: npt.NDArray[np.bool_]

    @property
    def layers(self) -> int:
        return len(self.visit_starts) - 1

    def same_as(self, other: Trace) -> bool:
        """Whether two forwards have built the same graph, whenever they have."""
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "sequence")

    def overlaps(self, other: Trace) -> bool:
        """Whether both may have functions in common: one forward used a result of the other."""
        mine, theirs = self.sequence[self.sequence >= 0], other.sequence[other.sequence >= 0]
        if not len(mine) or not len(theirs) or mine.max() < theirs.min() or theirs.max() < mine.min():
            return False
        return bool(np.isin(mine, theirs).any())


def _same(a: Any, b: Any) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b)


def edge_of(tensor: Tensor) -> Edge | None:
    """Where a tensor stands in the graph, or None outside of it. To be asked at once: in-place operations move it."""
    if not tensor.requires_grad:
        return None
    function = tensor.grad_fn
    if function is not None:
        return function, tensor.output_nr
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def trace(features: Sequence[Sequence[Edge | None]], outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Trace:
    """Walk the graph once, from the outputs and the features. Time and memory are linear in its size.

    Args:
        features: for each layer its visits, in order: what :func:`edge_of` gave for the output in a forward hook.
        outputs: the output tensors of the model, or the loss; any without gradient keep their place.
        parameters: those that the optimizer updates, or the leaves that stood for them.

    Raises:
        ValueError: a parameter is given twice.
    """
    indices = {id(parameter): index for index, parameter in enumerate(parameters)}
    if len(indices) != len(parameters):
        raise ValueError(
            f"trace: expected different parameters, got {len(parameters)}, {len(indices)} of them different"
        )
    visits = [visit for layer in features for visit in layer]
    ends = [edge_of(output) for output in outputs]
    functions: list[Any] = []
    numbers: dict[Any, int] = {}
    for edge in (*ends, *visits):
        if edge is not None and edge[0] not in numbers:
            numbers[edge[0]] = len(functions)
            functions.append(edge[0])

    starts, targets, others, kinds, leaves, sequence = [0], list[int](), list[tuple[int, int]](), list[int](), [], []
    names: dict[str, int] = {_LEAF: 0}
    types: dict[type, int] = {}  # the kind, where the type of a function tells it
    find, found = numbers.get, functions.append
    for function in functions:  # grows while it is walked
        kind = types.get(type(function))
        if kind is None:
            name = str(function.name())
            kind = names.setdefault(name, len(names))
            if not kind or type(function).__name__ == name:
                types[type(function)] = kind
        kinds.append(kind)
        if kind:
            sequence.append(function._sequence_nr())
            for below, output_nr in function.next_functions:
                if below is not None:
                    number = find(below)
                    if number is None:
                        number = numbers[below] = len(numbers)
                        found(below)
                    if output_nr:
                        others.append((len(targets), output_nr))
                    targets.append(number)
        else:
            leaves.append(indices.get(id(function.variable), _UNKNOWN))
        starts.append(len(targets))
    leaf = np.asarray(kinds, dtype=np.int64) == 0
    output_nrs = np.zeros(len(targets), dtype=np.int64)
    if others:
        which, numbered = zip(*others, strict=True)
        output_nrs[list(which)] = numbered
    return Trace(
        starts=_ints(starts),
        targets=_ints(targets),
        output_nrs=output_nrs,
        names=tuple(names),
        kinds=_ints(kinds),
        parameters=_where(leaf, leaves),
        sequence=_where(~leaf, sequence),
        visit_starts=_ints(np.cumsum([0, *map(len, features)])),
        visits=_edges(visits, numbers),
        outputs=_edges(ends, numbers),
        wide=np.fromiter((p.dim() > 1 for p in parameters), dtype=np.bool_, count=len(parameters)),
    )


def signature(
    features: Sequence[Sequence[Edge | None]],
    outputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    inputs: Sequence[Tensor] = (),
) -> tuple[Any, ...]:
    """A hashable summary of a forward's graph. Time is linear in what is given here, whatever lies between.

    Two forwards of the same graph have the same signature. It holds the function that made each visit and each output,
    how many functions the forward had made by then, which parameters require a gradient, and which inputs have a graph
    of their own. So it changes with every branch of the forward that makes another number of functions before a visit
    or an output.

    What it can miss: two branches without a watched layer that make as many functions, as of two experts of the same
    form; values that are combined in another way by as many functions; another graph behind the inputs. Compare the set
    of parameters that got a gradient as well: it tells the experts apart. Functions made in other threads have numbers
    of their own; then the signatures of the same graph may differ, which costs a walk and nothing else.

    Args:
        features: as for :func:`trace`.
        outputs: as for :func:`trace`.
        parameters: as for :func:`trace`.
        inputs: of the forward: one that goes on from a result of an earlier forward is not the same as the first one.
    """
    edges = [edge for visits in features for edge in visits]
    edges += [edge_of(output) for output in outputs]
    made = [_UNKNOWN if edge is None else _made(edge[0]) for edge in edges]
    first = min((number for number in made if number >= 0), default=0)
    return (
        tuple(map(len, features)),
        tuple(
            None if edge is None else (edge[0].name(), edge[1], number - first if number >= 0 else _UNKNOWN)
            for edge, number in zip(edges, made, strict=True)
        ),
        bytes([parameter.requires_grad for parameter in parameters]),
        tuple(None if x.grad_fn is None else x.grad_fn.name() for x in inputs),
    )


def _made(function: Any) -> int:
    """The number of a function in the order of the forward; leaves, which are made before it, have none."""
    number = int(function._sequence_nr())
    return number if number < 1 << 63 else _UNKNOWN


def _where(which: npt.NDArray[np.bool_], numbers: list[int]) -> Ints:
    """The numbers in these places, -1 elsewhere."""
    found = np.full(len(which), _UNKNOWN, dtype=np.int64)
    try:
        found[which] = _ints(numbers)
    except OverflowError:  # of a function that was not made by a forward: autograd gives it the highest number there is
        found[which] = _ints([number if number < 1 << 63 else _UNKNOWN for number in numbers])
    return found


def _edges(edges: Sequence[Edge | None], numbers: dict[Any, int]) -> Ints:
    pairs = [(_UNKNOWN, 0) if edge is None else (numbers[edge[0]], edge[1]) for edge in edges]
    return _ints(pairs).reshape(len(pairs), 2)


def _ints(values: Any) -> Ints:
    return np.asarray(values, dtype=np.int64)
