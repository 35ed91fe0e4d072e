"""The autograd graph of one forward as integer arrays, taken right after the forward and kept without the graph.

    edge_of(tensor)                         position of a value in the graph; call it in the hook that sees the value
    trace(features, outputs, parameters)    walks the graph once and returns a :class:`Trace`
    signature(features, outputs, ...)       identifies a graph that already has a Trace, without a walk

A Trace holds no node, tensor or closure: a node would keep alive the graph and the tensors saved in it, and a reference
cycle through the autograd engine is never collected. ``fastfs._network.structure.join`` derives the structure of an
optimizer step from the traces of its forwards.

    function  ->  its inputs: (function, output_nr)  ->  ...  ->  AccumulateGrad: a leaf, which may be a parameter
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
"""A value in the graph: the function that computed it (``AccumulateGrad`` for a leaf) and the index of its output."""

Ints = npt.NDArray[np.int64]

_LEAF = "torch::autograd::AccumulateGrad"
_IDENTITY = "RegisterPostBackwardFunctionBackward"  # FSDP2 puts it around all inputs of a module at once
_UNKNOWN = -1  # a visit or output outside of the graph, or a function without a sequence number


@dataclass(frozen=True, eq=False)
class Trace:
    """The graph of one forward, with N functions, E edges and L layers. Arrays are int64 unless stated otherwise.

    Attributes:
        starts: (N + 1,) offsets into ``targets`` at which the inputs of each function begin.
        targets: (E,) functions that computed these inputs.
        output_nrs: (E,) output indices of these functions.
        names: distinct names of the functions.
        kinds: (N,) index into ``names`` of each function.
        parameters: (N,) parameter index of each leaf; -1 for every other node.
        sequence: (N,) sequence number that autograd assigned in the forward, increasing within a thread; -1 for leaves.
        visit_starts: (L + 1,) offsets into ``visits`` at which the visits of each layer begin.
        visits: (V, 2) function and output index of each visit; -1 for a visit outside of the graph.
        outputs: (O, 2) function and output index of each output of the model.
        wide: bool (P,) whether a parameter has two dimensions or more.
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
        """Whether two forwards built the same graph, regardless of when they ran."""
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "sequence")

    def overlaps(self, other: Trace) -> bool:
        """Whether the graphs may share functions because one forward used a result of the other."""
        mine, theirs = self.sequence[self.sequence >= 0], other.sequence[other.sequence >= 0]
        if not len(mine) or not len(theirs) or mine.max() < theirs.min() or theirs.max() < mine.min():
            return False
        return bool(np.isin(mine, theirs).any())


def _same(a: Any, b: Any) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b)


def edge_of(tensor: Tensor) -> Edge | None:
    """Return the position of a tensor in the graph, or None outside of it.

    Call it immediately after the value is computed, because in-place operations change the position.
    """
    if not tensor.requires_grad:
        return None
    function = tensor.grad_fn
    if function is not None:
        return function, tensor.output_nr
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def trace(features: Sequence[Sequence[Edge | None]], outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Trace:
    """Walk the graph once, from the outputs and the features, in time and memory linear in its size.

    Args:
        features: per layer, the visits in order: the result of :func:`edge_of` for each output seen in a forward hook.
        outputs: output tensors of the model, or the loss. Tensors that require no gradient keep their index.
        parameters: parameters that the optimizer updates, or the leaves that replaced them.

    Returns:
        The graph as integer arrays.

    Raises:
        ValueError: A parameter is given twice.
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
    types: dict[type, int] = {}  # kind by Python type, where the type determines it
    find, found = numbers.get, functions.append
    for function in functions:  # the list grows during the walk
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
                while type(below).__name__ == _IDENTITY:
                    below, output_nr = below.next_functions[output_nr]
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
    """Return a hashable summary of a forward's graph, in time linear in the arguments and not in the graph.

    Two forwards with the same graph have the same signature. The signature holds the function behind each visit and
    output, the number of functions that the forward had created up to it, which parameters require a gradient, and
    which inputs have a graph of their own. It therefore changes with every branch of the forward that creates another
    number of functions before a visit or an output.

    Different graphs can share a signature if two branches without a watched layer create equally many functions (two
    experts of the same architecture), if values are combined differently by equally many functions, or if only the
    graph behind the inputs differs. Compare the set of parameters that received a gradient as well to tell experts
    apart. Functions created in other threads are numbered separately, so equal graphs may then have different
    signatures, which costs an extra walk.

    Args:
        features: as for :func:`trace`.
        outputs: as for :func:`trace`.
        parameters: as for :func:`trace`.
        inputs: inputs of the forward. A forward that continues from the result of an earlier one differs from it here.

    Returns:
        A tuple of plain values that can serve as a dictionary key.
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
    """Return the sequence number of a function; leaves have none, because they exist before the forward."""
    number = int(function._sequence_nr())
    return number if number < 1 << 63 else _UNKNOWN


def _where(which: npt.NDArray[np.bool_], numbers: list[int]) -> Ints:
    """Return an array with the numbers at the selected positions and -1 elsewhere."""
    found = np.full(len(which), _UNKNOWN, dtype=np.int64)
    try:
        found[which] = _ints(numbers)
    except OverflowError:  # autograd gives functions that no forward created the largest sequence number
        found[which] = _ints([number if number < 1 << 63 else _UNKNOWN for number in numbers])
    return found


def _edges(edges: Sequence[Edge | None], numbers: dict[Any, int]) -> Ints:
    pairs = [(_UNKNOWN, 0) if edge is None else (numbers[edge[0]], edge[1]) for edge in edges]
    return _ints(pairs).reshape(len(pairs), 2)


def _ints(values: Any) -> Ints:
    return np.asarray(values, dtype=np.int64)
