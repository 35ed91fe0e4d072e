"""Which parameters lie below each watched feature, and is the feature a cut for them: read off the autograd graph.

The feature speed formula, <b, df> = sum of <g, dw> over the parameters below (section 2 of "The Feature Speed Formula",
arXiv 2311.18718), holds where the feature is a **cut**: every path from these parameters to the output passes through
it, exactly once. The graph of one real forward answers that, whatever the Python code of the model:

    value (function, output_nr)  ->  function  ->  its inputs, again values  ->  ...  ->  AccumulateGrad: a parameter

A feature is a cut for a parameter if its value dominates the parameter, seen from the outputs. On a graph without
cycles the dominator of a node is the lowest common ancestor, in the dominator tree, of all that use it: one sweep.

What the graph cannot show: parameters that change a feature through ``detach()`` or ``no_grad`` and are trained by
another loss, losses that use parameters or inner tensors past the outputs (give the loss itself as the output then),
and functions whose backward is not their derivative. The formula residual shows those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

__all__ = ["DID_NOT_RUN", "Edge", "Structure", "analyse", "edge_of"]

DID_NOT_RUN = "did not run"
"""Reason of a layer that the forward did not call."""

Edge = tuple[Any, int]
"""A value in the graph: the function that made it (``AccumulateGrad`` for a leaf) and which of its outputs it is."""

# Functions that only change the form or the type of a parameter: a parameter is used where these end.
_TRANSPARENT = frozenset(
    f"{name}Backward0"
    for name in (
        "ToCopy T Transpose Permute View UnsafeView Reshape ReshapeAlias Expand Alias Clone Squeeze Unsqueeze Detach"
    ).split()
)
_SHOWN = 3


@dataclass(frozen=True)
class Structure:
    """What :func:`analyse` found, for L layers and P parameters. Holds no part of the graph.

    Attributes:
        upstream: bool (L, P) on the CPU: the feature depends on the parameter.
        own: bool (L, P): upstream of this layer and of no watched layer that comes earlier in the forward.
        cut: (L,) the feature speed formula holds with the sum over ``upstream``. True too if nothing is upstream.
        reason: (L,) why it is no cut, or None.
        unreached: names of parameters from which no path leads to an output. If such a parameter gets a gradient all
            the same, the graph hides it.
        opaque: a watched feature is one of several results of a compiled region, which is a single function in the
            graph: the answer is on the safe side, that is fewer cuts; an eager forward gives the exact one.
        matrices: int64 (L,) on the CPU: how many of the parameters upstream have two dimensions or more.
        shared: bool (L, P) on the CPU: the parameter acts before and after the layer, which is no cut for that reason.
        order: the parameters in the order in which the forward takes them for the last time, unused ones first.
    """

    upstream: Tensor
    own: Tensor
    cut: list[bool]
    reason: list[str | None]
    unreached: list[str]
    opaque: bool
    matrices: Tensor
    shared: Tensor
    order: list[int]

    def same_as(self, other: Structure) -> bool:
        """Whether the same parameters are upstream, and the same layers cuts for the same reasons."""
        return self.reason == other.reason and torch.equal(self.upstream, other.upstream)


def edge_of(tensor: Tensor) -> Edge | None:
    """Where a tensor stands in the graph, or None outside of it. To be asked at once: in-place operations move it."""
    if not tensor.requires_grad:
        return None
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def analyse(
    features: Sequence[Sequence[Edge | None]],
    outputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    names: Sequence[str],
) -> Structure:
    """The structure of one forward. Time and memory are linear in the size of the graph, for layers that run once.

    Args:
        features: for each layer its visits, in order: what :func:`edge_of` gave for the output in a forward hook.
        outputs: the output tensors of the model, or the loss.
        parameters: those that the optimizer updates.
        names: of the parameters.

    Raises:
        ValueError: the numbers of parameters and names differ, or a parameter is given twice.
    """
    if len(names) != len(parameters) or len({id(p) for p in parameters}) != len(parameters):
        raise ValueError(
            f"analyse: expected one name for each of the parameters, all different, got {len(names)} names for "
            f"{len(parameters)} parameters, {len({id(p) for p in parameters})} of them different"
        )
    roots = [edge for edge in map(edge_of, outputs) if edge is not None]
    graph = _Graph(roots, [visit for visits in features for visit in visits if visit is not None], parameters)
    layers = [_Layer(graph, visits, names) for visits in features]

    own = [0] * len(layers)
    earlier = 0
    for index in sorted(range(len(layers)), key=lambda i: layers[i].position):
        own[index] = layers[index].upstream & ~earlier
        earlier |= layers[index].upstream
    upstream = _matrix([layer.upstream for layer in layers], len(parameters))
    wide = torch.tensor([p.dim() > 1 for p in parameters], dtype=torch.bool, device="cpu")
    return Structure(
        upstream=upstream,
        own=_matrix(own, len(parameters)),
        cut=[layer.reason is None for layer in layers],
        reason=[layer.reason for layer in layers],
        unreached=_names(~graph.upstream[graph.root] & ((1 << len(names)) - 1), names),
        opaque=any(graph.opaque(visit) for layer in layers for visit in layer.visits),
        matrices=(upstream & wide).sum(dim=1),
        shared=_matrix([layer.shared for layer in layers], len(parameters)),
        order=_order(graph, len(parameters)),
    )


class _Graph:
    """Values and functions as numbered nodes, with what lies below each and the dominator tree from the outputs.

    Sets of parameters are the bits of Python's integers: a union is one operation.
    """

    def __init__(self, roots: list[Edge], features: list[Edge], parameters: Sequence[Tensor]) -> None:
        self.functions: list[Any] = []  # of each node; keeps them alive, so that identities hold
        self.next: list[list[int]] = []
        self._numbers: dict[tuple[Any, int | None], int] = {}
        self.root = self._add(None, 0)
        for edge in (*roots, *features):
            self._node(*edge)
        self.next[self.root] = [self._numbers[edge] for edge in dict.fromkeys(roots)]
        self._explore()
        self.order = self._topological_order()
        self.position = [0] * len(self.next)
        for position, node in enumerate(self.order):
            self.position[node] = position
        self.users: list[list[int]] = [[] for _ in self.next]
        for node, below in enumerate(self.next):
            for child in below:
                self.users[child].append(node)
        bits = {id(parameter): 1 << index for index, parameter in enumerate(parameters)}
        self.parameter = [self._bit(node, bits) for node in range(len(self.next))]
        self.upstream = list(self.parameter)
        self.hiding = ["Checkpoint" in _name(function) for function in self.functions]
        for node in reversed(self.order):
            for child in self.next[node]:
                self.upstream[node] |= self.upstream[child]
                self.hiding[node] |= self.hiding[child]
        self.dominated, self.reached = self._dominate()

    def node(self, edge: Edge) -> int:
        return self._numbers[edge]

    def opaque(self, node: int) -> bool:
        """Is the value one of several results of a compiled region?"""
        (function,) = self.next[node]
        return "CompiledFunction" in _name(self.functions[node]) and len(self.users[function]) > 1

    def below(self, nodes: Sequence[int], without: frozenset[int] = frozenset()) -> set[int]:
        """All nodes that a path leads to from the given ones, these included, except ``without`` and past them."""
        seen = set(nodes) - without
        stack = list(seen)
        while stack:
            for child in self.next[stack.pop()]:
                if child not in seen and child not in without:
                    seen.add(child)
                    stack.append(child)
        return seen

    def _add(self, function: Any, output_nr: int | None) -> int:
        self._numbers[function, output_nr] = number = len(self.functions)
        self.functions.append(function)
        self.next.append([])
        return number

    def _node(self, function: Any, output_nr: int) -> int:
        """Number of a value; new ones get their function, to be explored, below them."""
        number = self._numbers.get((function, output_nr))
        if number is None:
            number = self._add(function, output_nr)
            made_by = self._numbers.get((function, None))
            self.next[number] = [self._add(function, None) if made_by is None else made_by]
        return number

    def _explore(self) -> None:
        number = 0
        while number < len(self.functions):  # grows while it is walked
            function = self.functions[number]
            if self._numbers.get((function, None)) == number:
                inputs = dict.fromkeys(edge for edge in function.next_functions if edge[0] is not None)
                self.next[number] = [self._node(*edge) for edge in inputs]
            number += 1

    def _topological_order(self) -> list[int]:
        """Every node after all that use it: Kahn's algorithm, outputs first."""
        open_users = [0] * len(self.next)
        for below in self.next:
            for child in below:
                open_users[child] += 1
        order = [node for node, users in enumerate(open_users) if users == 0]
        for node in order:  # grows while it is walked
            for child in self.next[node]:
                open_users[child] -= 1
                if open_users[child] == 0:
                    order.append(child)
        return order

    def _bit(self, node: int, bits: dict[int, int]) -> int:
        variable = getattr(self.functions[node], "variable", None)
        return bits.get(id(variable), 0) if isinstance(variable, Tensor) else 0

    def _dominate(self) -> tuple[list[int], list[bool]]:
        """For each node the parameters that it dominates, and whether an output depends on it.

        ``jump`` holds for each node an ancestor that is far up, so that an ancestor is found in a logarithmic number
        of steps: a recurrent network uses a parameter thousands of times, at all depths.
        """
        parent, jump, depth = ([0] * len(self.next) for _ in range(3))
        reached = [False] * len(self.next)
        reached[self.root] = True

        def common(a: int, b: int) -> int:
            if depth[a] < depth[b]:
                a, b = b, a
            while depth[a] > depth[b]:
                a = jump[a] if depth[jump[a]] >= depth[b] else parent[a]
            while a != b:
                a, b = (jump[a], jump[b]) if jump[a] != jump[b] else (parent[a], parent[b])
            return a

        for node in self.order:
            users = [user for user in self.users[node] if reached[user]]
            if not users:
                continue
            reached[node] = True
            above = users[0]
            for user in users[1:]:
                above = common(above, user)
            parent[node] = above
            depth[node] = depth[above] + 1
            far = jump[above]
            jump[node] = jump[far] if depth[above] - depth[far] == depth[far] - depth[jump[far]] else above
        dominated = list(self.parameter)
        for node in reversed(self.order):
            if reached[node] and node != self.root:
                dominated[parent[node]] |= dominated[node]
        return dominated, reached


