"""The payload of a step: named tensors as one vector on the device, and the part that its host copy becomes.

The engine makes a codec for the step and encodes the step's tensors with it. Vector and ``codec.decode`` then travel
together through the ring to the writer, which calls the latter without knowing what it does.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from fastfs._monitor.measure.aligned_decrease import Aligned
from fastfs._monitor.measure.learned_structure import LayerCuts
from fastfs._record.ranks.part import Place, RankPart

__all__ = ["StepCodec", "aligned_fields", "skipped_part", "structure_facts"]

_NONFINITE_GRADIENTS = "the gradient scaler found gradients that are not finite"
_SCALARS = ("loss", "loss_scale", "kappa", "gradient_factor")


class StepCodec:
    """Encodes the tensors of one step, and decodes their host copy. Holds no tensor.

    Args:
        kind: ``measured`` or ``predicted``.
        step: Number of the optimizer step.
        place: Where this rank stands.
        facts: What the host knows of the step.

    Attributes:
        scalars: Values for the whole step that are known on the host; may be completed until the vector is pushed.
    """

    def __init__(self, kind: str, step: int, place: Place, facts: dict[str, Any]) -> None:
        self.scalars: dict[str, Any] = {"loss": None}
        self._kind = kind
        self._step = step
        self._time = time.time()
        self._place = place
        self._facts = facts
        self._shapes: dict[str, torch.Size] = {}

    def encode(self, fields: dict[str, Tensor]) -> Tensor:
        """Returns the tensors as one float64 vector on their device, so that a single transfer takes all of them."""
        self._shapes = {name: tensor.shape for name, tensor in fields.items()}
        with torch.no_grad():
            return torch.cat([tensor.to(torch.float64).reshape(-1) for tensor in fields.values()])

    def decode(self, host: Tensor) -> list[RankPart]:
        """Returns the part of this rank, from a host copy of the vector."""
        parts = host.split([math.prod(shape) for shape in self._shapes.values()])
        shapes = self._shapes.items()
        arrays = {name: part.reshape(shape).numpy() for (name, shape), part in zip(shapes, parts, strict=True)}
        found_inf = arrays.pop("found_inf", None)
        if found_inf is not None and float(found_inf) > 0:
            return [skipped_part(self._step, self._time, _NONFINITE_GRADIENTS, self._place)]
        scalars = dict(self.scalars)
        for name in _SCALARS:
            if name in arrays:
                scalars[name] = float(arrays.pop(name))
        if "choices_changed" in arrays:
            scalars["choices_changed"] = int(arrays.pop("choices_changed"))
        return [RankPart(self._kind, self._step, self._time, self._place, scalars, self._facts, arrays)]


def aligned_fields(decrease: Aligned) -> dict[str, Tensor]:
    """Returns the fields of a payload that hold the aligned decrease of every layer."""
    fields = {"aligned": decrease.sums, "dots": decrease.dots, "decrease_reason": decrease.reason}
    if decrease.variance is not None:
        fields["variance"] = decrease.variance
    return fields


def structure_facts(cuts: LayerCuts) -> dict[str, Any]:
    """Returns a structure that differs from the last one, for the record."""
    return {"cut": cuts.cut, "reason": cuts.reason, "parameters": cuts.parameters}


def skipped_part(step: int, when: float, reason: str, place: Place, *, before: bool = False) -> RankPart:
    """Returns the part of gradients that led to no measured step.

    Args:
        step: Number of the step.
        when: Seconds since 1970.
        reason: Why.
        place: Where this rank stands.
        before: Whether the step itself is still to come.
    """
    return RankPart("skipped", step, when, place, {"reason": reason}, {"before": before})
