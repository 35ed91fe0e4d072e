"""Alert rules: each examines one record at a time and says which layers meet its condition.

The defaults are meant to stay silent in a healthy run. A new rule is a class with ``name``, ``steps`` and ``check``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastfs._record.record import Record
from fastfs._record.schema import row_names
from fastfs._record.writing.alert_rule import AlertRule, Finding, Findings
from fastfs._record.writing.gradient_scale_rule import GradientScale

__all__ = [
    "AlertRule",
    "AngleCollapse",
    "Finding",
    "Findings",
    "FunctionRule",
    "GradientScale",
    "LayerFrozen",
    "NonFinite",
    "ResidualLarge",
    "UpdateAbove",
    "default_alerts",
]


@dataclass(frozen=True)
class AngleCollapse:
    """The angle is close to or above pi/2: ``cos_angle`` is below ``cosine`` in ``steps`` consecutive valid rows.

    The features then move without lowering the loss: by the feature speed formula, far for little decrease.

    Args:
        cosine: Smallest cosine of a healthy layer.
        steps: Number of consecutive records.
        name: Name of the rule in alerts.
    """

    cosine: float = 0.01
    steps: int = 5
    name: str = "angle collapse"

    def check(self, record: Record, header: Mapping[str, Any]) -> Findings:
        return {
            layer: Finding(row["cos_angle"], f"angle near or above pi/2, cosine {row['cos_angle']:.3g}")
            if row["cos_angle"] < self.cosine
            else None
            for layer, row in _rows(record, header, "cos_angle", valid=True)
        }


@dataclass(frozen=True)
class LayerFrozen:
    """The features do not move although the loss depends on them: ``update_rms`` is 0, ``backward_rms`` is not.

    Layers whose upstream parameters get no gradient are not meant to move; they are not checked if the record has
    ``gradient_norm``.

    Args:
        steps: Number of consecutive records.
        name: Name of the rule in alerts.
    """

    steps: int = 3
    name: str = "layer frozen"

    def check(self, record: Record, header: Mapping[str, Any]) -> Findings:
        result: Findings = {}
        trained = "gradient_norm" not in record.columns
        for layer, row in _rows(record, header, "update_rms", "backward_rms", also=("gradient_norm",), groups=False):
            trained = trained or _number(row.get("gradient_norm")) > 0
            if trained and row["backward_rms"] > 0:
                frozen = row["update_rms"] == 0
                result[layer] = Finding(0.0, "features do not move although a gradient comes") if frozen else None
        return result


@dataclass(frozen=True)
class UpdateAbove:
    """The features change by more than ``relative`` times their own size in ``steps`` consecutive measured steps.

    Args:
        relative: Largest ``relative_update`` of a healthy layer.
        steps: Number of consecutive records.
        name: Name of the rule in alerts.
    """

    relative: float = 1.0
    steps: int = 3
    name: str = "large update"

    def check(self, record: Record, header: Mapping[str, Any]) -> Findings:
        return {
            layer: Finding(row["relative_update"], f"features change by {row['relative_update']:.3g} of their size")
            if row["relative_update"] > self.relative
            else None
            for layer, row in _rows(record, header, "relative_update")
        }


@dataclass(frozen=True)
class NonFinite:
    """Features or backward vectors of a layer, or the loss, are NaN or infinite.

    Args:
        steps: Number of consecutive records.
        name: Name of the rule in alerts.
    """

    steps: int = 1
    name: str = "nonfinite"

    def check(self, record: Record, header: Mapping[str, Any]) -> Findings:
        result: Findings = {
            layer: Finding(float(row["nonfinite"]), f"{row['nonfinite']:.0f} entries are NaN or infinite")
            if row["nonfinite"] > 0
            else None
            for layer, row in _rows(record, header, "nonfinite")
        }
        loss = record.scalars.get("loss")
        if isinstance(loss, (int, float)):
            result[None] = None if math.isfinite(loss) else Finding(None, f"the loss is {loss}")
        return result


@dataclass(frozen=True)
class ResidualLarge:
    """The formula residual of a cut exceeds ``residual`` in size: measured and first-order decrease disagree.

    The cause is curvature (the step is too large for first order) or a mistake (a loss scale, rows or masks that
    differ). Only valid rows with a cosine of at least ``cosine`` in size are checked: the residual divides by the
    cosine. Three standard errors of the sample of rows are subtracted.

    Args:
        residual: Largest size of the residual of a healthy cut.
        steps: Number of consecutive records.
        cosine: Smallest size of a cosine at which the residual is checked.
        name: Name of the rule in alerts.
    """

    residual: float = 0.9
    steps: int = 5
    cosine: float = 0.02
    name: str = "large residual"

    def check(self, record: Record, header: Mapping[str, Any]) -> Findings:
        return {
            layer: Finding(row["residual"], f"formula residual {row['residual']:.3g}: not a first-order step, or a bug")
            if abs(row["residual"]) - 3 * _number(row.get("residual_se") or 0.0) > self.residual
            else None
            for layer, row in _rows(
                record, header, "residual", also=("cos_angle", "residual_se"), valid=True, groups=False
            )
            if not abs(_number(row.get("cos_angle", 1.0))) < self.cosine
        }


@dataclass(frozen=True)
class FunctionRule:
    """A user's function ``(record, header) -> [(layer, value, message), ...]``; None if there is nothing to check.

    Layers that it does not list are healthy.
    """

    function: Callable[[Record, Mapping[str, Any]], Iterable[tuple[str | None, float | None, str]] | None]
    name: str
    steps: int = 1

    def check(self, record: Record, header: Mapping[str, Any]) -> Findings:
        found = self.function(record, header)
        if found is None:
            return {}
        result: Findings = dict.fromkeys([*row_names(header)[0], None])
        for layer, value, message in found:
            result[layer] = Finding(None if value is None else float(value), str(message))
        return result


def default_alerts() -> list[AlertRule]:
    """Returns the rules that a monitor applies by default."""
    return [AngleCollapse(), LayerFrozen(), UpdateAbove(), NonFinite(), ResidualLarge(), GradientScale()]


def _number(value: Any) -> float:
    """Converts a value; a missing one becomes NaN, which fails every comparison."""
    return math.nan if value is None else float(value)


def _rows(
    record: Record,
    header: Mapping[str, Any],
    *columns: str,
    also: tuple[str, ...] = (),
    valid: bool = False,
    groups: bool = True,
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yields the layers of a measured record whose values in all ``columns`` are finite, with these values.

    Args:
        record: of any kind.
        header: of its run.
        columns: required.
        also: optional columns.
        valid: whether to leave out rows that are not valid.
        groups: whether to include groups.
    """
    if record.kind != "measured" or any(name not in record.columns for name in columns):
        return
    names, layers = row_names(header)
    flags = record.columns.get("valid")
    values = {name: record.columns[name] for name in (*columns, *also) if name in record.columns}
    for index, name in enumerate(names if groups else names[:layers]):
        if valid and flags is not None and not flags[index]:
            continue
        row = {key: column[index] for key, column in values.items() if index < len(column)}
        if all(math.isfinite(_number(row.get(column))) for column in columns):
            yield name, row
