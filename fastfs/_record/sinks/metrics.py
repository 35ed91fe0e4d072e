"""What experiment trackers get of a record: few numbers with the same names at every step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastfs._record.columns import BY_NAME, QUANTITIES
from fastfs._record.record import Record
from fastfs._record.step_columns import STEP_COLUMNS

__all__ = ["MAX_KEYS", "STATISTICS", "VALID_SHARE", "Metric", "Metrics", "finite", "shown_values", "unique_keys"]

MAX_KEYS = 64
"""Default of the largest number of keys."""

VALID_SHARE = "valid_share"
"""Share of the layers, without groups, whose row is valid."""

STATISTICS: dict[str, Callable[[Iterable[float]], float]] = {"median": statistics.median, "min": min, "max": max}


@dataclass(frozen=True)
class Metric:
    """One number per measured step.

    Attributes:
        quantity: a column of the record, or :data:`VALID_SHARE`.
        label: a statistic over the layers (``median``, ``min``, ``max``), or a group; empty for values per step.
    """

    quantity: str
    label: str = ""

    def key(self, prefix: str) -> str:
        """The name in trackers whose names are paths: ``fastfs/angle/median``."""
        return "/".join(part for part in (prefix, self.quantity, self.label) if part)


class Metrics:
    """Chooses the metrics of a run by its header, at most ``max_keys``, and takes them from its measured records.

    They are chosen in this order, each line as long as it fits as a whole:

    1. the share of valid layers;
    2. the medians over the layers of all quantities with a place in the report's menu, in the order of that menu (those
       of ``Monitor(details=True)`` in runs with details only);
    3. the values per step that TensorBoard shows;
    4. for each of these quantities, the values of all groups;
    5. for each of them, its smallest and its largest value over the layers.

    Values that mean nothing where a row is not valid (``Display.guarded``) are taken from valid rows only. A metric
    without a finite value at a step is left out of that step.

    Args:
        header: of the run.
        max_keys: largest number of metrics, at least 1.

    Attributes:
        metrics: those that fit, in the order above.
        left_out: the others.

    Raises:
        ValueError: ``max_keys`` is not an integer >= 1.
    """

    def __init__(self, header: Mapping[str, Any], max_keys: int = MAX_KEYS) -> None:
        if type(max_keys) is not int or max_keys < 1:
            raise ValueError(f"max_keys: expected an integer >= 1, got {max_keys!r}")
        self._layers = len(header.get("layers", ()))
        self._groups: dict[str, int] = {}  # index in a column by label
        for index, group in enumerate(header.get("groups") or ()):
            label = group or "_"
            while label in STATISTICS or label in self._groups:
                label += "_"
            self._groups[label] = self._layers + index
        names = [column.name for column in QUANTITIES if column.belongs_to(header)]
        parts = [
            [Metric(VALID_SHARE)],
            *([Metric(name, "median")] for name in names),
            *([Metric(column.name)] for column in STEP_COLUMNS if column.tensorboard),
            *([Metric(name, group) for group in self._groups] for name in names),
            *([Metric(name, "min"), Metric(name, "max")] for name in names),
        ]
        self.metrics: list[Metric] = []
        self.left_out: list[Metric] = []
        for part in parts:
            fits = len(self.metrics) + len(part) <= max_keys
            (self.metrics if fits else self.left_out).extend(part)

    def of(self, record: Record) -> dict[Metric, float]:
        """Returns the finite values of a measured record; nothing for records of other kinds."""
        if record.kind != "measured":
            return {}
        shown = {name: shown_values(record, name) for name in record.columns if name in BY_NAME}
        found = {metric: self._value(metric, record, shown) for metric in self.metrics}
        return {metric: value for metric, value in found.items() if value is not None}

    def _value(self, metric: Metric, record: Record, shown: Mapping[str, list[float | None]]) -> float | None:
        if metric.quantity == VALID_SHARE:
            flags = record.columns.get("valid", [])[: self._layers]
            return sum(flag is True for flag in flags) / len(flags) if flags else None
        if not metric.label:
            return finite(record.scalars.get(metric.quantity))
        column = shown.get(metric.quantity, [])
        if (index := self._groups.get(metric.label)) is not None:
            return column[index] if index < len(column) else None
        values = [value for value in column[: self._layers] if value is not None]
        return finite(STATISTICS[metric.label](values)) if values else None


def shown_values(record: Record, name: str) -> list[float | None]:
    """Returns a column's finite numbers, and None where there is none or where it means nothing without ``valid``."""
    values = [finite(value) for value in record.columns.get(name, [])]
    display = BY_NAME[name].display
    if display is None or not display.guarded:
        return values
    flags = record.columns.get("valid", [])
    return [value if at < len(flags) and flags[at] is True else None for at, value in enumerate(values)]


def finite(value: Any) -> float | None:
    """Converts a finite number to a float; anything else becomes None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer that is too large
        return None
    return number if math.isfinite(number) else None


def unique_keys(metrics: Sequence[Metric], name: Callable[[Metric], str]) -> dict[Metric, str]:
    """Names metrics for a tracker that does not take every name: those that become equal get an underscore more."""
    keys: dict[str, Metric] = {}
    for metric in metrics:
        key = name(metric)
        while key in keys:
            key += "_"
        keys[key] = metric
    return {metric: key for key, metric in keys.items()}