class _Layer:
    """What the graph says about one layer."""

    def __init__(self, graph: _Graph, visits: Sequence[Edge | None], names: Sequence[str]) -> None:
        self.visits = [graph.node(visit) for visit in visits if visit is not None]
        self.upstream = self.shared = 0
        for visit in self.visits:
            self.upstream |= graph.upstream[visit]
        # Outputs come first in the graph's order, so the last visit is the one with the smallest position.
        self.position = -min((graph.position[visit] for visit in self.visits), default=len(graph.next))
        self.reason = self._reason(graph, len(visits), names)

    def _reason(self, graph: _Graph, calls: int, names: Sequence[str]) -> str | None:
        if not self.visits:
            return "outside the autograd graph" if calls else DID_NOT_RUN
        if any(graph.hiding[visit] for visit in self.visits):
            return "parameters hidden from the graph (reentrant checkpoint?)"
        if not all(graph.reached[visit] for visit in self.visits):
            return "no output depends on it, or it is a view that was changed in place"
        past = self._past(graph)
        if past is None:
            return "runs several times, one run using the result of another"
        if not past:
            return None
        self.shared = shared = past & self._used_past(graph)
        reasons = []
        if past & ~shared:
            count = (past & ~shared).bit_count()
            plural = "s" if count > 1 else ""
            also = f"{count} parameter{plural} also {'reach' if plural else 'reaches'} the output past it"
            reasons.append(f"inside a residual branch: {also}")
        if shared:
            found = _names(shared, names)
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            reasons.append(f"parameters used before and after it: {', '.join(found[:_SHOWN])}{more}")
        return "; ".join(reasons)

    def _past(self, graph: _Graph) -> int | None:
        """Parameters below that also reach an output past this layer; None if paths pass through it twice."""
        if len(self.visits) == 1:
            return self.upstream & ~graph.dominated[self.visits[0]]
        visits = frozenset(self.visits)
        if len(visits) < len(self.visits):
            return None
        functions = [child for visit in self.visits for child in graph.next[visit]]
        if not visits.isdisjoint(graph.below(functions)):
            return None
        past = 0
        for node in graph.below([graph.root], without=visits):
            past |= graph.parameter[node]
        return past & self.upstream

    def _used_past(self, graph: _Graph) -> int:
        """Parameters with a use of their own past this layer: by a function that this layer does not depend on."""
        below = graph.below(self.visits)
        found = 0
        forms = [node for node in below if graph.parameter[node]]
        seen = set(forms)
        while forms:  # upwards from the parameters through what only changes their form
            node = forms.pop()
            for user in graph.users[node]:
                if user not in below and graph.reached[user] and graph.upstream[node].bit_count() == 1:
                    found |= graph.upstream[node]
                elif user not in seen and (
                    graph.functions[user] is graph.functions[node] or _name(graph.functions[user]) in _TRANSPARENT
                ):
                    seen.add(user)
                    forms.append(user)
        return found


def _order(graph: _Graph, count: int) -> list[int]:
    """Parameters by the number, which autograd counts up in the forward, of the last function that takes them.

    Distances from the outputs would not do: a parametrised matrix is further away than a plain one.
    """
    last = [-1] * count
    for node, bit in enumerate(graph.parameter):
        if bit:
            own, index = graph.functions[node], bit.bit_length() - 1
            takers = {graph.functions[user] for user in graph.users[node]} - {None, own}
            last[index] = max([last[index], *(f._sequence_nr() for f in takers)])
    return sorted(range(count), key=lambda index: last[index])


def _name(function: Any) -> str:
    return "" if function is None else str(function.name())


def _names(bits: int, names: Sequence[str]) -> list[str]:
    return [name for index, name in enumerate(names) if bits >> index & 1]


def _matrix(rows: Sequence[int], columns: int) -> Tensor:
    return torch.tensor([[bits >> i & 1 for i in range(columns)] for bits in rows], dtype=torch.bool).reshape(
        len(rows), columns
    )
