"""Find the parameters that reach the loss along paths that bypass a watched layer, and say how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastfs._network.autograd_graph import Ints
from fastfs._network.joined_graph import JoinedGraph
from fastfs._network.parameter_sets import Intervals

__all__ = ["Bypass", "LayerNodes", "find_bypasses"]

_SHOWN = 3
_TOGETHER = 4096  # layers per sweep: every node carries that many bits


@dataclass(frozen=True)
class LayerNodes:
    """The nodes of one watched layer in the joined graph.

    Attributes:
        index: index of the layer.
        calls: number of times that it ran.
        nodes: nodes of its visits, without visits outside of the graph.
        reached: those of ``nodes`` that the loss depends on.
        groups: bit set of the groups of forwards in which it ran.
        position: tracedForward and sequence number of the last visit in the first forward in which it ran.
        upstream: parameters below any visit.
    """

    index: int
    calls: int
    nodes: list[int]
    reached: list[int]
    groups: int
    position: tuple[int, int]
    upstream: Intervals


@dataclass
class Bypass:
    """The parameters that reach the loss without passing through each layer.

    Attributes:
        nested: layers of which one visit lies below another.
        count: per layer, the number of parameters that bypass it in any way.
        elsewhere: per layer, how many of these do so in forwards in which the layer did not run.
        twice: per layer, how many of the others are also used by functions that the layer does not depend on.
        shown: per layer, the first of the parameters that ``twice`` counts.
    """

    nested: set[int] = field(default_factory=set)
    count: dict[int, int] = field(default_factory=dict)
    elsewhere: list[int] = field(default_factory=list)
    twice: dict[int, int] = field(default_factory=dict)
    shown: dict[int, list[int]] = field(default_factory=dict)
    _bits: list[tuple[list[int], list[tuple[int, int]]]] = field(default_factory=list)

    def reason(self, layer: int, names: Sequence[str]) -> str | None:
        """Return why the layer is not a cut, or None if it is one."""
        count = self.count[layer]
        if not count:
            return None
        elsewhere, twice = self.elsewhere[layer], self.twice.get(layer, 0)
        reasons = []
        if branch := count - elsewhere - twice:
            reasons.append(f"inside a residual branch: {_parameters(branch)} the output past it")
        if twice:
            found = ", ".join(names[parameter] for parameter in self.shown[layer])
            more = f" and {twice - _SHOWN} more" if twice > _SHOWN else ""
            reasons.append(f"parameters used before and after it: {found}{more}")
        if elsewhere:
            reasons.append(f"{_parameters(elsewhere)} the loss in another forward of the step, where it did not run")
        return "; ".join(reasons)

    def shared(self, layers: int, parameters: int) -> Tensor:
        """Return bool (L, P): the parameters that ``twice`` counts."""
        found = torch.zeros((layers, parameters), dtype=torch.bool)
        for indices, rows in self._bits:
            if rows:
                columns = torch.from_numpy(_unpacked([bits for _, bits in rows], len(indices)).astype(np.bool_))
                found[torch.tensor(indices)[:, None], torch.tensor([p for p, _ in rows])] = columns.T
        return found

    def add_shared(self, chunk: Sequence[LayerNodes], rows: list[tuple[int, int]]) -> None:
        """Record, for each parameter in ascending order, a bit per layer that it is used both before and after."""
        indices = [layer.index for layer in chunk]
        rows = [row for row in rows if row[1]]
        self._bits.append((indices, rows))
        for index, count in zip(indices, _columns([bits for _, bits in rows], len(chunk)).tolist(), strict=True):
            self.twice[index] = count
        short = (1 << len(chunk)) - 1  # layers with fewer than _SHOWN parameters so far
        for parameter, bits in rows:
            for bit in _ones(bits & short):
                shown = self.shown.setdefault(indices[bit], [])
                shown.append(parameter)
                if len(shown) == _SHOWN:
                    short &= ~(1 << bit)


def find_bypasses(
    graph: JoinedGraph, layers: Sequence[LayerNodes], reached: Sequence[int], elsewhere: list[int]
) -> Bypass:
    """Find the parameters that bypass each layer.

    Args:
        graph: joinedGraph graph of the step.
        layers: layerNodes layers.
        reached: per layer, the number of upstream parameters that the loss depends on.
        elsewhere: per layer, the number of upstream parameters used in forwards in which the layer did not run.

    Returns:
        Counts and names per layer.
    """
    bypass = Bypass(elsewhere=elsewhere)
    uses = graph.uses()
    dominated = graph.dominated()
    several, once = [], []
    for layer in layers:
        if len(layer.reached) == 1:
            count = bypass.count[layer.index] = reached[layer.index] - dominated[layer.reached[0]]
            if count > elsewhere[layer.index] and uses:
                once.append(layer)
        elif layer.reached:
            several.append(layer)
    for which in (several, once):
        for start in range(0, len(which), _TOGETHER):
            _sweep(graph, which[start : start + _TOGETHER], uses, bypass)
    return bypass


def _sweep(graph: JoinedGraph, chunk: Sequence[LayerNodes], uses: dict[int, list[int]], bypass: Bypass) -> None:
    """Sweep once from the root to the parameters, with one bit per layer at every node.

    ``below``: the node is a visit of the layer or lies below one. ``inside``: the same for visits that the loss depends
    on. ``avoid``: a path from the root to the node passes through no visit of the layer.
    """
    all_visits, visits = _at([layer.nodes for layer in chunk]), _at([layer.reached for layer in chunk])
    every = (1 << len(chunk)) - 1
    below, inside, avoid = ([0] * len(graph.flags) for _ in range(3))
    avoid[graph.root] = every
    missed: dict[int, int] = {}
    nested = 0
    for bit, layer in enumerate(chunk):
        if len(set(layer.reached)) < len(layer.reached):
            nested |= 1 << bit
    starts, targets = graph.starts, graph.targets
    for node in reversed(graph.order):
        if node in all_visits:
            mine = visits.get(node, 0)
            nested |= inside[node] & mine
            inside[node] |= mine
            below[node] |= all_visits[node]
            avoid[node] &= ~mine
        if node in uses and graph.reached[node]:
            for parameter in uses[node]:
                missed[parameter] = missed.get(parameter, 0) | every & ~below[node]
        under, through, around = below[node], inside[node], avoid[node]
        if node >= graph.root:
            below[node] = inside[node] = avoid[node] = 0  # only the bits of parameters are needed later
        for child in targets[starts[node] : starts[node + 1]]:
            below[child] |= under
            inside[child] |= through
            avoid[child] |= around
    elsewhere = _Elsewhere(graph, chunk)
    rows = [(p, below[p] & avoid[p] & bits & ~elsewhere(p)) for p, bits in sorted(missed.items())]
    bypass.add_shared(chunk, rows)
    bypass.nested |= {chunk[bit].index for bit in _ones(nested)}
    if any(layer.index not in bypass.count for layer in chunk):
        counts = _columns([below[p] & avoid[p] for p in range(graph.root)], len(chunk))
        bypass.count.update({layer.index: count for layer, count in zip(chunk, counts.tolist(), strict=True)})


class _Elsewhere:
    """Maps a parameter to the layers of a chunk that did not run in some forward in which it reaches the loss."""

    def __init__(self, graph: JoinedGraph, chunk: Sequence[LayerNodes]) -> None:
        self._reach = graph.reaching
        self._layers: dict[int, int] = {}
        for bit, layer in enumerate(chunk):
            self._layers[layer.groups] = self._layers.get(layer.groups, 0) | 1 << bit

    def __call__(self, parameter: int) -> int:
        found = 0
        for groups, bits in self._layers.items():
            if self._reach[parameter] & ~groups:
                found |= bits
        return found


def _at(visits: Sequence[Sequence[int]]) -> dict[int, int]:
    found: dict[int, int] = {}
    for bit, nodes in enumerate(visits):
        for node in nodes:
            found[node] = found.get(node, 0) | 1 << bit
    return found


def _parameters(count: int) -> str:
    return f"{count} parameters also reach" if count > 1 else "1 parameter also reaches"


def _ones(bits: int) -> Iterable[int]:
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def _unpacked(rows: Sequence[int], width: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    size = (width + 7) // 8
    packed = np.frombuffer(b"".join(row.to_bytes(size, "little") for row in rows), dtype=np.uint8)
    return np.unpackbits(packed.reshape(len(rows), size), axis=1, bitorder="little", count=width)


def _columns(rows: Sequence[int], width: int) -> Ints:
    """Return, per bit, the number of rows that have it set."""
    some = [row for row in rows if row]
    return _unpacked(some, width).sum(axis=0, dtype=np.int64) if some else np.zeros(width, dtype=np.int64)
