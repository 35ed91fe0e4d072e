"""Which parameters lie below each watched feature, and is the feature a cut for them: read off the autograd graph.

The feature speed formula, <b, df> = sum of <g, dw> over the parameters below (section 2 of "The Feature Speed Formula",
arXiv 2311.18718), holds where the feature is a **cut**: every path from these parameters to the loss passes through
it, exactly once. The graphs of the forwards answer that, whatever the Python code of the model:

    trace(features, outputs, parameters) -> Trace        after each forward: one walk, no graph kept (see graph.py)
    join([(trace, outputs), ...], names) -> Structure    of one optimizer step, from all its forwards
    analyse(features, outputs, parameters, names)        both, where a step is one forward

``join`` is told which outputs of each forward the loss depends on: an output that the loop throws away is no way past a
layer. A layer's visits are those in all forwards, and parameters are shared between them. So, where two heads are
trained in one step, the trunk is a cut and each head is none: its share of the trunk reaches the loss past it.

A feature is a cut for a parameter if its value dominates the parameter, seen from the loss. What is below each feature
is kept as intervals (:mod:`fastfs._network.parameter_sets`), so that time and memory are linear in the size of the
graph, but for layers that run several times and for parameters with several uses: these take a bit for each node and
layer.

What the graph cannot show: parameters that change a feature through ``detach()`` or ``no_grad`` and are trained by
another loss, losses that use parameters or inner tensors past the outputs (give the loss itself as the output then),
and functions whose backward is not their derivative. The formula residual shows those.
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
from fastfs._network.bypass import Past, Watched, look_past
from fastfs._network.joined_graph import COMPILED, Joined, Step
from fastfs._network.parameter_sets import EMPTY, Intervals, ParameterSets, intervals_of, union

__all__ = ["DID_NOT_RUN", "Edge", "Structure", "Trace", "analyse", "edge_of", "join", "signature", "trace"]

DID_NOT_RUN = "did not run"
"""Reason of a layer that the forward did not call."""

_OUTSIDE = "outside the autograd graph"
_HIDDEN = "parameters hidden from the graph (reentrant checkpoint?)"
_UNUSED = "no output depends on it, or it is a view that was changed in place"
_NESTED = "runs several times, one run using the result of another"


@dataclass(frozen=True, eq=False)
class Structure:
    """What :func:`join` found, for L layers and P parameters. Holds no part of the graph.

    Attributes:
        upstream_sets: the feature depends on the parameter. Empty where a checkpoint hides parameters from the graph.
        own_sets: upstream of this layer and of no watched layer that comes earlier in the forward.
        cut: (L,) the feature speed formula holds with the sum over ``upstream``. True too if nothing is upstream.
        reason: (L,) why it is no cut, or None.
        unreached: names of parameters from which no path leads to an output. If such a parameter gets a gradient all
            the same, the graph hides it.
        opaque: a watched feature is one of several results of a compiled region, which is a single function in the
            graph: the answer is on the safe side, that is fewer cuts; an eager forward gives the exact one.
        products: int64 (L,) on the CPU: how many of the parameters upstream have two dimensions or more, or, if that is
            more, how many uses of such parameters follow one another on the way to the layer's last visit.
        order: the parameters in the order in which the forward takes them for the last time, unused ones first.
        past: how many parameters reach the loss past each layer, and how.
    """

    upstream_sets: ParameterSets
    own_sets: ParameterSets
    cut: list[bool]
    reason: list[str | None]
    unreached: list[str]
    opaque: bool
    products: Tensor
    order: list[int]
    past: Past = field(repr=False)

    @property
    def counts(self) -> list[int]:
        """(L,) how many parameters are upstream."""
        found: list[int] = self.upstream_sets.counts().tolist()
        return found

    @functools.cached_property
    def upstream(self) -> Tensor:
        """``upstream_sets`` as bool (L, P) on the CPU: made when asked for, since it grows with the depth squared."""
        return self.upstream_sets.dense()

    @functools.cached_property
    def own(self) -> Tensor:
        """``own_sets`` as bool (L, P) on the CPU."""
        return self.own_sets.dense()

    @functools.cached_property
    def shared(self) -> Tensor:
        """bool (L, P) on the CPU: the parameter acts before and after the layer, which is no cut for that reason."""
        return self.past.shared(len(self.cut), self.upstream_sets.columns)

    def same_as(self, other: Structure) -> bool:
        """Whether the same parameters are upstream, and the same layers cuts for the same reasons."""
        return self.reason == other.reason and self.upstream_sets.same_as(other.upstream_sets)


def analyse(
    features: Sequence[Sequence[Edge | None]],
    outputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    names: Sequence[str],
) -> Structure:
    """The structure of one forward, every output of which the loss depends on.

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
    return join([(trace(features, outputs, parameters), range(len(outputs)))], names)


