"""The payload of a step: named tensors as one vector on the device, and the records that its host copy becomes.

The engine makes a codec for the step and encodes the step's tensors with it. Vector and ``codec.decode`` then travel
together through the ring to the writer, which calls the latter without knowing what it does.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfs._monitor import row_reasons
from fastfs._monitor.measure import decrease_reasons
from fastfs._monitor.measure.aligned_decrease import Aligned
from fastfs._monitor.measure.learned_structure import LayerCuts
from fastfs._record.columns import FROM_STATS, quantile_name
from fastfs._record.record import Record
from fastfs._stats import FeatureStats

__all__ = [
    "ColumnLayout",
    "MeasuredCodec",
    "PredictedCodec",
    "StepCodec",
    "aligned_fields",
    "skipped_record",
    "structure_record",
]

_ALIGNED = ("aligned_decrease", "parameter_norm", "parameter_update_norm", "gradient_norm")
_NONFINITE_GRADIENTS = "the gradient scaler found gradients that are not finite"


class ColumnLayout:
    """The entries of a record's columns: L layers, then G groups of them.

    Args:
        layers: Number of watched layers.
        groups: Names of groups, and the indices of their layers.
    """

    def __init__(self, layers: int, groups: dict[str, list[int]]) -> None:
        self.layers = layers
        self.groups = groups

    def with_groups(self, sums: Tensor) -> Tensor:
        """Appends each group's sums, which are those of its layers added up: (L, ...) -> (L + G, ...)."""
        if not self.groups:
            return sums
        return torch.cat([sums, torch.stack([_members(sums, members).sum(dim=0) for members in self.groups.values()])])

    def worst(self, codes: Tensor) -> Tensor:
        """Appends each group's code, the largest of its layers, 0 if all are valid: (L,) -> (L + G,)."""
        if not self.groups:
            return codes
        return torch.cat([codes, torch.stack([_members(codes, members).max() for members in self.groups.values()])])

    def padded(self, values: Sequence[Any]) -> list[Any]:
        """Appends None for every group, in a column that has entries for layers only."""
        return [*values, *[None] * len(self.groups)]


def _members(values: Tensor, members: Sequence[int]) -> Tensor:
    """Selects entries without an index tensor, whose copy to the device would wait for it."""
    return torch.stack([values[member] for member in members])


