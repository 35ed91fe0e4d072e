"""From tensors of one step to one vector on the device, and from its copy on the host to a record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfs._monitor.measure import decrease_reasons, row_reasons
from fastfs._record.columns import FROM_STATS, quantile_name
from fastfs._record.record import Record
from fastfs._stats import FeatureStats

__all__ = ["Names", "measured", "pack", "predicted"]

ALIGNED = ("aligned_decrease", "parameter_norm", "parameter_update_norm", "gradient_norm")


def pack(tensors: dict[str, Tensor]) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """Named tensors as one float64 vector, so that one transfer takes them all.

    Returns:
        The vector, and what takes its copy on the host apart again. That holds no tensor.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def split(host: Tensor) -> dict[str, Tensor]:
        parts = host.split([math.prod(shape) for shape in shapes.values()])
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    with torch.no_grad():
        return torch.cat([tensor.to(torch.float64).reshape(-1) for tensor in tensors.values()]), split


class Names:
    """What the entries of a record's columns are of: L layers, then groups of them."""

    def __init__(self, layers: int, groups: dict[str, list[int]]) -> None:
        self.layers = layers
        self.groups = groups

    def with_groups(self, sums: Tensor) -> Tensor:
        """(L, ...) -> (L + G, ...): a group's sums are those of its layers."""
        if not self.groups:
            return sums
        return torch.cat([sums, torch.stack([_members(sums, members).sum(dim=0) for members in self.groups.values()])])

    def worst(self, codes: Tensor) -> Tensor:
        """(L,) -> (L + G,): a group's code is the largest of its layers, 0 where all are fine."""
        if not self.groups:
            return codes
        return torch.cat([codes, torch.stack([_members(codes, members).max() for members in self.groups.values()])])

    def padded(self, values: Sequence[Any]) -> list[Any]:
        """A column that groups have no entry in."""
        return [*values, *[None] * len(self.groups)]


def _members(values: Tensor, members: Sequence[int]) -> Tensor:
    """Without an index on the device, whose copy would wait for it."""
    return torch.stack([values[member] for member in members])


def measured(
    parts: dict[str, Tensor],
    names: Names,
    rows: Sequence[tuple[int, int]],
    quantiles: Sequence[float],
    method: str,
    common: dict[str, Any],
) -> Record:
    """The record of a measured step.

    Args:
        parts: what the payload was made of, on the host.
        names: of the columns' entries.
        rows: kept and all rows of every layer.
        quantiles: that the rows' quantiles are of.
        method: how layers were measured, where an enlarged update was not needed.
        common: step, time and what else is not per layer.
    """
    stats = FeatureStats(parts["sums"])
    columns: dict[str, list[Any]] = {name: getattr(stats, name).tolist() for name in FROM_STATS}
    why = [row_reasons.REASONS[int(code)] for code in parts["reason"].tolist()]
    columns["valid"] = [reason is None for reason in why]
    columns["why"] = why
    columns["method"] = ["amplified" if taken else method for taken in parts["amplified"].tolist()]
    columns["nonfinite"] = stats.nonfinite.tolist()
    columns["count"] = stats.count.tolist()
    columns["rows"] = names.padded([kept for kept, _ in rows])
    errors = {
        "angle_se": parts["angle_se"],
        "update_rms_se": parts["update_se"] * stats.update_rms[: names.layers],
        "residual_se": parts["residual_se"],
    }
    sampled = [0 < kept < total for kept, total in rows]
    for name, values in errors.items():
        found = zip(sampled, values.tolist(), strict=True)
        columns[name] = names.padded([value if part else None for part, value in found])
    columns["residual"] = names.padded(parts["residual"].tolist())
    columns["linear"] = names.padded([None if x != x else bool(x) for x in parts["linear"].tolist()])
    columns["decrease_why"] = names.padded(_decrease_why(parts))
    for name, values in zip(ALIGNED, parts["aligned"], strict=True):
        columns[name] = names.padded(values.tolist())
    for place, quantile in enumerate(quantiles):
        columns[quantile_name("cos_angle", quantile)] = names.padded(parts["quantiles"][:, 0, place].tolist())
        columns[quantile_name("update_rms", quantile)] = names.padded(parts["quantiles"][:, 1, place].tolist())
    return _record("measured", columns, parts, common)


def predicted(parts: dict[str, Tensor], names: Names, common: dict[str, Any]) -> Record:
    """The record of a step whose features were not measured."""
    columns = {name: names.padded(values.tolist()) for name, values in zip(ALIGNED, parts["aligned"], strict=True)}
    columns["decrease_why"] = names.padded(_decrease_why(parts))
    columns["backward_rms"] = names.padded(parts["backward_rms"].tolist())
    columns["update_rms"] = names.padded(parts["update_rms"].tolist())
    return _record("predicted", columns, parts, common)


def _decrease_why(parts: dict[str, Tensor]) -> list[str | None]:
    return [decrease_reasons.REASONS[int(code)] or None for code in parts["decrease_reason"].tolist()]


def _record(kind: str, columns: dict[str, list[Any]], parts: dict[str, Tensor], common: dict[str, Any]) -> Record:
    scalars = {key: value for key, value in common.items() if key not in ("step", "time")}
    for name in ("loss", "loss_scale", "kappa"):
        if name in parts:
            scalars[name] = parts[name].item()
    if "choices_changed" in parts:
        scalars["choices_changed"] = int(parts["choices_changed"].item())
    return Record(kind=kind, step=common["step"], time=common["time"], scalars=scalars, columns=columns)