def join(traces: Sequence[Step], names: Sequence[str]) -> Structure:
    """The structure of one optimizer step, from all forwards that have a part in its gradients.

    Args:
        traces: of each forward, in order, with the indices of the outputs that the loss depends on.
        names: of the parameters, in the order that the traces were taken with.

    Raises:
        ValueError: there is no trace, or they are of different numbers of layers or parameters, or an index is of no
            output.
    """
    _check(traces, names)
    steps = _distinct(traces)
    graph = Joined(steps, len(names))
    layers = [_watched(graph, index, visits) for index, visits in enumerate(graph.visits)]
    upstream = ParameterSets.of(graph.numbering, [layer.upstream for layer in layers])
    reached = np.frombuffer(graph.reached, dtype=np.uint8, count=len(names)).astype(np.int64)
    past = look_past(graph, layers, upstream.total(reached).tolist(), _elsewhere(graph, layers, upstream))
    hiding = graph.hiding()
    reasons = [_reason(layer, graph, hiding, past, names) for layer in layers]
    if _HIDDEN in reasons:  # not all that is upstream is in the graph: a part of it would pass for the whole
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
        past=past,
    )


def _check(traces: Sequence[Step], names: Sequence[str]) -> None:
    if not traces:
        raise ValueError("join: expected the trace of one forward at least, got none")
    for each, outputs in traces:
        if len(each.wide) != len(names):
            raise ValueError(f"join: expected traces of {len(names)} parameters, as names, got one of {len(each.wide)}")
        if each.layers != traces[0][0].layers:
            raise ValueError(f"join: expected traces of {traces[0][0].layers} layers, got one of {each.layers}")
        if any(not 0 <= index < len(each.outputs) for index in outputs):
            raise ValueError(f"join: expected indices of {len(each.outputs)} outputs, got {list(outputs)}")


def _distinct(traces: Sequence[Step]) -> list[Step]:
    """Without forwards that have the graph of an earlier one, for the same outputs: they say nothing new.

    But those stay that go on from the graph of another one, or that another one goes on from.
    """
    entangled: set[int] = set()
    highest = -1
    for number, (each, _) in enumerate(traces):
        made = each.sequence[each.sequence >= 0]
        if len(made) and made.min() <= highest:
            before = {other for other in range(number) if traces[other][0].overlaps(each)}
            entangled |= before | {number} if before else before
        highest = max(highest, int(made.max(initial=-1)))
    found: list[Step] = []
    for number, (each, outputs) in enumerate(traces):
        if number in entangled or not any(set(outputs) == set(known) and each.same_as(old) for old, known in found):
            found.append((each, outputs))
    return found


def _watched(graph: Joined, index: int, visits: Sequence[tuple[int, int, int, int]]) -> Watched:
    inside = [visit for visit in visits if visit[0] >= 0]
    first = min((step for _, _, step, _ in inside), default=-1)
    groups = 0
    for _, group, _, _ in inside:
        groups |= 1 << group
    found = [graph.sets[node] for node, *_ in inside if graph.sets[node]]
    return Watched(
        index=index,
        calls=len(visits),
        nodes=[node for node, *_ in inside],
        reached=[node for node, *_ in inside if graph.reached[node]],
        groups=groups,
        position=(first, max((made for _, _, step, made in inside if step == first), default=-1)),
        upstream=union(found) if found else EMPTY,
    )


def _products(graph: Joined, layers: Sequence[Watched], upstream: ParameterSets, wide: Ints) -> Ints:
    found = upstream.total(wide)
    if any(len(layer.nodes) > 1 for layer in layers):  # else no parameter of theirs is used twice on the way
        chains = graph.chains(wide.tolist())
        for layer in layers:
            found[layer.index] = max(int(found[layer.index]), *(chains[node] for node in layer.nodes), 0)
    return found


def _own(layers: Sequence[Watched], count: int, several: bool) -> list[Intervals]:
    """Each parameter goes to the first layer, in the order of the forward, that it is upstream of.

    With several forwards, each of which may have left layers out, what has fewer parameters upstream comes first: a
    layer before those that follow it in any of the forwards.
    """

    def order(layer: Watched) -> tuple[int, Any]:
        size = sum(layer.upstream[1::2]) - sum(layer.upstream[::2])
        return (size if several else 0), layer.position

    own = [EMPTY] * len(layers)
    free = list(range(count + 1))  # of each position the next one that no layer has, or a shorter way to it

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


def _elsewhere(graph: Joined, layers: Sequence[Watched], upstream: ParameterSets) -> list[int]:
    """How many parameters upstream of each layer reach the loss in forwards in which it did not run."""
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


def _reason(layer: Watched, graph: Joined, hiding: bytearray, past: Past, names: Sequence[str]) -> str | None:
    if not layer.nodes:
        return _OUTSIDE if layer.calls else DID_NOT_RUN
    if any(hiding[node] for node in layer.nodes):
        return _HIDDEN
    if not layer.reached:
        return _UNUSED
    if layer.index in past.nested:
        return _NESTED
    return past.reason(layer.index, names)
