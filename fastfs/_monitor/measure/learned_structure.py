"""What measured steps have taught about the model: which parameters are below which layer, and which layers are cuts.

Steps can differ: another head, a frozen part, an expert without a token. A step is identified by the parameters that
receive a gradient and the layers that run, which are known at predicted steps, too. Each sort of step has its own
structure and, in the record, its own last angles (:mod:`fastfs._record.ranks.angles`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastfs._monitor.capture.forward_capture import ForwardCapture
from fastfs._monitor.measure.incidence import Incidence
from fastfs._network.layers import parameter_names
from fastfs._network.structure import Structure, join
from fastfs._record.ranks.angles import within

__all__ = ["LayerCuts", "LearnedStructure", "ParameterChange", "StepKey", "StepStructure"]

_CAPACITY = 32  # sorts of steps, and structures, that are remembered

StepKey = tuple[bytes, tuple[bool, ...]]
"""A byte for each parameter, nonzero if it received a gradient, and for each layer whether it ran."""


ParameterChange = Literal["none", "flags", "tensors"]
"""How trained parameters differ from those of the last step: not at all, in which require a gradient, in identity."""


class StepStructure:
    """What steps with one key have in common.

    Attributes:
        structure: The structure; None if it was restored from another run, which has recorded it.
        incidence: Which parameters count for which layer.
        cut: Whether each layer is a cut.
        cuts: The same on the device, bool (L,).
    """

    def __init__(
        self, structure: Structure | None, incidence: Incidence, cut: Sequence[bool], device: torch.device
    ) -> None:
        self.structure = structure
        self.incidence = incidence
        self.cut = list(cut)
        self.cuts = torch.tensor(self.cut, dtype=torch.bool).to(device, non_blocking=True)


@dataclass(frozen=True)
class LayerCuts:
    """Per layer, what the record says of a structure.

    Attributes:
        cut: Whether the layer is a cut, so that the feature speed formula applies.
        reason: Why it is none.
        parameters: Number of parameters below the layer.
    """

    cut: list[bool]
    reason: list[str | None]
    parameters: list[int]


class LearnedStructure:
    """Remembers structures by the graphs of a step's forwards, and what was learned with them by the step's key.

    Args:
        model: The module that the training loop calls.
        layers: Number of watched layers.
        device: Device of the matrices.

    Attributes:
        joins: How often a structure was computed.
    """

    def __init__(self, model: nn.Module, layers: int, device: torch.device) -> None:
        self.joins = 0
        self._steps: OrderedDict[StepKey, StepStructure] = OrderedDict()
        self._structures: OrderedDict[Hashable, Structure] = OrderedDict()
        self._recorded: Structure | None = None  # the last one in the record
        self._model = model
        self._layers = layers
        self._device = device
        self._identities: tuple[list[int], list[bool]] = [], []
        self._parameters: list[Tensor] = []

    def note_parameters(self, parameters: Sequence[Tensor]) -> ParameterChange:
        """Compares the parameters with those of the last step, and forgets everything if they differ."""
        now = list(map(id, parameters)), [p.requires_grad for p in parameters]
        if now == self._identities:
            return "none"
        others = now[0] != self._identities[0]
        self._identities, self._parameters = now, list(parameters)
        self._steps.clear()
        self._structures.clear()
        self._recorded = None
        return "tensors" if others else "flags"

    def of_forwards(
        self,
        forwards: Sequence[ForwardCapture],
        parameters: Sequence[Tensor],
        otherwise: Callable[[], Structure | None],
    ) -> Structure | None:
        """Returns the structure that the graphs of captured forwards show.

        Args:
            forwards: All forwards of the step.
            parameters: The trained parameters.
            otherwise: Computes the structure in another way, where these graphs do not show it.
        """
        graphs = {(p.signature, tuple(p.outputs)): p for p in forwards}
        key = frozenset(graphs)
        found = self._structures.get(key)
        if found is not None:
            self._structures.move_to_end(key)
            return found
        steps = [(p.trace, p.outputs or range(len(p.trace.outputs))) for p in graphs.values() if p.trace is not None]
        structure = None
        # A parameter group that was added after the forward is missing in its graph.
        leaves = forwards[0].leaves
        if len(steps) == len(graphs) and all(len(trace.wide) == len(parameters) + leaves for trace, _ in steps):
            names = [*parameter_names(self._model, parameters), *(f"(input {i})" for i in range(leaves))]
            structure = join(steps, names)
        if structure is None or structure.opaque:
            structure = otherwise()
        self.joins += 1
        if structure is not None:
            # An equal structure keeps what was learned with it.
            same = next((s for s in self._structures.values() if s.same_as(structure)), structure)
            self._structures[key] = structure = same
            if len(self._structures) > _CAPACITY:
                self._structures.popitem(last=False)
        return structure

    def learn(self, structure: Structure | None, key: StepKey) -> tuple[StepStructure | None, LayerCuts | None]:
        """Learns the structure of a measured step.

        Returns:
            What steps with this key have in common, and what to record if the structure differs from the last one.
        """
        if structure is None:
            return None, None
        step = self._steps.pop(key, None)
        if step is None or step.structure is not structure:
            incidence = Incidence(structure.upstream_sets, structure.own_sets, self._device)
            step = StepStructure(structure, incidence, structure.cut, self._device)
        self._steps[key] = step
        if len(self._steps) > _CAPACITY:
            self._steps.popitem(last=False)
        if self._recorded is not None and (structure is self._recorded or structure.same_as(self._recorded)):
            return step, None
        self._recorded = structure
        counts = structure.counts
        if (extra := structure.upstream_sets.columns - len(self._parameters)) > 0:  # inputs of a pipeline stage
            own = np.repeat([1, 0], [len(self._parameters), extra])
            counts = structure.upstream_sets.total(own).tolist()
        return step, LayerCuts(structure.cut, structure.reason, counts)

    def find(self, key: StepKey) -> StepStructure | None:
        """Returns what was learned from steps like this one, or None if no such step was measured.

        Parameters without a gradient in this step only (an expert without a token) do not matter: they add nothing.
        """
        found = self._steps.get(key)
        if found is not None:
            return found
        touched, ran = key
        for (others, layers), step in reversed(self._steps.items()):
            if layers == ran and within(touched, others):
                return step
        return None

    def state_dict(self) -> dict[str, Any] | None:
        """Returns what predictions need before the structures are learned again."""
        if not self._steps:
            return None
        steps = [
            {
                "touched": list(touched),
                "ran": list(ran),
                "incidence": step.incidence.state_dict(),
                "cut": step.cut,
            }
            for (touched, ran), step in self._steps.items()
        ]
        return {"parameters": self._signature(), "steps": steps}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restores a state of the same parameters. With others, predictions begin after the next measured step."""
        if state is None or state["parameters"] != self._signature():
            return
        for each in state["steps"]:
            incidence = Incidence.from_state(each["incidence"], self._device)
            key = bytes(each["touched"]), tuple(each["ran"])
            self._steps[key] = StepStructure(None, incidence, each["cut"], self._device)

    def _signature(self) -> list[Any]:
        return [[list(p.shape), p.requires_grad] for p in self._parameters]
