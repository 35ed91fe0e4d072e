"""The graphs of all forwards of one optimizer step, joined into one graph with numbered nodes.

Parameters are nodes that the forwards share. Below a single root there is a head node for each group of forwards that
have only parameters in common, and below each head the outputs that the loss depends on. A function with several used
outputs has one node per output; otherwise one node represents both the function and its value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from fastfs._network.autograd_graph import Ints, Trace
from fastfs._network.parameter_sets import EMPTY, Intervals, union

__all__ = ["CHECKPOINT", "COMPILED", "TRANSPARENT", "JoinedGraph", "TracedForward"]

TracedForward = tuple[Trace, Sequence[int]]
"""A forward, and the indices of its outputs that the loss depends on."""

TRANSPARENT, CHECKPOINT, COMPILED = 1, 2, 4
"""Bit flags of a function."""

# Functions that only reshape or cast a parameter: the parameter counts as used by the first function after these.
_FORMS = frozenset(
    f"{name}Backward0"
    for name in (
        "ToCopy T Transpose Permute View UnsafeView Reshape ReshapeAlias Expand Alias Clone Squeeze Unsqueeze Detach"
    ).split()
) | frozenset(f"{name}Backward" for name in ("_ToTorchTensor", "_FromTorchTensor", "Redistribute"))


def _flags(name: str) -> int:
    return (
        TRANSPARENT * (name in _FORMS) | CHECKPOINT * ("Checkpoint" in name) | COMPILED * ("CompiledFunction" in name)
    )


class JoinedGraph:
    """The joined graph. Nodes 0 to P - 1 are the parameters.

    Attributes:
        root: node above all outputs.
        starts, targets: the children of node n are ``targets[starts[n]:starts[n + 1]]``.
        order: post-order of the nodes below the root or a visit: children come before their parents.
        reached: whether a node lies below the root.
        groups: group of forwards of each node that is not a parameter.
        flags: flags of the function of each node.
        split: whether a node is one of several outputs of a function.
        visits: per layer, its visits: node (-1 outside of the graph), group, step and sequence number.
        last: int64 (P,) sequence number of the last function that takes the parameter.
        sets: per node, the parameters below it as intervals of ``numbering``.
        numbering: int64 (P,) parameter at each position.
    """

    def __init__(self, steps: Sequence[TracedForward], parameters: int) -> None:
        self.root = parameters
        self._group(steps)
        groups = max(self._group_of) + 1
        self._head = parameters + 1
        self._count = self._head + groups
        self.groups = [-1] * (parameters + 1) + list(range(groups))
        self._sequence: list[Ints] = [np.full(self._count, -1, dtype=np.int64)]
        flags = [np.zeros(self._count, dtype=np.int64)]
        heads = np.arange(self._head, self._count, dtype=np.int64)
        edges = [np.stack([np.full(groups, self.root), heads, np.zeros(groups, dtype=np.int64)], axis=1)]
        self._common: dict[tuple[int, str], tuple[int, Ints]] = {}
        visits: list[tuple[Ints, Ints]] = []  # with the sequence numbers of their functions
        for number, (trace, roots) in enumerate(steps):
            at, fresh = self._place(trace, number)
            sources = np.repeat(at, np.diff(trace.starts))
            below = np.stack([sources, at[trace.targets], trace.output_nrs], axis=1)
            edges.append(below[np.repeat(fresh, np.diff(trace.starts))])
            ends = trace.outputs[np.asarray(list(roots), dtype=np.int64)]
            ends = ends[ends[:, 0] >= 0]
            head = np.full(len(ends), self._head + self._group_of[number])
            edges.append(np.stack([head, at[ends[:, 0]], ends[:, 1]], axis=1))
            inside = trace.visits[:, 0]
            nodes, made = inside.copy(), inside.copy()
            here = inside >= 0
            nodes[here], made[here] = at[inside[here]], trace.sequence[inside[here]]
            visits.append((np.stack([nodes, trace.visits[:, 1]], axis=1), made))
            new = fresh & (trace.parameters < 0)
            self._sequence.append(trace.sequence[new])
            flags.append(np.asarray([_flags(name) for name in trace.names], dtype=np.int64)[trace.kinds[new]])
            self.groups += [self._group_of[number]] * int(new.sum())
        self._sort(np.concatenate(edges), np.concatenate(flags), [pairs for pairs, _ in visits])
        self.visits: list[list[tuple[int, int, int, int]]] = [[] for _ in range(steps[0][0].layers)]
        for number, ((trace, _), (pairs, made)) in enumerate(zip(steps, visits, strict=True)):
            flat = list(zip(pairs[:, 0].tolist(), made.tolist(), strict=True))
            for layer, (a, b) in enumerate(zip(trace.visit_starts[:-1], trace.visit_starts[1:], strict=True)):
                self.visits[layer] += [(node, self._group_of[number], number, nr) for node, nr in flat[a:b]]
        self._walk()

    # From forwards to nodes

    def _group(self, steps: Sequence[TracedForward]) -> None:
        """Assign forwards to one group if they share functions because one used a result of another."""
        found: list[int] = []
        highest = -1
        self._overlapping = False
        for number, (trace, _) in enumerate(steps):
            made = trace.sequence[trace.sequence >= 0]
            group = max(found, default=-1) + 1
            if len(made) and made.min() <= highest:
                for other in range(number):
                    if found[other] != group and steps[other][0].overlaps(trace):
                        self._overlapping = True
                        found = [found[other] if g == group else g for g in found]
                        group = found[other]
            highest = max(highest, int(made.max(initial=-1)))
            found.append(group)
        dense = {group: index for index, group in enumerate(dict.fromkeys(found))}
        self._group_of = [dense[group] for group in found]

    def _place(self, trace: Trace, step: int) -> tuple[Ints, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        """Return the node of each function, and whether the node is new, that is not part of an earlier forward."""
        at = trace.parameters.copy()
        fresh = np.ones(len(at), dtype=np.bool_)
        if self._overlapping:
            for local, node in self._met(trace).items():
                at[local], fresh[local] = node, False
        new = fresh & (trace.parameters < 0)
        at[new] = np.arange(self._count, self._count + int(new.sum()))
        self._count += int(new.sum())
        if self._overlapping:
            for local in np.flatnonzero(new & (trace.sequence >= 0)).tolist():
                key = int(trace.sequence[local]), trace.names[trace.kinds[local]]
                self._common[key] = int(at[local]), at[trace.targets[trace.starts[local] : trace.starts[local + 1]]]
        return at, fresh

    def _met(self, trace: Trace) -> dict[int, int]:
        """Find functions shared with an earlier forward: equal number, kind and inputs, and so an equal subgraph."""
        met: dict[int, int] = {}
        inputs: dict[int, Ints] = {}
        for local in np.flatnonzero(trace.sequence >= 0).tolist():
            found = self._common.get((int(trace.sequence[local]), trace.names[trace.kinds[local]]))
            if found is not None:
                met[local], inputs[local] = found
        wrong = [0]
        while wrong:
            wrong = []
            for local, nodes in inputs.items():
                if local in met:
                    below = trace.targets[trace.starts[local] : trace.starts[local + 1]].tolist()
                    same = len(below) == len(nodes) and all(
                        trace.sequence[b] < 0 or met.get(b) == node
                        for b, node in zip(below, nodes.tolist(), strict=True)
                    )
                    if not same:
                        wrong.append(local)
            for local in wrong:
                del met[local]
        return met

    def _sort(self, edges: Ints, flags: Ints, visits: list[Ints]) -> None:
        """Create nodes for functions with several used outputs, then sort all edges by their source node."""
        sequence = np.concatenate(self._sequence)
        self.last = np.full(self.root, -1, dtype=np.int64)
        takes = edges[edges[:, 1] < self.root]
        np.maximum.at(self.last, takes[:, 1], sequence[takes[:, 0]])
        several = np.zeros(self._count, dtype=np.bool_)
        every = np.concatenate([edges[:, 1:], *(pairs[pairs[:, 0] >= 0] for pairs in visits)])
        width = int(every[:, 1].max(initial=0)) + 1
        if width > 1:
            pairs = np.unique(every[:, 0] * width + every[:, 1])
            functions, counts = np.unique(pairs // width, return_counts=True)
            several[functions[counts > 1]] = True
            wanted = pairs[several[pairs // width]]
            nodes = self._count + np.arange(len(wanted))

            def move(column: Ints, output: Ints) -> Ints:
                mine = several[column] & (column >= 0)
                return np.where(mine, self._count + np.searchsorted(wanted, column * width + output), column)

            edges[:, 1] = move(edges[:, 1], edges[:, 2])
            for each in visits:
                each[:, 0] = move(each[:, 0], each[:, 1])
            made_by = wanted // width
            edges = np.concatenate([edges, np.stack([nodes, made_by, np.zeros_like(nodes)], axis=1)])
            flags = np.concatenate([flags, flags[made_by]])
            self.groups += [self.groups[function] for function in made_by.tolist()]
            self._count += len(wanted)
        self.split = bytearray(len(several)) + bytearray(b"\1") * (self._count - len(several))
        self.flags = flags.tolist()
        by_source = np.argsort(edges[:, 0], kind="stable")
        self.targets = edges[by_source, 1].tolist()
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(edges[:, 0], minlength=self._count))]).tolist()

    # Reachability

    def _walk(self) -> None:
        first = [self.root, *(node for visits in self.visits for node, *_ in visits if node >= 0)]
        depth = [0] * self._count
        starts, targets = self.starts, self.targets
        for node in self._post_order(first, None):
            below = targets[starts[node] : starts[node + 1]]
            if below:
                depth[node] = 1 + max([depth[child] for child in below])
        # The deepest child comes first: its set contains those of the others, so that the sets become intervals.
        self.order = self._post_order(first, depth.__getitem__)
        entered = [node for node in self.order if node < self.root]
        seen = set(entered)
        self.numbering = np.asarray(entered + [p for p in range(self.root) if p not in seen], dtype=np.int64)
        self._below()
        reached = self.reached = bytearray(self._count)
        reached[self.root] = 1
        for node in reversed(self.order):
            if reached[node]:
                for child in targets[starts[node] : starts[node + 1]]:
                    reached[child] = 1

    def _post_order(self, first: Sequence[int], key: Callable[[int], int] | None) -> list[int]:
        starts, targets = self.starts, self.targets
        seen = bytearray(self._count)
        order: list[int] = []
        for top in first:
            stack = [top]
            while stack:
                node = stack.pop()
                if node < 0:
                    order.append(~node)
                elif not seen[node]:
                    seen[node] = 1
                    below = targets[starts[node] : starts[node + 1]]
                    if not below:
                        order.append(node)
                        continue
                    stack.append(~node)
                    if key is not None and len(below) > 1:
                        below.sort(key=key)
                    stack += below
        return order

    def _below(self) -> None:
        starts, targets = self.starts, self.targets
        sets: list[Intervals] = [EMPTY] * self._count
        for position, parameter in enumerate(self.numbering.tolist()):
            sets[parameter] = (position, position + 1)
        for node in self.order:
            if node >= self.root:
                found = [sets[child] for child in targets[starts[node] : starts[node + 1]] if sets[child]]
                if found:
                    sets[node] = found[0] if len(found) == 1 else union(found)
        self.sets = sets

    def dominated(self) -> list[int]:
        """Count the parameters that each node dominates: those to which every path from the root passes through it.

        In an acyclic graph, the dominator of a node is the lowest common ancestor of its users in the dominator tree,
        so one sweep suffices. ``jump`` holds a distant ancestor of each node, which makes ancestor queries logarithmic:
        a recurrent network uses a parameter thousands of times at all depths.

        Returns:
            One count per node.
        """
        starts, targets, root = self.starts, self.targets, self.root
        parent, jump, depth = [-1] * self._count, [0] * self._count, [0] * self._count
        parent[root] = jump[root] = root

        def common(a: int, b: int) -> int:
            if depth[a] < depth[b]:
                a, b = b, a
            while depth[a] > depth[b]:
                a = jump[a] if depth[jump[a]] >= depth[b] else parent[a]
            while a != b:
                a, b = (jump[a], jump[b]) if jump[a] != jump[b] else (parent[a], parent[b])
            return a

        for node in reversed(self.order):
            if not self.reached[node]:
                continue
            if node != root:
                above = parent[node]
                depth[node] = depth[above] + 1
                far = jump[above]
                jump[node] = jump[far] if depth[above] - depth[far] == depth[far] - depth[jump[far]] else above
            for child in targets[starts[node] : starts[node + 1]]:
                above = parent[child]
                if above < 0:
                    parent[child] = node
                elif above != node:
                    parent[child] = common(above, node)
        counts = [0] * self._count
        for node in self.order:
            if self.reached[node]:
                counts[node] += node < root
                if node != root:
                    counts[parent[node]] += counts[node]
        return counts

    def hiding(self) -> bytearray:
        """Return, per node, whether it or a node below it is a checkpoint that hides parameters from the graph."""
        hidden = bytearray(self._count)
        if any(flag & CHECKPOINT for flag in self.flags):
            starts, targets = self.starts, self.targets
            for node in self.order:
                below = targets[starts[node] : starts[node + 1]]
                hidden[node] = bool(self.flags[node] & CHECKPOINT) or any(hidden[child] for child in below)
        return hidden

    def chains(self, wide: Sequence[int]) -> list[int]:
        """Return, per node, the largest number of functions on a path below it that take a wide parameter.

        Args:
            wide: 1 for the parameters that count, 0 for the others.

        Returns:
            One length per node.
        """
        starts, targets = self.starts, self.targets
        found = [0] * self._count
        form = [*wide, *([0] * (self._count - self.root))]  # whether the node is a reshaped or cast wide parameter
        for node in self.order:
            below = targets[starts[node] : starts[node + 1]]
            if not below:
                continue
            takes = max([form[child] for child in below])
            if takes and len(below) == 1 and self.flags[node] & TRANSPARENT:
                form[node] = 1
            else:
                found[node] = max([found[child] for child in below]) + takes
        return found

    @functools.cached_property
    def reaching(self) -> list[int]:
        """Per parameter, the bit set of the groups of forwards in which it reaches the loss."""
        found = [0] * self.root
        starts, targets = self.starts, self.targets
        for node in self.order:
            if node > self.root and self.reached[node]:
                for child in targets[starts[node] : starts[node + 1]]:
                    if child < self.root:
                        found[child] |= 1 << self.groups[node]
        return found

    def uses(self) -> dict[int, list[int]]:
        """Return, per node, the parameters used there that are also used elsewhere.

        Only nodes below the root count. Functions that only reshape or cast a parameter do not use it.

        Returns:
            node -> indices of parameters.
        """
        starts, targets = self.starts, self.targets
        form = list(range(self.root)) + [-1] * (self._count - self.root)  # the parameter that a node reshapes or casts
        taken: dict[int, list[int]] = {}
        for node in self.order:
            if node < self.root or not self.reached[node]:
                continue
            found = {form[child] for child in targets[starts[node] : starts[node + 1]]} - {-1}
            if len(found) == 1 and (
                self.flags[node] & TRANSPARENT or (self.split[node] and form[self._made_by(node)] >= 0)
            ):
                (form[node],) = found
            else:
                for parameter in found:
                    taken.setdefault(parameter, []).append(node)
        uses: dict[int, list[int]] = {}
        for parameter, nodes in taken.items():
            if len(nodes) > 1:
                for node in nodes:
                    uses.setdefault(node, []).append(parameter)
        return uses

    def _made_by(self, node: int) -> int:
        return int(self.targets[self.starts[node]])
