"""What is learned once of the model: which parameters are below which layer, and which layers are cuts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfs.monitor.capture.capture import Capture
from fastfs.monitor.capture.passes import Pass
from fastfs.monitor.measure.aligned import Incidence
from fastfs.monitor.measure.modes import BatchMode, ProbeMode
from fastfs.monitor.record.rows import Record
from fastfs.network.layers import parameter_names
from fastfs.network.perturbed import Perturbed
from fastfs.network.structure import DID_NOT_RUN, Structure

__all__ = ["Knowledge"]

_PARALLEL = "several processes: backward vectors are of the local loss, gradients of all"


class Knowledge:
    """Keeps the structure of the model: read anew from every graph that shows it, else when parameters change.

    Args:
        model: the model that the loop calls.
        layers: how many are watched.
        capture: of the training step.
        device: of the matrices.
    """

    def __init__(self, model: nn.Module, layers: int, capture: Capture, device: torch.device) -> None:
        self.structure: Structure | None = None
        self.incidence: Incidence | None = None
        self.cuts = torch.zeros(layers, dtype=torch.bool, device=device)
        self.perturbed: Perturbed
        self._model = model
        self._layers = layers
        self._capture = capture
        self._device = device
        self._seen: tuple[list[int], list[bool]] = [], []
        self._parameters: list[Tensor] = []

    def look(self, parameters: Sequence[Tensor]) -> bool:
        """Before a step: are these others than the parameters that the structure is of?"""
        seen = list(map(id, parameters)), [p.requires_grad for p in parameters]
        if seen == self._seen:
            return False
        self._seen, self._parameters = seen, list(parameters)
        self.perturbed = Perturbed(self._model, parameters)
        self.structure = self.incidence = None
        self.cuts = torch.zeros_like(self.cuts)
        self._capture.parameters_are(parameter_names(self._model, parameters))
        return True

    def learn(
        self, mode: BatchMode | ProbeMode, passes: Sequence[Pass], parameters: Sequence[Tensor], step: int
    ) -> Record | None:
        """From the graph of the measured step, or a forward that shows it; a record if there is something new."""
        known = self.structure
        structure = mode.structure if isinstance(mode, ProbeMode) else self._capture.structure
        if isinstance(mode, BatchMode) and (structure is None or structure.opaque):
            if known is not None and DID_NOT_RUN not in known.reason:  # it takes a forward of its own: once
                return None
            structure = mode.eager_structure(passes[0], self.perturbed, parameters)
        if structure is None or (known is not None and structure.same_as(known)):
            return None
        self.structure = structure
        self.incidence = Incidence(structure.upstream_sets, structure.own_sets, self._device)
        cut, reason = structure.cut, structure.reason
        if _in_a_group():
            cut, reason = [False] * self._layers, [why or _PARALLEL for why in reason]
        self.cuts = torch.tensor(cut, dtype=torch.bool).to(self._device, non_blocking=True)
        columns: dict[str, list[Any]] = {"cut": cut, "reason": reason, "parameters": structure.counts}
        return Record(kind="structure", step=step, time=time.time(), scalars={}, columns=columns)

    def is_of(self, counts: Sequence[int]) -> bool:
        """Whether the structure has every layer that has a gradient now; ``counts`` are those of its elements."""
        reasons = [] if self.structure is None else self.structure.reason
        return not any(count and reason == DID_NOT_RUN for count, reason in zip(counts, reasons, strict=False))

    def state_dict(self) -> dict[str, Any] | None:
        """What predictions need before the structure is learned again."""
        if self.structure is None or self.incidence is None:
            return None
        return {"parameters": self._signature(), "incidence": self.incidence.state_dict(), "cuts": self.cuts.cpu()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Of the same parameters only: else predictions begin with the next measured step."""
        if state is not None and state["parameters"] == self._signature():
            self.incidence = Incidence.from_state(state["incidence"], self._device)
            self.cuts = state["cuts"].to(self._device)

    def _signature(self) -> list[Any]:
        return [[list(p.shape), p.requires_grad] for p in self._parameters]


def _in_a_group() -> bool:
    """Whether gradients may be averaged over processes, so that they are not those of this one's loss."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
