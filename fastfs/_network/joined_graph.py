"""The graphs of all forwards of one optimizer step as one graph with numbered nodes.

Parameters are nodes that the forwards share. Below one root stands a head for each group of forwards that have nothing
but parameters in common, below a head the outputs that the loss depends on. A function of which several outputs are
used has a node of its own for each of them; else one node stands for the function and its value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from fastfs._network.autograd_graph import Ints, Trace
from fastfs._network.parameter_sets import EMPTY, Intervals, union

__all__ = ["CHECKPOINT", "COMPILED", "TRANSPARENT", "Joined", "Step"]

Step = tuple[Trace, Sequence[int]]
"""A forward, and which of its outputs the loss depends on."""

TRANSPARENT, CHECKPOINT, COMPILED = 1, 2, 4
"""What is to be known of a function."""

# Functions that only change the form or the type of a parameter: a parameter is used where these end.
_FORMS = frozenset(
    f"{name}Backward0"
    for name in (
        "ToCopy T Transpose Permute View UnsafeView Reshape ReshapeAlias Expand Alias Clone Squeeze Unsqueeze Detach"
    ).split()
)


def _flags(name: str) -> int:
    return (
        TRANSPARENT * (name in _FORMS) | CHECKPOINT * ("Checkpoint" in name) | COMPILED * ("CompiledFunction" in name)
    )


class Joined:
    """Nodes 0 to P - 1 are the parameters.

    Attributes:
        root: the node above all outputs.
        starts, targets: the nodes below node n are ``targets[starts[n]:starts[n + 1]]``.
        order: every node that is below the root or a visit, after all that are below it.
        reached: whether the root is above a node.
        groups: of every node that is no parameter, which forwards it is of.
        flags: of the function of every node.
        split: whether the node is one of several outputs of a function.
        visits: per layer its visits: node, or -1 outside of the graph; group; step; number in the order of the forward.
        last: int64 (P,) number of the last function that takes a parameter.
        sets: per node which parameters are below it, in ``numbering``.
        numbering: int64 (P,) the parameter at each position.
    """

    def __init__(self, steps: Sequence[Step], parameters: int) -> None:
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
        visits: list[tuple[Ints, Ints]] = []  # with numbers of their functions
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

    def _group(self, steps: Sequence[Step]) -> None:
        """Forwards that have functions in common, since one used a result of another, are of one group."""
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
        """The node of each function, and whether it is new: not of an earlier forward."""
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
        """Functions that an earlier forward has, too: same number, kind and inputs, and so all that is below them."""
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
        """Nodes for the outputs of functions of which several are used; then all edges by the node that they leave."""
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

    # What lies above and below

    def _walk(self) -> None:
        first = [self.root, *(node for visits in self.visits for node, *_ in visits if node >= 0)]
        depth = [0] * self._count
        starts, targets = self.starts, self.targets
        for node in self._post_order(first, None):
            below = targets[starts[node] : starts[node + 1]]
            if below:
                depth[node] = 1 + max([depth[child] for child in below])
        # What is deepest goes first: it holds what the others hold, too, so that these are intervals.
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
        """For each node how many parameters it dominates: every path from the root to them passes through it.

        On a graph without cycles the dominator of a node is the lowest common ancestor, in the dominator tree, of all
        that use it: one sweep. ``jump`` holds for each node an ancestor that is far up, so that an ancestor is found in
        a logarithmic number of steps: a recurrent network uses a parameter thousands of times, at all depths.
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
        """Whether a node, or one below it, is a checkpoint that keeps parameters out of the graph."""
        hidden = bytearray(self._count)
        if any(flag & CHECKPOINT for flag in self.flags):
            starts, targets = self.starts, self.targets
            for node in self.order:
                below = targets[starts[node] : starts[node + 1]]
                hidden[node] = bool(self.flags[node] & CHECKPOINT) or any(hidden[child] for child in below)
        return hidden

    def chains(self, wide: Sequence[int]) -> list[int]:
        """For each node how many functions that take a parameter follow one another below it, at most.

        Args:
            wide: 1 for the parameters that count, else 0.
        """
        starts, targets = self.starts, self.targets
        found = [0] * self._count
        form = [*wide, *([0] * (self._count - self.root))]  # whether the node is such a parameter in another form
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
        """For each parameter bits of the groups of forwards in which it reaches the loss."""
        found = [0] * self.root
        starts, targets = self.starts, self.targets
        for node in self.order:
            if node > self.root and self.reached[node]:
                for child in targets[starts[node] : starts[node + 1]]:
                    if child < self.root:
                        found[child] |= 1 << self.groups[node]
        return found

    def uses(self) -> dict[int, list[int]]:
        """Where parameters that are used several times are used: per node which.

        Only what the root is above counts. Functions that change the form of a parameter do not use it.
        """
        starts, targets = self.starts, self.targets
        form = list(range(self.root)) + [-1] * (self._count - self.root)  # which parameter a node is a form of
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
