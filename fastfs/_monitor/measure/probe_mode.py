"""Probe mode: forward and backward on a batch of the user's before the step, forward after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._functional import update_stats
from fastfs._monitor.capture.forward_capture import ForwardCapture
from fastfs._monitor.capture.sampling import KeptRows
from fastfs._monitor.measure.capture_mode import (
    BackwardReference,
    CaptureMode,
    ModeResources,
    StepInputs,
    UpdateEvidence,
)
from fastfs._monitor.measure.learned_structure import LearnedStructure
from fastfs._monitor.measure.loss_change import LossChange
from fastfs._monitor.measure.measured_update import MeasuredUpdate
from fastfs._monitor.measure.observation import FeatureObservation
from fastfs._monitor.measure.row_sums import RowSums, Triple, from_replay
from fastfs._network.feature_tensors import strided
from fastfs._network.guard import Guard
from fastfs._network.input_copies import copy_arguments, tensors_in
from fastfs._network.layers import Layer
from fastfs._network.state import ForwardState
from fastfs._network.structure import Edge, Structure, analyse, edge_of
from fastfs._record.row_reasons import NO_ROOM, NOT_RUN
from fastfs._stats import FeatureStats, ParameterStats

__all__ = ["ProbeMode"]


class ProbeMode(CaptureMode):
    """Measures f(w + dw) - f(w) on the probe. Neither ``.grad`` nor the training loop sees anything of it."""

    method = "plain"
    captures_training = False
    needs_previous = True

    def __init__(self, resources: ModeResources) -> None:
        super().__init__(resources)
        assert resources.probe is not None
        self._probe = resources.probe
        self._replayer = resources.replayer
        self._sampler = resources.keeper.sampler
        self._state: ForwardState | None = None  # of the first measured step, whose random numbers are used again
        self._structure: Structure | None = None
        self._flags: list[bool] = []  # which parameters required a gradient when the structure was computed
        self._coarsest: list[float] = []
        self.clear()

    @staticmethod
    def momentary_bytes(parameters: Sequence[Tensor]) -> int:
        """Returns the bytes of gradients and updates in float32; casts of single parameters come on top."""
        return 2 * sum(p.numel() * 4 for p in parameters)

    def clear(self) -> None:
        """Forgets the step, but neither the structure nor the random numbers of the probe."""
        # Per layer and call, the rows of the features and the rows of the gradients that have arrived.
        self._before: list[list[tuple[KeptRows, list[Tensor]]]] = []
        self._gradients: list[Tensor | None] = []
        self._loss: Tensor | None = None
        self._loss_after: Tensor | None = None
        self._loss_spacing = 0.0
        self._account: ForwardCapture | None = None
        self._called_with: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self._without_room: set[int] = set()

    def prepare(self, step: StepInputs) -> None:
        """Computes features, backward vectors and gradients on the probe, at the parameters before the step."""
        layers, keeper, parameters = self._resources.layers, self._resources.keeper, step.parameters
        state = self._fixed_state()
        leaves = [self._probe.cast(p.detach()).detach().requires_grad_(p.requires_grad) for p in parameters]
        self._before = [[] for _ in layers]
        self._account = account = keeper.account()
        edges: list[list[Edge | None]] = [[] for _ in layers]
        self._coarsest = [0.0] * len(layers)
        watching: list[Guard] = []

        def handle(layer: Layer, features: Tensor) -> None:
            if torch._C._current_graph_task_id() != -1:  # the recomputation of a checkpoint
                return
            for guard in watching:
                self._coarsest[layer.index] = guard.coarsest
            kept = keeper.keep(account, features)
            if kept is None:
                self._without_room.add(layer.index)
                return
            arrived: list[Tensor] = []
            self._before[layer.index].append((kept, arrived))
            edges[layer.index].append(edge_of(features))
            if features.requires_grad:  # a tensor hook, since a later operation may modify the features in place
                features.register_hook(lambda b: arrived.append(self._sampler.keep(strided(b), kept.choice).values))

        def run(model: nn.Module) -> None:
            args, kwargs = self._called_with
            loss = self._loss_of(model(*args, **kwargs))
            flags = [p.requires_grad for p in parameters]
            if self._structure is None or flags != self._flags:
                self._flags = flags
                self._structure = analyse(edges, [loss], leaves, [str(index) for index in range(len(leaves))])
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
            self._gradients = [next(found) if leaf.requires_grad else None for leaf in leaves]
            self._loss = loss.detach().to(self._resources.device, torch.float64).reshape(())

        def forward(guard: Guard | None) -> None:
            watching.extend([] if guard is None else [guard])
            step.model.within(leaves, run)

        args, kwargs = self._inputs()
        self._called_with = args, kwargs
        self._replayer.run(state, handle, forward, grad=True, allowed=tensors_in((args, kwargs)))

    def check(self, step: StepInputs) -> FeatureStats:
        """Runs the forward on the probe once more."""
        return self._resources.totals([self._second_forward(step)]).stats

    def structure(self, step: StepInputs, learned: LearnedStructure) -> Structure | None:
        """Returns the structure in the graph of the forward on the probe."""
        return self._structure

    def reference(
        self, step: StepInputs, update: MeasuredUpdate, loss: Tensor | None, scale: Tensor
    ) -> BackwardReference:
        """Returns the gradients and the loss of the probe, which has no loss scale."""
        scale = torch.ones_like(scale)
        loss = self._loss if loss is None else loss
        return BackwardReference(self._with_gradients(step, update), loss, scale)

    def observe(self, step: StepInputs, evidence: UpdateEvidence) -> FeatureObservation:
        """Runs the forward on the probe after the step."""
        resources = self._resources
        sums = resources.totals([self._second_forward(step, loss=True)])
        eps = resources.on_device(self._coarsest)
        assert self._loss is not None
        assert self._loss_after is not None
        loss = LossChange(self._loss, self._loss_after - self._loss, self._loss_spacing, certain=True)
        verdict = resources.assessor.assess_replay(sums, eps, evidence.depth)
        return FeatureObservation(verdict, sums, eps, self._absent(), loss=loss)

    def _loss_of(self, output: Any) -> Tensor:
        """Returns the loss of the probe, of one element."""
        loss = self._probe.loss(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"probe: expected a loss that gives a scalar tensor, got {loss!r}")
        self._loss_spacing = torch.finfo(loss.dtype).eps
        return loss

    def _inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns copies of the probe's inputs, to which the forward may write."""
        args, kwargs = copy_arguments((self._probe.args, self._probe.kwargs), Tensor.clone)
        return args, kwargs

    def _second_forward(self, step: StepInputs, *, loss: bool = False) -> RowSums:
        """Runs the forward, and the loss, at the current parameters; returns sums against the features before."""
        after: list[list[Tensor]] = []

        def handle(layer: Layer, features: Tensor) -> None:
            if len(after[layer.index]) == len(self._before[layer.index]):  # there was no room for its rows
                return
            kept, _ = self._before[layer.index][len(after[layer.index])]
            after[layer.index].append(self._sampler.keep(strided(features), kept.choice).values)

        values = [self._probe.cast(p.detach()) for p in step.parameters]

        def forward(grad: bool) -> None:
            after[:] = [[] for _ in self._resources.layers]
            args, kwargs = self._inputs()

            def run(model: nn.Module) -> None:
                output = model(*args, **kwargs)
                if loss:
                    found = self._loss_of(output).detach()
                    self._loss_after = found.to(self._resources.device, torch.float64).reshape(())

            self._replayer.run(
                self._fixed_state(),
                handle,
                lambda _guard: step.model.within(values, run),
                grad=grad,
                allowed=tensors_in((args, kwargs)),
            )

        self._replayer.with_graph_if_needed(forward)
        triples = [
            [
                Triple(kept.values, rows, arrived[0], kept.choice)
                for (kept, arrived), rows in zip(calls, found, strict=True)
                if arrived
            ]
            for calls, found in zip(self._before, after, strict=True)
        ]
        return from_replay(triples)

    def _absent(self) -> list[int]:
        """Returns per layer why it has no rows in the probe; 0 where it has."""
        return [
            0 if calls else NO_ROOM if layer.index in self._without_room else NOT_RUN
            for layer, calls in zip(self._resources.layers, self._before, strict=True)
        ]

    def _with_gradients(self, step: StepInputs, update: MeasuredUpdate) -> MeasuredUpdate:
        """Returns the update with the gradients of the probe; dw, |w| and |dw| are the same."""
        before, now = step.previous, step.parameters
        given = [(i, g) for i, g in enumerate(self._gradients) if g is not None]
        directions = [self._probe.cast(now[i].detach()) - self._probe.cast(before[i]) for i, _ in given]
        stats = update_stats([g for _, g in given], directions)
        self._gradients = []
        sums = update.stats.sums.clone()
        index = torch.tensor([i for i, _ in given]).to(sums.device, non_blocking=True)
        for name in ("dot", "gradient_sq"):
            column = ParameterStats.names.index(name)
            sums.select(1, column).zero_()
            sums[:, column].index_copy_(0, index, getattr(stats, name))
        return MeasuredUpdate(ParameterStats(sums), torch.zeros_like(update.reason))

    def _fixed_state(self) -> ForwardState:
        """Returns the model's current buffers and modes, with the same random numbers at every measured step."""
        state = ForwardState.take(self._resources.model, inventories=self._replayer.inventories)
        if self._state is None:
            self._state = state
        state = dataclasses.replace(state, randomness=self._state.randomness)
        return state if self._probe.dtype is None else state.without_autocast(self._probe.cast)
