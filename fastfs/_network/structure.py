"""Find the parameters below each watched feature, and whether the feature is a cut for them, from the autograd graph.

The feature speed formula, <b, df> = sum of <g, dw> over the parameters below (section 2 of "The Feature Speed Formula",
arXiv 2311.18718), holds if the feature is a **cut**: every path from these parameters to the loss passes through it
exactly once. The autograd graphs of the forwards show this, independently of the Python code of the model:

    trace(features, outputs, parameters) -> Trace        after each forward: one walk (see autograd_graph.py)
    join([(trace, outputs), ...], names) -> Structure    of one optimizer step, from all its forwards
    analyse(features, outputs, parameters, names)        both, where a step is one forward

``join`` receives the outputs of each forward that the loss depends on: an output that the training loop discards does
not bypass a layer. The visits of a layer are those in all forwards, and the forwards share parameters. If a step trains
two heads, the trunk is therefore a cut and each head is not: the trunk also reaches the loss through the other head.

A feature is a cut for a parameter if its node dominates the parameter, seen from the loss. The parameters below each
feature are stored as intervals (:mod:`fastfs._network.parameter_sets`), so that time and memory are linear in the size
of the graph, except for layers that run several times and parameters with several uses, which take one bit per node and
layer.

The graph does not show parameters that change a feature through ``detach()`` or ``no_grad`` and are trained by another
loss, losses that use parameters or inner tensors besides the outputs (pass the loss itself as the output), and
functions whose backward is not their derivative. The residual of the formula reveals these.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfs._network.autograd_graph import Edge, Ints, Trace, edge_of, signature, trace
from fastfs._network.bypass import Bypass, LayerNodes, find_bypasses
from fastfs._network.joined_graph import COMPILED, JoinedGraph, TracedForward
from fastfs._network.parameter_sets import EMPTY, Intervals, ParameterSets, intervals_of, union

__all__ = ["DID_NOT_RUN", "Edge", "Structure", "Trace", "analyse", "edge_of", "join", "signature", "trace"]

DID_NOT_RUN = "did not run"
"""Reason for a layer that the forward did not call."""

_OUTSIDE = "outside the autograd graph"
_HIDDEN = "parameters hidden from the graph (reentrant checkpoint?)"
_UNUSED = "no output depends on it, or it is a view that was changed in place"
_NESTED = "runs several times, one run using the result of another"


@dataclass(frozen=True, eq=False)
class Structure:
    """The result of :func:`join` for L layers and P parameters. Holds no part of the graph.

    Attributes:
        upstream_sets: parameters that the feature depends on. Empty if a checkpoint hides parameters from the graph.
        own_sets: parameters upstream of this layer and of no watched layer that comes earlier in the forward.
        cut: (L,) whether the feature speed formula holds with the sum over ``upstream``; true if nothing is upstream.
        reason: (L,) why the layer is not a cut, or None.
        unreached: names of parameters without a path to an output. If such a parameter nevertheless gets a gradient,
            the graph hides it.
        opaque: whether a watched feature is one of several results of a compiled region, which is a single function in
            the graph. The result is then conservative, with fewer cuts; an eager forward gives the exact one.
        products: int64 (L,) on the CPU: the number of upstream parameters with two dimensions or more or, if larger,
            the number of consecutive uses of such parameters on the way to the layer's last visit.
        order: the parameters in the order in which the forward last uses them, unused ones first.
        bypass: parameters that reach the loss without passing through each layer.
    """

    upstream_sets: ParameterSets
    own_sets: ParameterSets
    cut: list[bool]
    reason: list[str | None]
    unreached: list[str]
    opaque: bool
    products: Tensor
    order: list[int]
    bypass: Bypass = field(repr=False)

    @property
    def counts(self) -> list[int]:
        """(L,) number of upstream parameters."""
        found: list[int] = self.upstream_sets.counts().tolist()
        return found

    @functools.cached_property
    def upstream(self) -> Tensor:
        """``upstream_sets`` as bool (L, P) on the CPU, computed lazily because its size is quadratic in the depth."""
        return self.upstream_sets.dense()

    @functools.cached_property
    def own(self) -> Tensor:
        """``own_sets`` as bool (L, P) on the CPU."""
        return self.own_sets.dense()

    @functools.cached_property
    def shared(self) -> Tensor:
        """Whether, as bool (L, P) on the CPU, a parameter is used before and after the layer, which is then no cut."""
        return self.bypass.shared(len(self.cut), self.upstream_sets.columns)

    def same_as(self, other: Structure) -> bool:
        """Whether upstream parameters, cuts and reasons are equal."""
        return self.reason == other.reason and self.upstream_sets.same_as(other.upstream_sets)


def analyse(
    features: Sequence[Sequence[Edge | None]],
    outputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    names: Sequence[str],
) -> Structure:
    """Return the structure of one forward if the loss depends on all of its outputs.

    Args:
        features: per layer, the visits in order: the result of :func:`edge_of` for each output seen in a forward hook.
        outputs: output tensors of the model, or the loss.
        parameters: parameters that the optimizer updates.
        names: names of the parameters.

    Returns:
        The structure.

    Raises:
        ValueError: the numbers of parameters and names differ, or a parameter is given twice.
    """
    if len(names) != len(parameters) or len({id(p) for p in parameters}) != len(parameters):
        raise ValueError(
            f"analyse: expected one name for each of the parameters, all different, got {len(names)} names for "
            f"{len(parameters)} parameters, {len({id(p) for p in parameters})} of them different"
        )
    return join([(trace(features, outputs, parameters), range(len(outputs)))], names)


def join(traces: Sequence[TracedForward], names: Sequence[str]) -> Structure:
    """Return the structure of one optimizer step from all forwards that contribute to its gradients.

    Args:
        traces: per forward, in order, its trace and the indices of the outputs that the loss depends on.
        names: names of the parameters, in the order used for the traces.

    Returns:
        The structure.

    Raises:
        ValueError: there is no trace, the traces differ in their numbers of layers or parameters, or an output index is
            out of range.
    """
    _check(traces, names)
    steps = _distinct(traces)
    graph = JoinedGraph(steps, len(names))
    layers = [_watched(graph, index, visits) for index, visits in enumerate(graph.visits)]
    upstream = ParameterSets.of(graph.numbering, [layer.upstream for layer in layers])
    reached = np.frombuffer(graph.reached, dtype=np.uint8, count=len(names)).astype(np.int64)
    bypass = find_bypasses(graph, layers, upstream.total(reached).tolist(), _elsewhere(graph, layers, upstream))
    hiding = graph.hiding()
    reasons = [_reason(layer, graph, hiding, bypass, names) for layer in layers]
    if _HIDDEN in reasons:  # the graph lacks some upstream parameters, and the rest must not pass for all of them
        shown = [EMPTY if why is _HIDDEN else layer.upstream for layer, why in zip(layers, reasons, strict=True)]
        upstream = ParameterSets.of(graph.numbering, shown)
    return Structure(
        upstream_sets=upstream,
        own_sets=ParameterSets.of(graph.numbering, _own(layers, len(names), len(steps) > 1)),
        cut=[reason is None for reason in reasons],
        reason=reasons,
        unreached=[name for name, here in zip(names, reached.tolist(), strict=True) if not here],
        opaque=any(graph.split[n] and graph.flags[n] & COMPILED for layer in layers for n in layer.nodes),
        products=torch.from_numpy(_products(graph, layers, upstream, steps[0][0].wide.astype(np.int64))),
        order=np.argsort(graph.last, kind="stable").tolist(),
        bypass=bypass,
    )


def _check(traces: Sequence[TracedForward], names: Sequence[str]) -> None:
    if not traces:
        raise ValueError("join: expected the trace of one forward at least, got none")
    for each, outputs in traces:
        if len(each.wide) != len(names):
            raise ValueError(f"join: expected traces of {len(names)} parameters, as names, got one of {len(each.wide)}")
        if each.layers != traces[0][0].layers:
            raise ValueError(f"join: expected traces of {traces[0][0].layers} layers, got one of {each.layers}")
        if any(not 0 <= index < len(each.outputs) for index in outputs):
            raise ValueError(f"join: expected indices of {len(each.outputs)} outputs, got {list(outputs)}")


def _distinct(traces: Sequence[TracedForward]) -> list[TracedForward]:
    """Return the forwards without those that repeat the graph and outputs of an earlier one, which add no information.

    Forwards that continue from the graph of another one, or are continued by another one, are kept.
    """
    entangled: set[int] = set()
    highest = -1
    for number, (each, _) in enumerate(traces):
        made = each.sequence[each.sequence >= 0]
        if len(made) and made.min() <= highest:
            before = {other for other in range(number) if traces[other][0].overlaps(each)}
            entangled |= before | {number} if before else before
        highest = max(highest, int(made.max(initial=-1)))
    found: list[TracedForward] = []
    for number, (each, outputs) in enumerate(traces):
        if number in entangled or not any(set(outputs) == set(known) and each.same_as(old) for old, known in found):
            found.append((each, outputs))
    return found


def _watched(graph: JoinedGraph, index: int, visits: Sequence[tuple[int, int, int, int]]) -> LayerNodes:
    inside = [visit for visit in visits if visit[0] >= 0]
    first = min((step for _, _, step, _ in inside), default=-1)
    groups = 0
    for _, group, _, _ in inside:
        groups |= 1 << group
    found = [graph.sets[node] for node, *_ in inside if graph.sets[node]]
    return LayerNodes(
        index=index,
        calls=len(visits),
        nodes=[node for node, *_ in inside],
        reached=[node for node, *_ in inside if graph.reached[node]],
        groups=groups,
        position=(first, max((made for _, _, step, made in inside if step == first), default=-1)),
        upstream=union(found) if found else EMPTY,
    )


def _products(graph: JoinedGraph, layers: Sequence[LayerNodes], upstream: ParameterSets, wide: Ints) -> Ints:
    found = upstream.total(wide)
    if any(len(layer.nodes) > 1 for layer in layers):  # otherwise no parameter is used twice on the way to a layer
        chains = graph.chains(wide.tolist())
        for layer in layers:
            found[layer.index] = max(int(found[layer.index]), *(chains[node] for node in layer.nodes), 0)
    return found


def _own(layers: Sequence[LayerNodes], count: int, several: bool) -> list[Intervals]:
    """Assign each parameter to the first layer, in the order of the forward, that it is upstream of.

    Each of several forwards may have omitted some layers. Layers with fewer upstream parameters then come first, so
    that a layer precedes those that follow it in any of the forwards.

    Returns:
        Per layer, the positions of its parameters.
    """

    def order(layer: LayerNodes) -> tuple[int, Any]:
        size = sum(layer.upstream[1::2]) - sum(layer.upstream[::2])
        return (size if several else 0), layer.position

    own = [EMPTY] * len(layers)
    free = list(range(count + 1))  # union-find: per position the next unassigned one, or a position closer to it

    def next_free(position: int) -> int:
        end = position
        while free[end] != end:
            end = free[end]
        while free[position] != end:
            free[position], position = end, free[position]
        return end

    for layer in sorted(layers, key=order):
        taken = []
        for start, end in zip(layer.upstream[::2], layer.upstream[1::2], strict=True):
            position = next_free(start)
            while position < end:
                taken.append(position)
                free[position] = position + 1
                position = next_free(position + 1)
        own[layer.index] = intervals_of(taken)
    return own


def _elsewhere(graph: JoinedGraph, layers: Sequence[LayerNodes], upstream: ParameterSets) -> list[int]:
    """Count, per layer, the upstream parameters that reach the loss in forwards in which the layer did not run."""
    per_mask: dict[int, Ints] = {}
    found = [0] * len(layers)
    reach = graph.reaching
    for layer in layers:
        if layer.nodes:
            if layer.groups not in per_mask:
                outside = [int(bool(groups & ~layer.groups)) for groups in reach]
                per_mask[layer.groups] = upstream.total(np.asarray(outside, dtype=np.int64))
            found[layer.index] = int(per_mask[layer.groups][layer.index])
    return found


def _reason(
    layer: LayerNodes, graph: JoinedGraph, hiding: bytearray, bypass: Bypass, names: Sequence[str]
) -> str | None:
    if not layer.nodes:
        return _OUTSIDE if layer.calls else DID_NOT_RUN
    if any(hiding[node] for node in layer.nodes):
        return _HIDDEN
    if not layer.reached:
        return _UNUSED
    if layer.index in bypass.nested:
        return _NESTED
    return bypass.reason(layer.index, names)
