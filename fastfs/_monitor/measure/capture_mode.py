"""The interface of a capture mode: how a measured step sees what an update does to the features.

The engine makes these calls at a measured step, in this order::

    prepare            before the first optimizer steps
    refusal            whether a second forward can repeat the first one
    graphs, check      before the optimizers step, if a check of the second forward is due
    structure          after the step: the graph below every layer
    reference          the gradients, loss and loss scale that belong to the mode's backward vectors
    observe            the second forwards, their sums, and the verdict on them
    clear              when the step is over, also if one of the calls above has failed

``docs/monitor.md`` describes the modes from a user's point of view; ``measure/modes.py`` lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastfs._monitor.capture.forward_capture import ForwardCapture
from fastfs._monitor.capture.replay import Replayer
from fastfs._monitor.capture.row_keeper import RowKeeper
from fastfs._monitor.measure.assessment import UpdateAssessor
from fastfs._monitor.measure.details import Details
from fastfs._monitor.measure.learned_structure import LearnedStructure
from fastfs._monitor.measure.measured_update import MeasuredUpdate
from fastfs._monitor.measure.observation import FeatureObservation
from fastfs._monitor.measure.probe import Probe
from fastfs._monitor.measure.row_sums import LayerSums, RowSums, totals
from fastfs._network.input_copies import tensors_in
from fastfs._network.layers import Layer
from fastfs._network.perturbed import Perturbed
from fastfs._network.placements import local
from fastfs._network.structure import Structure
from fastfs._record.row_reasons import UNREPEATED
from fastfs._stats import FeatureStats, ParameterStats

__all__ = ["BackwardReference", "CaptureMode", "ModeResources", "StepInputs", "UpdateEvidence"]

_COMPARED = 64  # elements of an input that tell whether two ranks were given the same one


@dataclass(frozen=True)
class ModeResources:
    """What a mode works with while the monitor is attached.

    Attributes:
        model: The module that the training loop calls.
        layers: The watched layers.
        replayer: Runs second forwards.
        keeper: Copies rows of features within the memory budget.
        hidden: Tells by the index of a layer whether it runs in a compiled graph without taps.
        assessor: Decides how far to trust the sums.
        quantiles: Quantiles of the rows' cosines and speeds that are recorded.
        device: Device of the sums.
        warn: Called with a kind and a message if a layer cannot be measured.
        probe: The batch and loss of probe mode, else None.
        linked: Returns a forward of the model in which a stage of a pipeline receives the activations of the one before
            and passes its own on; without a pipeline the forward itself.
        nonlinear: Whether the first-order update is compared with the real one.
        details: Looks into the second forwards; None for nobody.
    """

    model: nn.Module
    layers: Sequence[Layer]
    replayer: Replayer
    keeper: RowKeeper
    hidden: Callable[[int], bool]
    assessor: UpdateAssessor
    quantiles: Sequence[float]
    device: torch.device
    warn: Callable[[str, str], None]
    probe: Probe | None
    linked: Callable[[Callable[..., Any]], Callable[..., Any]]
    nonlinear: bool = False
    details: Details | None = None

    def totals(self, rows: list[RowSums]) -> LayerSums:
        """Returns sums over rows as sums over layers."""
        return totals(rows, self.quantiles, self.device)

    def on_device(self, numbers: Sequence[float]) -> Tensor:
        """Returns numbers as a float64 tensor on the device of the sums."""
        return torch.tensor(numbers, dtype=torch.float64).to(self.device, non_blocking=True)


class StepInputs:
    """The step that is measured.

    Args:
        forwards: The captured training forwards; none for a mode that does not capture training.
        model: The model as a function of its parameters.
        parameters: The trained parameters, with the values that they have now.
        previous: Returns the values before the step, for a mode with ``needs_previous``.
    """

    __slots__ = ("_previous", "forwards", "model", "parameters")

    def __init__(
        self,
        forwards: Sequence[ForwardCapture],
        model: Perturbed,
        parameters: Sequence[Tensor],
        previous: Callable[[], Sequence[Tensor]],
    ) -> None:
        self.forwards = forwards
        self.model = model
        self.parameters = parameters
        self._previous = previous

    @property
    def previous(self) -> Sequence[Tensor]:
        """The parameters' values before the step."""
        return self._previous()


class BackwardReference(NamedTuple):
    """What the backward vectors of a mode are derivatives of.

    Attributes:
        update: What the step did to the parameters, with the gradients of that loss.
        loss: The loss for the record, float64 (); None if it is unknown.
        scale: What the loss was multiplied with before the backward, float64 ().
    """

    update: MeasuredUpdate
    loss: Tensor | None
    scale: Tensor


