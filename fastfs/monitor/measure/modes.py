"""The ways to see what an update does to the features: on the training batch, to first order, on a probe batch.

    BatchMode   f(w + dw) - f(w) on the rows of the training batch: one more forward
    JvpMode     the derivative of f along dw on the same rows, exactly: one more forward, in forward mode
    ProbeMode   f(w + dw) - f(w) on a batch of the user's: forward, backward, forward

A mode is asked before the optimizer step (:meth:`before_step`) and after it (:meth:`measure`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastfs.functional import update_stats
from fastfs.monitor.capture.capture import Capture
from fastfs.monitor.capture.passes import Pass
from fastfs.monitor.capture.replay import Replay
from fastfs.monitor.capture.sampling import Kept, Sampler
from fastfs.monitor.measure.row_reasons import NO_ROOM, NOT_RUN
from fastfs.monitor.measure.sums import RowSums, Triple, from_direction, from_replay
from fastfs.network.guard import Guard
from fastfs.network.inputs import copy_arguments, tensors_in
from fastfs.network.layers import Layer
from fastfs.network.outputs import strided
from fastfs.network.perturbed import Perturbed, has_compiled, interpolate, load_forward_mode, tangents
from fastfs.network.state import ForwardState
from fastfs.network.structure import Edge, Structure, analyse, edge_of
from fastfs.stats import UpdateStats

__all__ = ["MODES", "BatchMode", "JvpMode", "Probe", "ProbeMode", "Seen"]

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
        self._compiled = has_compiled(model)  # its graphs are to run as they are
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
        return self._see(passes, self._forward, guarded=not self._compiled)

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

    def prove(self, passes: Sequence[Pass], model: Perturbed, values: Sequence[Tensor]) -> Seen:
        """Before the step: the features of a second forward with the parameters of the first, against its own.

        The second forward is the one that the measurement will be made with.
        """
        return self._see(passes, self._forward, guarded=not self._compiled)

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


class Probe:
    """A fixed batch and loss to measure on, instead of the training batch.

    The same rows at every measured step make curves comparable, and float32 keeps 16-bit rounding out of the angle.

    Args:
        inputs: what the model is called with: a tensor, a tuple of positional or a dictionary of keyword arguments.
        loss: function of the model's output that gives a scalar; it holds the targets.
        dtype: what parameters and floating-point inputs are cast to for the probe; None leaves them as they are, and
            autocast as it is around ``optimizer.step()``. Autocast is off otherwise.

    Raises:
        TypeError: inputs of which no copy can be made, a loss that is no function, or a dtype that is none.
    """

    def __init__(
        self, inputs: Any, loss: Callable[[Any], Tensor], *, dtype: torch.dtype | None = torch.float32
    ) -> None:
        if not callable(loss):
            raise TypeError(f"probe: expected a function of the model's output as the loss, got {loss!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"probe: expected a floating-point dtype or None, got {dtype!r}")
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        inputs = copy_arguments(inputs, lambda x: self._cast(x.detach().clone(), dtype))
        if isinstance(inputs, Mapping):
            self.kwargs = dict(inputs)
        else:
            self.args = inputs if isinstance(inputs, tuple) else (inputs,)
        self.loss = loss
        self.dtype = dtype

    def cast(self, x: Tensor) -> Tensor:
        return self._cast(x, self.dtype)

    @staticmethod
    def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
        return x.to(dtype) if dtype is not None and x.is_floating_point() else x


class ProbeMode:
    """Forward and backward on the probe before the step, forward after it; ``.grad`` and the loop see nothing of it."""

    method = "plain"

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], capture: Capture, sampler: Sampler, probe: Probe
    ) -> None:
        self._model = model
        self._layers = layers
        self._capture = capture
        self._sampler = sampler
        self._probe = probe
        self._state: ForwardState | None = None
        self._before: list[list[tuple[Kept, list[Tensor]]]] = []
        self._account: Pass | None = None
        self._gradients: list[Tensor | None] = []
        self._roomless: set[int] = set()
        self._called_with: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self.loss: Tensor | None = None
        self.structure: Structure | None = None
        self._flags: list[bool] = []  # which parameters had gradients in it
        self.astray: set[int] = set()
        self.coarsest: list[float] = []

    @property
    def dtype(self) -> torch.dtype | None:
        """What the probe is computed in, if the user has not left it to the model."""
        return self._probe.dtype

    def before_step(self, perturbed: Perturbed, parameters: Sequence[Tensor]) -> None:
        """Features, backward vectors and gradients at the parameters before the step."""
        state = self._fixed_state()
        leaves = [self._probe.cast(p.detach()).detach().requires_grad_(p.requires_grad) for p in parameters]
        self._before = [[] for _ in self._layers]
        self._account = account = self._capture.account()
        edges: list[list[Edge | None]] = [[] for _ in self._layers]

        self.coarsest = [0.0] * len(self._layers)
        watching: list[Guard] = []

        def sink(layer: Layer, features: Tensor) -> None:
            if torch._C._current_graph_task_id() != -1:  # the recomputation of a checkpoint
                return
            for guard in watching:
                self.coarsest[layer.index] = guard.coarsest
            kept = self._capture.keep(account, features)
            if kept is None:
                self._roomless.add(layer.index)
                return
            arrived: list[Tensor] = []
            self._before[layer.index].append((kept, arrived))
            edges[layer.index].append(edge_of(features))
            if features.requires_grad:  # a tensor hook, since a following operation may work in place
                features.register_hook(
                    lambda b: arrived.append(self._sampler.keep(strided(b), kept.values.shape[0]).values)
                )

        def run(model: nn.Module) -> None:
            args, kwargs = self._called_with
            loss = self._probe.loss(model(*args, **kwargs))
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise TypeError(f"probe: expected a loss that gives a scalar tensor, got {loss!r}")
            flags = [p.requires_grad for p in parameters]
            if self.structure is None or flags != self._flags:
                self._flags = flags
                self.structure = analyse(edges, [loss], leaves, [str(index) for index in range(len(leaves))])
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
            self._gradients = [next(found) if leaf.requires_grad else None for leaf in leaves]
            self.loss = loss.detach().to(torch.float64).reshape(())

        def forward(guard: Guard | None) -> None:
            watching.extend([] if guard is None else [guard])
            perturbed.within(leaves, run)

        args, kwargs = self._inputs()
        self._called_with = args, kwargs
        self._capture.replayer.run(state, sink, forward, grad=True, allowed=tensors_in((args, kwargs)))

    def prove(self, perturbed: Perturbed, parameters: Sequence[Tensor]) -> RowSums:
        """Before the step: the features of a second forward on the probe against those of the first."""
        return self.measure(perturbed, parameters)

    def _inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies, which the forward may write to."""
        args, kwargs = copy_arguments((self._probe.args, self._probe.kwargs), Tensor.clone)
        return args, kwargs

    def measure(self, perturbed: Perturbed, parameters: Sequence[Tensor]) -> RowSums:
        """Sums of rows of the probe; the parameters are those after the step."""
        after: list[list[Tensor]] = []

        def sink(layer: Layer, features: Tensor) -> None:
            if len(after[layer.index]) == len(self._before[layer.index]):  # no room for its rows
                return
            kept, _ = self._before[layer.index][len(after[layer.index])]
            after[layer.index].append(self._sampler.keep(strided(features), kept.values.shape[0]).values)

        values = [self._probe.cast(p.detach()) for p in parameters]

        def forward(grad: bool) -> None:
            after[:] = [[] for _ in self._layers]
            args, kwargs = self._inputs()
            self._capture.replayer.run(
                self._fixed_state(),
                sink,
                lambda _guard: perturbed(values, *args, **kwargs),
                grad=grad,
                allowed=tensors_in((args, kwargs)),
            )

        self._capture.replayer.with_graph_if_needed(forward)
        triples = [
            [
                Triple(kept.values, rows, arrived[0], kept.total)
                for (kept, arrived), rows in zip(visits, found, strict=True)
                if arrived
            ]
            for visits, found in zip(self._before, after, strict=True)
        ]
        return from_replay(triples)

    def absent(self) -> list[int]:
        """Per layer why it has no rows in the probe; 0 where it has."""
        return [
            0 if visits else NO_ROOM if layer.index in self._roomless else NOT_RUN
            for layer, visits in zip(self._layers, self._before, strict=True)
        ]

    def updates(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> tuple[UpdateStats, list[int]]:
        """<g, dw> with the gradients of the probe, and which parameters they are of."""
        found = [(i, g) for i, g in enumerate(self._gradients) if g is not None]
        directions = [self._probe.cast(now[i].detach()) - self._probe.cast(before[i]) for i, _ in found]
        stats = update_stats([g for _, g in found], directions)
        self._gradients = []
        return stats, [i for i, _ in found]

    def clear(self) -> None:
        self._before, self._gradients, self.loss, self._account = [], [], None, None
        self._called_with = (), {}
        self._roomless = set()

    def _fixed_state(self) -> ForwardState:
        """The model's buffers and modes of now, with the same random numbers at every measured step."""
        state = ForwardState.take(self._model)
        if self._state is None:
            self._state = state
        state = dataclasses.replace(state, randomness=self._state.randomness)
        return state if self._probe.dtype is None else state.without_autocast(self._probe.cast)


def _at(model: Perturbed, values: Sequence[Tensor]) -> Callable[..., Any]:
    """The model's forward with these values of its parameters."""
    return lambda *args, **kwargs: model(values, *args, **kwargs)
