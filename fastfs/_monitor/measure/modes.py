"""The ways to see what an update does to the features: on the training batch, to first order, on a probe batch.

    BatchMode   f(w + dw) - f(w) on the rows of the training batch: one more forward
    JvpMode     the derivative of f along dw on the same rows, exactly: one more forward, in forward mode
    ProbeMode   f(w + dw) - f(w) on a batch of the user's: forward, backward, forward (fastfs._monitor.measure.probe)

A mode is asked before the optimizer step (:meth:`before_step`) and after it (:meth:`measure`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastfs._monitor.capture.capture import Capture
from fastfs._monitor.capture.passes import Pass
from fastfs._monitor.capture.replay import Replay
from fastfs._monitor.measure.row_sums import RowSums, Triple, from_direction, from_replay
from fastfs._network.input_copies import tensors_in
from fastfs._network.layers import Layer
from fastfs._network.perturbed import Perturbed, has_compiled, interpolate, load_forward_mode, tangents
from fastfs._network.structure import Edge, Structure, analyse, edge_of

__all__ = ["MODES", "BatchMode", "JvpMode", "Seen"]

MODES = ("batch", "probe", "jvp")

Warn = Callable[[str, str], None]


@dataclasses.dataclass
class Seen:
    """What second forwards have shown.

    Attributes:
        rows: of each pass, sums of rows.
        coarsest: per layer, spacing at 1 of the coarsest numbers that it was computed with; None where it was not seen.
        choices: integer results of top-k and argmax, of each pass.
    """

    rows: list[RowSums]
    coarsest: list[float] | None
    choices: list[list[Tensor]]

    def add(self, rows: RowSums, replay: Replay) -> None:
        self.rows.append(rows)
        self.choices.append(replay.choices)
        if replay.coarsest is not None:
            self.coarsest = list(map(max, replay.coarsest, self.coarsest or replay.coarsest))


class BatchMode:
    """Features before and backward vectors of the training step itself; features after from a second forward.

    Args:
        model: the model that the loop calls.
        layers: the watched layers.
        capture: of the training step.
        warn: called with a kind and a message where a layer cannot be measured.
    """

    method = "plain"

    def __init__(self, model: nn.Module, layers: Sequence[Layer], capture: Capture, warn: Warn) -> None:
        parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
        # Without the wrapper's collectives: the other ranks need not have a monitor.
        self._forward: nn.Module = model.module if isinstance(model, parallel) else model
        self.runs_compiled = has_compiled(model)  # its graphs run as they are, where no operation can be looked at
        self.astray: set[int] = set()  # layers that a second forward has called in another way
        self._layers = layers
        self._capture = capture
        self._warn = warn

    def clear(self) -> None:
        """The step is over."""
        self.astray = set()

    def unmoved(self, passed: Pass) -> RowSums:
        """Without a second forward: sums of the features and backward vectors alone."""
        after = [
            [(visit.shape, None if visit.before is None else visit.before.values) for visit in visits]
            for visits in passed.visits
        ]
        return from_replay(self._triples(passed, after))

    def measure(self, passes: Sequence[Pass]) -> Seen:
        """Sums of rows of every pass; the parameters are those after the step."""
        return self._see(passes, self._forward, guarded=not self.runs_compiled)

    def amplified(
        self, passes: Sequence[Pass], model: Perturbed, before: Sequence[Tensor], now: Sequence[Tensor], kappa: Tensor
    ) -> tuple[list[RowSums], list[RowSums], list[RowSums]]:
        """Sums of rows of every pass for f(w - kappa dw) and f(w + kappa dw) against f(w), and against each other.

        Features before are computed again where the training step's come from a compiled graph: all have to be rounded
        at the same places.
        """
        below, above = interpolate(before, now, -kappa), interpolate(before, now, kappa)
        result: tuple[list[RowSums], list[RowSums], list[RowSums]] = ([], [], [])
        for passed in passes:
            base = self._replay(passed, _at(model, before)).after if model.compiled else None
            minus, plus = (
                self._triples(passed, self._replay(passed, _at(model, v)).after, base) for v in (below, above)
            )
            central = [
                [Triple(m.after, p.after, p.backward, p.total) for m, p in zip(*visits, strict=True)]
                for visits in zip(minus, plus, strict=True)
            ]
            for sums, triples in zip(result, (minus, plus, central), strict=True):
                sums.append(from_replay(triples))
        return result

    def eager(self, passes: Sequence[Pass], model: Perturbed, values: Sequence[Tensor]) -> Seen:
        """Between the features of the training step and those of an eager forward with these parameters."""
        return self._see(passes, _at(model, values))

    def rehearse(self, passes: Sequence[Pass], model: Perturbed, values: Sequence[Tensor]) -> Seen:
        """The same before a compiled forward, which is stricter: what is put back after this one will not be then."""
        return self._see(passes, _at(model, values), strict=True)

    def prove(self, passes: Sequence[Pass], model: Perturbed, values: Sequence[Tensor]) -> Seen:
        """Before the step: the features of a second forward with the parameters of the first, against its own.

        The second forward is the one that the measurement will be made with.
        """
        return self._see(passes, self._forward, guarded=not self.runs_compiled)

    def in_float32(self, passes: Sequence[Pass], model: Perturbed, before: Sequence[Tensor]) -> list[RowSums]:
        """Sums of rows whose ``before_sq`` is that of a forward in float32; the other sums mean nothing."""

        def cast(x: Any) -> Any:
            return x.float() if isinstance(x, Tensor) and x.is_floating_point() and x.element_size() < 4 else x

        values = [cast(value) for value in before]
        result = []
        for passed in passes:
            assert passed.state is not None
            args, kwargs = tree_map(cast, (passed.args, passed.kwargs))
            exact = passed.with_(args, kwargs, passed.state.without_autocast(cast))
            after = self._replay(exact, _at(model, values), single=True).after
            triples = self._triples(exact, after)
            result.append(from_replay([[Triple(t.after, t.after, t.backward, t.total) for t in v] for v in triples]))
        return result

    def _replay(self, passed: Pass, forward: Callable[..., Any], **options: Any) -> Replay:
        return self._capture.replayer.replay(passed, forward, **options)

    def _see(self, passes: Sequence[Pass], forward: Callable[..., Any], **options: Any) -> Seen:
        seen = Seen([], None, [])
        for passed in passes:
            replay = self._replay(passed, forward, **options)
            seen.add(from_replay(self._triples(passed, replay.after)), replay)
        return seen

    def _triples(self, passed: Pass, after: Any, base: Any = None) -> list[list[Triple]]:
        triples: list[list[Triple]] = []
        for layer, first, second in zip(self._layers, passed.visits, after, strict=True):
            triples.append([])
            if [visit.shape for visit in first] != [shape for shape, _ in second]:
                self.astray.add(layer.index)
                self._warn(
                    layer.name,
                    f"layer {layer.name!r} ran {len(first)} times in the forward and {len(second)} times in the second "
                    "one on the same inputs, or with other shapes: it is left out. The forward depends on something "
                    "besides inputs, parameters, buffers and global random numbers",
                )
                continue
            for number, (visit, (_, rows)) in enumerate(zip(first, second, strict=True)):
                if visit.measurable and visit.before is not None and rows is not None:
                    before = visit.before.values if base is None else base[layer.index][number][1]
                    # No gradient came to a feature in the graph: the loss does not depend on it.
                    backward = torch.zeros_like(before) if visit.backward is None else visit.backward
                    triples[-1].append(Triple(before, rows, backward, visit.before.total))
        return triples

    def eager_structure(self, passed: Pass, model: Perturbed, values: Sequence[Tensor]) -> Structure | None:
        """From a forward of its own, where the training step's graph does not show it: with gradient, uncompiled."""
        assert passed.state is not None
        edges: list[list[Edge | None]] = [[] for _ in self._layers]
        leaves = [v.detach().requires_grad_(v.requires_grad) for v in values]
        names = [str(index) for index in range(len(leaves))]

        def run(_guard: Any) -> Structure | None:
            output = model(leaves, *passed.args, **passed.kwargs)
            outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
            return analyse(edges, outputs, leaves, names) if outputs else None

        def sink(layer: Layer, features: Tensor) -> None:
            edges[layer.index].append(edge_of(features))

        found: Structure | None = self._capture.replayer.run(
            passed.state, sink, run, grad=True, inputs=tensors_in((passed.args, passed.kwargs))
        )
        return found