class StepCodec(ABC):
    """Encodes the tensors of one step, and decodes their host copy. Holds no tensor.

    Args:
        step: Number of the optimizer step.
        layout: Entries of the columns.

    Attributes:
        kind: Kind of the record.
        scalars: Values for the whole step that are known on the host; may be completed until the vector is pushed.
    """

    kind: str

    def __init__(self, step: int, layout: ColumnLayout) -> None:
        self.scalars: dict[str, Any] = {"loss": None}
        self._step = step
        self._time = time.time()
        self._layout = layout
        self._shapes: dict[str, torch.Size] = {}

    def encode(self, fields: dict[str, Tensor]) -> Tensor:
        """Returns the tensors as one float64 vector on their device, so that a single transfer takes all of them."""
        self._shapes = {name: tensor.shape for name, tensor in fields.items()}
        with torch.no_grad():
            return torch.cat([tensor.to(torch.float64).reshape(-1) for tensor in fields.values()])

    def decode(self, host: Tensor) -> list[Record]:
        """Returns the records of the step, from a host copy of the vector."""
        parts = host.split([math.prod(shape) for shape in self._shapes.values()])
        shapes = self._shapes.items()
        fields = {name: part.reshape(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        if "found_inf" in fields and fields["found_inf"].item() > 0:
            return [skipped_record(self._step, self._time, _NONFINITE_GRADIENTS)]
        columns, scalars = self._columns(fields), dict(self.scalars)
        for name in ("loss", "loss_scale", "kappa"):
            if name in fields:
                scalars[name] = fields[name].item()
        if "choices_changed" in fields:
            scalars["choices_changed"] = int(fields["choices_changed"].item())
        return [Record(kind=self.kind, step=self._step, time=self._time, scalars=scalars, columns=columns)]

    @abstractmethod
    def _columns(self, fields: dict[str, Tensor]) -> dict[str, list[Any]]:
        """Returns the columns of the record."""

    def _aligned_columns(self, fields: dict[str, Tensor]) -> dict[str, list[Any]]:
        padded = self._layout.padded
        columns = {name: padded(values.tolist()) for name, values in zip(_ALIGNED, fields["aligned"], strict=True)}
        errors = fields["decrease_se"].tolist() if "decrease_se" in fields else [None] * self._layout.layers
        columns["decrease_se"] = padded(errors)
        codes = fields["decrease_reason"].tolist()
        columns["decrease_why"] = padded([decrease_reasons.REASONS[int(code)] or None for code in codes])
        return columns


class MeasuredCodec(StepCodec):
    """Codec of a step whose features were measured.

    Args:
        step: Number of the optimizer step.
        layout: Entries of the columns.
        rows: Kept and all rows of every layer.
        quantiles: Quantiles of the rows' cosines and speeds that are recorded.
        method: How the layers were measured that did not need an enlarged update.
    """

    kind = "measured"

    def __init__(
        self,
        step: int,
        layout: ColumnLayout,
        rows: Sequence[tuple[int, int]],
        quantiles: Sequence[float],
        method: str,
    ) -> None:
        super().__init__(step, layout)
        self._rows = rows
        self._quantiles = quantiles
        self._method = method

    def _columns(self, fields: dict[str, Tensor]) -> dict[str, list[Any]]:
        layout = self._layout
        stats = FeatureStats(fields["sums"])
        columns: dict[str, list[Any]] = {name: getattr(stats, name).tolist() for name in FROM_STATS}
        why = [row_reasons.REASONS[int(code)] for code in fields["reason"].tolist()]
        columns["valid"] = [reason is None for reason in why]
        columns["why"] = why
        columns["method"] = ["amplified" if taken else self._method for taken in fields["amplified"].tolist()]
        columns["nonfinite"] = stats.nonfinite.tolist()
        columns["count"] = stats.count.tolist()
        columns["rows"] = layout.padded([kept for kept, _ in self._rows])
        errors = {
            "angle_se": fields["angle_se"],
            "update_rms_se": fields["update_se"] * stats.update_rms[: layout.layers],
            "residual_se": fields["residual_se"],
        }
        sampled = [0 < kept < total for kept, total in self._rows]
        for name, values in errors.items():
            found = zip(sampled, values.tolist(), strict=True)
            columns[name] = layout.padded([value if part else None for part, value in found])
        columns["residual"] = layout.padded(fields["residual"].tolist())
        columns["linear"] = layout.padded([None if x != x else bool(x) for x in fields["linear"].tolist()])
        aligned = self._aligned_columns(fields)
        columns["decrease_why"] = aligned.pop("decrease_why")
        columns |= aligned
        for place, quantile in enumerate(self._quantiles):
            columns[quantile_name("cos_angle", quantile)] = layout.padded(fields["quantiles"][:, 0, place].tolist())
            columns[quantile_name("update_rms", quantile)] = layout.padded(fields["quantiles"][:, 1, place].tolist())
        return columns


class PredictedCodec(StepCodec):
    """Codec of a step whose features were not measured."""

    kind = "predicted"

    def _columns(self, fields: dict[str, Tensor]) -> dict[str, list[Any]]:
        columns = self._aligned_columns(fields)
        columns["backward_rms"] = self._layout.padded(fields["backward_rms"].tolist())
        columns["update_rms"] = self._layout.padded(fields["update_rms"].tolist())
        return columns


def aligned_fields(decrease: Aligned) -> dict[str, Tensor]:
    """Returns the fields of a payload that hold the aligned decrease of every layer."""
    values = [decrease.decrease, decrease.parameter_norm, decrease.update_norm, decrease.gradient_norm]
    fields = {"aligned": torch.stack(values), "decrease_reason": decrease.reason}
    if decrease.decrease_se is not None:
        fields["decrease_se"] = decrease.decrease_se
    return fields


def structure_record(step: int, layout: ColumnLayout, cuts: LayerCuts) -> Record:
    """Returns the record of a structure that differs from the last one."""
    columns: dict[str, list[Any]] = {"cut": cuts.cut, "reason": cuts.reason, "parameters": cuts.parameters}
    padded = {name: layout.padded(column) for name, column in columns.items()}
    return Record(kind="structure", step=step, time=time.time(), scalars={}, columns=padded)


def skipped_record(step: int, when: float, reason: str) -> Record:
    """Returns the record of gradients that led to no measured step."""
    return Record(kind="skipped", step=step, time=when, scalars={"reason": reason}, columns={})
