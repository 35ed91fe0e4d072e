"""The third way to see what an update does to the features: on a probe batch of the user's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._functional import update_stats
from fastfs._monitor.capture.capture import Capture
from fastfs._monitor.capture.passes import Pass
from fastfs._monitor.capture.sampling import Kept, Sampler
from fastfs._monitor.measure.measured_update import MeasuredUpdate
from fastfs._monitor.measure.row_reasons import NO_ROOM, NOT_RUN
from fastfs._monitor.measure.row_sums import RowSums, Triple, from_replay
from fastfs._network.feature_tensors import strided
from fastfs._network.guard import Guard
from fastfs._network.input_copies import copy_arguments, tensors_in
from fastfs._network.layers import Layer
from fastfs._network.perturbed import Perturbed
from fastfs._network.state import ForwardState
from fastfs._network.structure import Edge, Structure, analyse, edge_of
from fastfs._stats import ParameterStats

__all__ = ["Probe", "ProbeMode"]


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

    def with_gradients(self, found: MeasuredUpdate, before: Sequence[Tensor], now: Sequence[Tensor]) -> MeasuredUpdate:
        """An update with the gradients of the probe; dw, |w| and |dw| are the same."""
        given = [(i, g) for i, g in enumerate(self._gradients) if g is not None]
        directions = [self._probe.cast(now[i].detach()) - self._probe.cast(before[i]) for i, _ in given]
        stats = update_stats([g for _, g in given], directions)
        self._gradients = []
        sums = found.stats.sums.clone()
        index = torch.tensor([i for i, _ in given]).to(sums.device, non_blocking=True)
        for name in ("dot", "gradient_sq"):
            column = ParameterStats.names.index(name)
            sums[:, column] = 0.0
            sums[:, column].index_copy_(0, index, getattr(stats, name))
        return MeasuredUpdate(ParameterStats(sums), torch.zeros_like(found.reason))

    def clear(self) -> None:
        self._before, self._gradients, self.loss, self._account = [], [], None, None
        self._called_with = (), {}
        self._roomless = set()

    def _fixed_state(self) -> ForwardState:
        """The model's buffers and modes of now, with the same random numbers at every measured step."""
        state = ForwardState.take(self._model, inventories=self._capture.replayer.inventories)
        if self._state is None:
            self._state = state
        state = dataclasses.replace(state, randomness=self._state.randomness)
        return state if self._probe.dtype is None else state.without_autocast(self._probe.cast)