class JvpMode(BatchMode):
    """The first-order feature update: the derivative of the features along the real parameter update."""

    method = "jvp"

    def __init__(self, model: nn.Module, layers: Sequence[Layer], capture: Capture, warn: Warn) -> None:
        super().__init__(model, layers, capture, warn)
        self.cut: set[int] = set()  # layers whose first-order change is not complete
        self.runs_compiled = False
        load_forward_mode()

    def clear(self) -> None:
        super().clear()
        self.cut = set()

    def prove(self, passes: Sequence[Pass], model: Perturbed, values: Sequence[Tensor]) -> Seen:
        return self.eager(passes, model, values)

    def along(self, passes: Sequence[Pass], model: Perturbed, before: Sequence[Tensor], now: Sequence[Tensor]) -> Seen:
        """Sums of rows of every pass.

        Args:
            passes: captured in the training step.
            model: as a function of its parameters.
            before, now: parameters before and after the step.
        """
        directions = [n.detach() - b for b, n in zip(before, now, strict=True)]
        seen = Seen([], None, [])
        for passed in passes:
            with model.duals(before, directions) as duals:
                replay = self._replay(passed, _at(model, duals), see=tangents)
            seen.add(from_direction(self._triples(passed, replay.after)), replay)
            self.cut |= replay.cut
        return seen


def _at(model: Perturbed, values: Sequence[Tensor]) -> Callable[..., Any]:
    """The model's forward with these values of its parameters."""
    return lambda *args, **kwargs: model(values, *args, **kwargs)
