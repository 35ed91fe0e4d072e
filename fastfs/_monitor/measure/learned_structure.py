"""What is learned of the model from measured steps: which parameters are below which layer, and which layers are cuts.

Steps can be of several **kinds**: one head or another, with a part frozen or not. A kind is told by the parameters that
get a gradient and the layers that run, which predictions know too. Each has its structure and its last angles.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._monitor.capture.capture import Capture
from fastfs._monitor.capture.passes import Pass
from fastfs._monitor.measure.incidence import Incidence
from fastfs._monitor.measure.modes import BatchMode
from fastfs._monitor.measure.probe import ProbeMode
from fastfs._network.layers import parameter_names
from fastfs._network.perturbed import Perturbed
from fastfs._network.structure import Structure, join
from fastfs._record.record import Record

__all__ = ["Kind", "Knowledge", "StepKey"]

_PARALLEL = "several processes: backward vectors are of the local loss, gradients of all"
_MOST = 32  # kinds, and structures, that are remembered

StepKey = tuple[bytes, tuple[bool, ...]]
"""A byte for each parameter that got a gradient, and whether each layer ran."""


class Kind:
    """Steps of one kind.

    Attributes:
        structure: None if it was taken over from another run, which has told the rest.
        incidence: which parameters count for which layer.
        cuts: bool (L,) on the device.
        cosine: float64 (L,): of the last angle of each layer that predictions may use; nan before.
    """

    def __init__(self, structure: Structure | None, incidence: Incidence, cuts: Tensor, cosine: Tensor) -> None:
        self.structure = structure
        self.incidence = incidence
        self.cuts = cuts
        self.cosine = cosine


class Knowledge:
    """Keeps the structures of the model: of each kind of step, taken again where its graph is not known.

    Args:
        model: the model that the loop calls.
        layers: how many are watched.
        capture: of the training step.
        device: of the matrices.
    """

    def __init__(self, model: nn.Module, layers: int, capture: Capture, device: torch.device) -> None:
        self.perturbed: Perturbed
        self.joins = 0  # how often a structure was worked out
        self._kinds: OrderedDict[StepKey, Kind] = OrderedDict()
        self._structures: OrderedDict[Hashable, Structure] = OrderedDict()  # by the graphs of a step's forwards
        self._told: Structure | None = None  # the last one in the record
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
        others = seen[0] != self._seen[0]
        self._seen, self._parameters = seen, list(parameters)
        self._kinds.clear()
        self._structures.clear()
        self._told = None
        if others:
            self.perturbed = Perturbed(self._model, parameters)
            self._capture.parameters_are(parameter_names(self._model, parameters))
        return True

    def learn(
        self,
        mode: BatchMode | ProbeMode,
        passes: Sequence[Pass],
        parameters: Sequence[Tensor],
        step: int,
        key: StepKey,
    ) -> tuple[Kind | None, Record | None]:
        """The kind of a measured step, and a record if its structure is another one than the last."""
        structure = mode.structure if isinstance(mode, ProbeMode) else self._structure(mode, passes, parameters)
        if structure is None:
            return None, None
        kind = self._kinds.pop(key, None)
        if kind is None or kind.structure is not structure:
            cut, _ = self._cuts(structure)
            cosine = torch.full((self._layers,), torch.nan, dtype=torch.float64, device=self._device)
            kind = Kind(
                structure,
                Incidence(structure.upstream_sets, structure.own_sets, self._device),
                torch.tensor(cut, dtype=torch.bool).to(self._device, non_blocking=True),
                cosine if kind is None else kind.cosine,
            )
        self._kinds[key] = kind
        if len(self._kinds) > _MOST:
            self._kinds.popitem(last=False)
        if self._told is not None and (structure is self._told or structure.same_as(self._told)):
            return kind, None
        self._told = structure
        cut, reason = self._cuts(structure)
        columns: dict[str, list[Any]] = {"cut": cut, "reason": reason, "parameters": structure.counts}
        return kind, Record(kind="structure", step=step, time=time.time(), scalars={}, columns=columns)

    def kind(self, key: StepKey) -> Kind | None:
        """What a step of this kind is known to be like; None if no measured step has been like it.

        A part of the parameters may get no gradient this time (an expert without a token): what has none adds nothing.
        """
        known = self._kinds.get(key)
        if known is not None:
            return known
        touched, ran = key
        for (others, layers), kind in reversed(self._kinds.items()):
            if layers == ran and _within(touched, others):
                return kind
        return None

    def angles(self, key: StepKey, cosine: Tensor, where: Tensor) -> None:
        """Keep cosines for predictions, in this kind of step and in those that differ by parts without a gradient."""
        touched, ran = key
        for (others, layers), kind in self._kinds.items():
            if layers == ran and (_within(touched, others) or _within(others, touched)):
                kind.cosine = torch.where(where, cosine, kind.cosine)

    def state_dict(self) -> dict[str, Any] | None:
        """What predictions need before the structures are learned again."""
        if not self._kinds:
            return None
        kinds = [
            {
                "touched": list(touched),
                "ran": list(ran),
                "incidence": kind.incidence.state_dict(),
                "cuts": kind.cuts.cpu(),
                "cosine": kind.cosine.cpu(),
            }
            for (touched, ran), kind in self._kinds.items()
        ]
        return {"parameters": self._signature(), "kinds": kinds}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Of the same parameters only: else predictions begin with the next measured step."""
        if state is None or state["parameters"] != self._signature():
            return
        for each in state["kinds"]:
            incidence = Incidence.from_state(each["incidence"], self._device)
            key = bytes(each["touched"]), tuple(each["ran"])
            cuts, cosine = each["cuts"].to(self._device), each["cosine"].to(self._device)
            self._kinds[key] = Kind(None, incidence, cuts, cosine)

    def _structure(self, mode: BatchMode, passes: Sequence[Pass], parameters: Sequence[Tensor]) -> Structure | None:
        """From the graphs of all forwards of the step; where they do not show it, from a forward of its own."""
        graphs = {(p.signature, tuple(p.outputs)): p for p in passes}
        key = frozenset(graphs)
        found = self._structures.get(key)
        if found is not None:
            self._structures.move_to_end(key)
            return found
        steps = [(p.trace, p.outputs or range(len(p.trace.outputs))) for p in graphs.values() if p.trace is not None]
        structure = None
        # A parameter group that was added after the forward is not in its graph as it was looked at then.
        if len(steps) == len(graphs) and all(len(trace.wide) == len(parameters) for trace, _ in steps):
            structure = join(steps, list(parameter_names(self._model, parameters)))
        if structure is None or structure.opaque:
            structure = mode.eager_structure(passes[0], self.perturbed, parameters)
        self.joins += 1
        if structure is not None:
            # The same as one that is known keeps what has been learned with it.
            known = next((s for s in self._structures.values() if s.same_as(structure)), structure)
            self._structures[key] = structure = known
            if len(self._structures) > _MOST:
                self._structures.popitem(last=False)
        return structure

    def _cuts(self, structure: Structure) -> tuple[list[bool], list[str | None]]:
        if _in_a_group():
            return [False] * self._layers, [why or _PARALLEL for why in structure.reason]
        return structure.cut, structure.reason

    def _signature(self) -> list[Any]:
        return [[list(p.shape), p.requires_grad] for p in self._parameters]


def _within(touched: bytes, others: bytes) -> bool:
    return all(b or not a for a, b in zip(touched, others, strict=True))


def _in_a_group() -> bool:
    """Whether gradients may be averaged over processes, so that they are not those of this one's loss."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