class UpdateEvidence(NamedTuple):
    """What is known of an update besides the features.

    Attributes:
        stats: Norms of the parameters and of their update, shape (P,).
        decrease: Aligned decrease in the scale of the backward vectors, float64 (L,); nan for layers that are no cuts.
        depth: Number of matrix products before each layer, float64 (L,), which rounding accumulates over.
    """

    stats: ParameterStats
    decrease: Tensor
    depth: Tensor


class CaptureMode(ABC):
    """How a measured step sees what an update does to the features.

    A mode is created once per monitor. It keeps what it needs between the calls of one step and forgets it in
    :meth:`clear`. It may raise in any call: the measurement of the step is then left out, and training goes on.

    Attributes:
        method: How the record names the mode in the column ``method``.
        captures_training: Whether the mode measures on the training forwards. The taps then capture features at a
            measured step, and a step without a captured forward is not measured.
        needs_previous: Whether the mode reads the parameters' values before the step, which are then copied.
        row_copies: Copies of each kept row that the mode holds at a time, for the memory budget.
        checks_every_step: Whether :meth:`check` is due at every measured step.
        unrepeated: Why a layer is not valid whose features the check has not repeated, a code of ``row_reasons``.
    """

    method: ClassVar[str]
    captures_training: ClassVar[bool]
    needs_previous: ClassVar[bool]
    row_copies: ClassVar[int] = 3
    checks_every_step: bool = False
    unrepeated: int = UNREPEATED

    def __init__(self, resources: ModeResources) -> None:
        self._resources = resources

    @staticmethod
    def momentary_bytes(parameters: Sequence[Tensor]) -> int:
        """Returns the bytes for parameter-sized tensors that a measured step needs besides ``previous``.

        Called when the monitor describes itself.
        """
        return 0

    def prepare(self, step: StepInputs) -> None:  # noqa: B027  # most modes have nothing to prepare
        """Called before the first optimizer of a measured step, with gradients in place and parameters unchanged."""

    def refusal(self, forwards: Sequence[ForwardCapture]) -> int | None:
        """Returns why second forwards cannot repeat the first ones, a code of ``row_reasons``, or None if they can.

        Called before the step, where a code suppresses :meth:`check`, and after it, where the code goes to every row.
        """
        return None

    def graphs(self, forwards: Sequence[ForwardCapture]) -> Hashable:
        """Returns a key of the forwards' graphs. Results of checks hold for steps with an equal key.

        Called before the step and after it.
        """
        return None

    @abstractmethod
    def check(self, step: StepInputs) -> FeatureStats:
        """Returns the difference between a second forward at unchanged parameters and the first one, shape (L,).

        Called before the first optimizer, after :meth:`prepare`, at those measured steps for which a check is due. The
        second forward has to run in the same way as in :meth:`observe`.
        """

    @abstractmethod
    def structure(self, step: StepInputs, learned: LearnedStructure) -> Structure | None:
        """Returns which parameters are below which layer and which layers are cuts, or None if that is unknown.

        Called after the step. ``learned`` caches structures by the graphs of captured forwards.
        """

    def reference(
        self, step: StepInputs, update: MeasuredUpdate, loss: Tensor | None, scale: Tensor
    ) -> BackwardReference:
        """Returns the gradients, loss and loss scale that belong to the backward vectors of this mode.

        Called after :meth:`structure`.

        Args:
            step: The step.
            update: The update with the gradients of training.
            loss: The loss that the training loop has logged, if any.
            scale: The loss scale of training.
        """
        return BackwardReference(update, loss, scale)

    @abstractmethod
    def observe(self, step: StepInputs, evidence: UpdateEvidence) -> FeatureObservation:
        """Measures the features after the step and returns sums, a verdict for each layer, and why rows are absent.

        Called last, after the step. Does not wait for the device.
        """

    def accompany(self, step: StepInputs) -> None:  # noqa: B027  # most modes communicate in no forward
        """Runs the second forwards of :meth:`observe` for the sake of other ranks, after this one has failed."""

    def input_sums(self, forwards: Sequence[ForwardCapture]) -> Tensor:
        """Returns numbers that ranks have in common that were given the same inputs, float64 (n,)."""
        sums = [
            local(x).detach().flatten()[:_COMPARED].to(self._resources.device, torch.float64).sum()
            for captured in forwards
            for x in tensors_in((captured.args, captured.kwargs))
            if x.layout is torch.strided and not x.is_complex() and not x.is_nested
        ]
        return torch.stack(sums) if sums else self._resources.on_device([])

    def placed(self, forwards: Sequence[ForwardCapture]) -> dict[str, str]:
        """Returns what this rank has of the features of a layer, by its number, where DTensors say so."""
        found: dict[str, str] = {}
        for layer in range(len(self._resources.layers)):
            each = {call.placed for captured in forwards for call in captured.calls[layer]}
            if len(each) == 1 and (where := each.pop()) is not None:
                found[str(layer)] = where
        return found

    @abstractmethod
    def clear(self) -> None:
        """Forgets the step. Called after every step, measured or not, and when the monitor is closed."""
