"""What the capture modes on the training batch share: rows and backward vectors of the training step itself."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastfs._monitor.capture.forward_capture import ForwardCapture
from fastfs._monitor.capture.replay import Features, ReplayedForward
from fastfs._monitor.measure import trust
from fastfs._monitor.measure.capture_mode import CaptureMode, ModeResources, StepInputs, UpdateEvidence
from fastfs._monitor.measure.details import StepDetails
from fastfs._monitor.measure.learned_structure import LearnedStructure
from fastfs._monitor.measure.loss_change import LossChange, of_outputs
from fastfs._monitor.measure.observation import FeatureObservation, without_update
from fastfs._monitor.measure.row_sums import LayerSums, RowSums, Triple, from_replay
from fastfs._network.fully_sharded import GraphLeaves
from fastfs._network.guard import WriteError
from fastfs._network.input_copies import tensors_in
from fastfs._network.layers import Layer
from fastfs._network.perturbed import Perturbed, has_compiled
from fastfs._network.structure import Edge, Structure, analyse, edge_of
from fastfs._record import row_reasons
from fastfs._stats import FeatureStats

__all__ = ["ReplaySums", "TrainingMode", "model_at"]

_OF_ALL = (row_reasons.UNMATCHED, row_reasons.PARTIAL)  # of one call, which exclude all calls of a layer


@dataclass
class ReplaySums:
    """Sums from second forwards on all captured training forwards.

    Attributes:
        rows: Sums of rows of each forward.
        after: Shapes and rows of the features of each forward, as :class:`ReplayedForward` has them.
        coarsest: Per layer, spacing at 1 of the coarsest numbers that were computed with; None if unknown.
        choices: Integer results of top-k and argmax, of each forward.
        scalars: Outputs of each forward that may be a loss, by their number.
    """

    rows: list[RowSums] = field(default_factory=list)
    after: list[Features] = field(default_factory=list)
    coarsest: list[float] | None = None
    choices: list[list[Tensor]] = field(default_factory=list)
    scalars: list[dict[int, Tensor]] = field(default_factory=list)

    def add(self, rows: RowSums, replay: ReplayedForward) -> None:
        """Adds a second forward."""
        self.rows.append(rows)
        self.after.append(replay.after)
        self.choices.append(replay.choices)
        self.scalars.append(replay.scalars)
        if replay.coarsest is not None:
            self.coarsest = list(map(max, replay.coarsest, self.coarsest or replay.coarsest))


class TrainingMode(CaptureMode):
    """Takes features before and backward vectors from the training step, and features after from a second forward.

    With ``samples=``, second forwards run on a few samples of each batch. They are then run before the step, too, at
    every measured step: this shows whether samples act on one another, and gives features before that were computed as
    those after, since matrix products of another size are rounded in another way.
    """

    method = "plain"
    captures_training = True

    def __init__(self, resources: ModeResources) -> None:
        super().__init__(resources)
        model, parallel = resources.model, (nn.parallel.DistributedDataParallel, nn.DataParallel)
        # Without the wrapper's collectives: the other ranks need not have a monitor.
        self._forward: nn.Module = model.module if isinstance(model, parallel) else model
        self._subsets = resources.keeper.sampler.samples is not None
        self._details = resources.replayer.observer = resources.details
        self.checks_every_step = self._subsets or self._details is not None
        if self._subsets:
            self.unrepeated = row_reasons.NOT_ALONE
        # Whether second forwards run compiled graphs, which cannot be guarded. On some samples of a batch they run
        # eagerly: another batch size would add graphs, which training might run later.
        self._runs_compiled = has_compiled(model) and not self._subsets
        self.clear()

    def clear(self) -> None:
        """Forgets the step."""
        self._other_calls: set[int] = set()  # layers that a second forward has called differently
        self._cut_off: set[int] = set()  # layers whose first-order change is incomplete
        self._rehearsed = False  # the step's forwards were run eagerly before their compiled graphs
        self._eager_coarsest: list[float] | None = None  # of these eager forwards
        self._checked_choices: list[list[Tensor]] = []
        self._base: dict[ForwardCapture, Features] = {}  # features before the step of the samples alone
        if self._details is not None:
            self._details.clear()

    # Before the step

    def refusal(self, forwards: Sequence[ForwardCapture]) -> int | None:
        """Refuses forwards with other weights than the model's, or on inputs that depend on parameters."""
        if any(p.other_weights for p in forwards):
            return row_reasons.OTHER_WEIGHTS
        return row_reasons.DEPENDENT if any(p.dependent for p in forwards) else None

    def graphs(self, forwards: Sequence[ForwardCapture]) -> Hashable:
        """Returns the signatures of the forwards' graphs."""
        return frozenset(p.signature for p in forwards)

    def check(self, step: StepInputs) -> FeatureStats:
        """Runs the second forward with the parameters of the first one."""
        if self._details is not None:
            self._details.before(step.forwards, step.parameters)
        self._rehearse(step)
        result = self._repeat(step)
        self._checked_choices = result.choices
        if self._subsets:
            self._base = dict(zip(step.forwards, result.after, strict=True))
        return self._resources.totals(result.rows).stats

    # After it

    def structure(self, step: StepInputs, learned: LearnedStructure) -> Structure | None:
        """Returns the structure in the graphs of the training forwards, or in that of an eager forward."""
        return learned.of_forwards(step.forwards, step.parameters, lambda: self._eager_structure(step))

    def observe(self, step: StepInputs, evidence: UpdateEvidence) -> FeatureObservation:
        """Runs the second forwards, unless they cannot repeat the first ones."""
        resources, layers, assessor = self._resources, len(self._resources.layers), self._resources.assessor
        if self.refusal(step.forwards) is not None:
            sums = resources.totals([self._unmoved(p) for p in step.forwards])
            eps = resources.on_device(assessor.precision(layers, step.forwards, None))
            sums = dataclasses.replace(sums, stats=without_update(sums.stats))
            verdict = assessor.assess_replay(sums, eps, evidence.depth)
            why = {"why": row_reasons.REASONS[self.refusal(step.forwards) or 0]}
            details = None if self._details is None else StepDetails({}, why)
            return FeatureObservation(verdict, sums, eps, self._absent(step.forwards), details=details)
        if self._details is not None:
            self._details.after()
            self._rehearsed = False  # compiled graphs are not looked into
        self._rehearse(step)
        result = self._replay(step)
        details = None if self._details is None else self._details.finish()
        sums = resources.totals(result.rows)
        coarsest = assessor.precision(layers, step.forwards, result.coarsest or self._eager_coarsest)
        eps = resources.on_device(coarsest)
        verdict, sums, curvature = self._assess(step, evidence, sums, eps, max(coarsest, default=0.0))
        if self._subsets:  # no sum contains the difference to the first forward
            verdict = dataclasses.replace(verdict, self_contained=torch.ones_like(verdict.valid))
        absent = self._absent(step.forwards)
        choices = result.choices, self._checked_choices
        loss, rest = self._loss_change(step, result), self._nonlinear(eps, evidence.depth)
        return FeatureObservation(verdict, sums, eps, absent, curvature, *choices, loss, rest, details)

    def accompany(self, step: StepInputs) -> None:
        """Runs the second forwards for the sake of other ranks."""
        self._replay(step)

    # What differs between the modes on the training batch

    @abstractmethod
    def _replay(self, step: StepInputs) -> ReplaySums:
        """Runs the second forwards after the step."""

    @abstractmethod
    def _repeat(self, step: StepInputs) -> ReplaySums:
        """Runs them before the step, in the same way and with the parameters of the first forwards."""

    @abstractmethod
    def _assess(
        self, step: StepInputs, evidence: UpdateEvidence, sums: LayerSums, eps: Tensor, coarsest: float
    ) -> tuple[trust.AssessedUpdate, LayerSums, Tensor | None]:
        """Returns the verdict, the sums for the record, and the curvature of the step if it is known.

        Args:
            step: The step.
            evidence: What is known of the update besides the features.
            sums: Sums from the second forwards.
            eps: Spacing at 1 of the coarsest numbers in each layer.
            coarsest: The largest of these, on the host.
        """

    def _loss_change(self, step: StepInputs, result: ReplaySums) -> LossChange | None:
        """Returns what the second forwards after the step say of the loss, None if they do not compute it."""
        return of_outputs(step.forwards, result.scalars, self._resources.device)

    def _nonlinear(self, eps: Tensor, depth: Tensor) -> Tensor | None:
        """Returns the sums of :func:`fastfs._record.ranks.nonlinear.nonlinear_columns`; None if they are unknown."""
        return None

    # Second forwards

    def _rehearse(self, step: StepInputs) -> None:
        """Runs eager forwards before compiled graphs run again, because only they can be guarded.

        At every measured step, since a forward may write to something only now and then.
        """
        if self._runs_compiled and not self._rehearsed:
            forward = model_at(step.model, step.parameters)
            self._eager_coarsest = self._run(step.forwards, forward, strict=True).coarsest
            self._rehearsed = True

    def _eager(self, step: StepInputs, values: Sequence[Tensor]) -> ReplaySums:
        """Returns sums between the training step's features and those of eager forwards with these parameters."""
        return self._run(step.forwards, model_at(step.model, values))

    def _same_function(self, verdict: trust.AssessedUpdate, step: StepInputs) -> trust.AssessedUpdate:
        """Refuses layers where eager forwards differ from the compiled ones that the backward vectors come from."""
        if not step.model.compiled or self._subsets:  # of samples, the check has shown it
            return verdict
        result = self._eager(step, step.previous)
        return self._resources.assessor.refuse_other_masks(verdict, self._resources.totals(result.rows).stats)

    def _run_one(self, captured: ForwardCapture, forward: Callable[..., Any], **options: Any) -> ReplayedForward:
        return self._resources.replayer.replay(captured, self._resources.linked(forward), **options)

    def _run(self, forwards: Sequence[ForwardCapture], forward: Callable[..., Any], **options: Any) -> ReplaySums:
        result = ReplaySums()
        failed: Exception | None = None
        self._resources.replayer.begun = True
        for captured in forwards:
            try:
                replay = self._run_one(captured, forward, **options)
                triples = self._triples(captured, replay.after, self._base.get(captured))
                result.add(from_replay(triples), replay)
            except Exception as error:
                if not self._resources.replayer.together or isinstance(error, WriteError):
                    raise
                failed = failed or error  # the other ranks are in the next forward
        if failed is not None:
            raise failed
        return result

    def _unmoved(self, captured: ForwardCapture) -> RowSums:
        """Returns sums over features and backward vectors without a second forward."""
        after: Features = [
            [(call.shape, None if call.before is None else call.before.values) for call in calls]
            for calls in captured.calls
        ]
        return from_replay(self._triples(captured, after))

    def _triples(self, captured: ForwardCapture, after: Features, base: Features | None = None) -> list[list[Triple]]:
        """Combines the rows of a first and a second forward, per layer and call.

        Args:
            captured: The first forward.
            after: Shape and rows per layer and call of the second forward.
            base: The same of a forward that replaces the first one's features; None for these.

        Returns:
            The rows of both forwards with the backward vector, per layer and call.
        """
        triples: list[list[Triple]] = []
        for layer, first, second in zip(self._resources.layers, captured.calls, after, strict=True):
            triples.append([])
            others = [second] if base is None else [second, base[layer.index]]
            if any([call.shape for call in first] != [shape for shape, _ in each] for each in others):
                self._other_calls.add(layer.index)
                self._resources.warn(
                    layer.name,
                    f"layer {layer.name!r} ran {len(first)} times in the forward and {len(second)} times in the second "
                    "one on the same inputs, or with other shapes: it is left out. The forward depends on something "
                    "besides inputs, parameters, buffers and global random numbers",
                )
                continue
            for number, (call, (_, rows)) in enumerate(zip(first, second, strict=True)):
                before = None if call.before is None else call.before.values
                if base is not None:
                    before = base[layer.index][number][1]
                if call.measurable and call.before is not None and before is not None and rows is not None:
                    # No gradient arrived at features in the graph: the loss does not depend on them.
                    backward = torch.zeros_like(before) if call.backward is None else call.backward
                    triples[-1].append(Triple(before, rows, backward, call.before.choice))
        return triples

    def _absent(self, forwards: Sequence[ForwardCapture]) -> list[int]:
        """Returns per layer why it has no rows, or not the right ones; 0 where it has."""
        codes = []
        unchecked = self._subsets and any(p not in self._base for p in forwards)
        for index in range(len(self._resources.layers)):
            calls = [call for p in forwards for call in p.calls[index]]
            if not calls:
                hidden = self._resources.hidden(index)
                codes.append(row_reasons.IN_GRAPH if hidden else row_reasons.NOT_RUN)
            elif refused := [call.absent for call in calls if call.absent in _OF_ALL]:
                codes.append(refused[0])
            elif index in self._other_calls:
                codes.append(row_reasons.OTHER_CALLS)
            elif not any(call.measurable for call in calls):
                codes.append(calls[0].absent or row_reasons.NO_GRAPH)
            elif index in self._cut_off:
                codes.append(row_reasons.DETACHED)
            elif unchecked:
                codes.append(row_reasons.UNCHECKED)
            else:
                codes.append(0)
        return codes

    def _eager_structure(self, step: StepInputs) -> Structure | None:
        """Returns the structure in the graph of an eager forward with gradient, for a step whose graph is hidden."""
        captured = step.forwards[0]
        assert captured.state is not None
        edges: list[list[Edge | None]] = [[] for _ in self._resources.layers]
        values: Sequence[Tensor] = step.parameters
        if not step.model.gathers:
            values = [v.detach().requires_grad_(v.requires_grad) for v in values]
        names = [str(index) for index in range(len(values))]

        def run(_guard: Any) -> Structure | None:
            output = step.model(values, *captured.args, **captured.kwargs)
            outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
            leaves = GraphLeaves(self._resources.model, values).now()
            return analyse(edges, outputs, leaves, names) if outputs else None

        def handle(layer: Layer, features: Tensor) -> None:
            edges[layer.index].append(edge_of(features))

        inputs = tensors_in((captured.args, captured.kwargs))
        found: Structure | None = self._resources.replayer.run(captured.state, handle, run, grad=True, inputs=inputs)
        return found


def model_at(model: Perturbed, values: Sequence[Tensor]) -> Callable[..., Any]:
    """Returns the model's forward with these values of its parameters."""
    return lambda *args, **kwargs: model(values, *args, **kwargs)
