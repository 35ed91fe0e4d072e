"""Rules that look at every record and say when something needs a person.

A rule judges layers, one record at a time; :class:`Alerts` counts how often in a row, and raises each alert once until
its condition has cleared. The defaults are meant to stay silent in a healthy run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from fastfs._monitor.record.interruptible_lock import Lock
from fastfs._monitor.record.record import Record, row_names

__all__ = [
    "Alert",
    "Alerts",
    "AngleCollapse",
    "Finding",
    "LayerFrozen",
    "NonFinite",
    "ResidualLarge",
    "UpdateAbove",
    "checked_streaks",
    "default_alerts",
]


class Finding(NamedTuple):
    """A layer that meets the condition of a rule; ``message`` follows the layer's name."""

    value: float | None
    message: str


Judgement = dict[str | None, Finding | None]
"""Layer (None: the whole model) -> finding, or None if all is well. Layers that are not in it were not judged."""


@runtime_checkable
class Alert(Protocol):
    """A rule: a name, after how many judged records in a row it speaks, and the judgement of one record."""

    @property
    def name(self) -> str: ...

    @property
    def steps(self) -> int: ...

    def judge(self, record: Record, header: Mapping[str, Any]) -> Judgement: ...


@dataclass(frozen=True)
class AngleCollapse:
    """The angle is near or above pi/2: ``cos_angle`` below ``cosine`` on valid rows, ``steps`` measured ones in a row.

    The features move without lowering the loss; by the feature speed formula they then move far for little.
    """

    cosine: float = 0.01
    steps: int = 5
    name: str = "angle collapse"

    def judge(self, record: Record, header: Mapping[str, Any]) -> Judgement:
        return {
            layer: Finding(row["cos_angle"], f"angle near or above pi/2, cosine {row['cos_angle']:.3g}")
            if row["cos_angle"] < self.cosine
            else None
            for layer, row in _rows(record, header, "cos_angle", valid=True)
        }


@dataclass(frozen=True)
class LayerFrozen:
    """The features did not move although the loss depends on them: ``update_rms`` is 0, ``backward_rms`` is not.

    Layers with no parameter that gets a gradient up to them are meant not to move, and are not judged (where the record
    has ``gradient_norm``).
    """

    steps: int = 3
    name: str = "layer frozen"

    def judge(self, record: Record, header: Mapping[str, Any]) -> Judgement:
        result: Judgement = {}
        trained = "gradient_norm" not in record.columns
        for layer, row in _rows(record, header, "update_rms", "backward_rms", also=("gradient_norm",), groups=False):
            trained = trained or _number(row.get("gradient_norm")) > 0
            if trained and row["backward_rms"] > 0:
                frozen = row["update_rms"] == 0
                result[layer] = Finding(0.0, "features do not move although a gradient comes") if frozen else None
        return result


@dataclass(frozen=True)
class UpdateAbove:
    """The features change by more than ``relative`` times their own size, ``steps`` measured steps in a row."""

    relative: float = 1.0
    steps: int = 3
    name: str = "large update"

    def judge(self, record: Record, header: Mapping[str, Any]) -> Judgement:
        return {
            layer: Finding(row["relative_update"], f"features change by {row['relative_update']:.3g} of their size")
            if row["relative_update"] > self.relative
            else None
            for layer, row in _rows(record, header, "relative_update")
        }


@dataclass(frozen=True)
class NonFinite:
    """NaN or infinity in features or backward vectors of a layer, or in the loss."""

    steps: int = 1
    name: str = "nonfinite"

    def judge(self, record: Record, header: Mapping[str, Any]) -> Judgement:
        result: Judgement = {
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
    """The formula residual of a cut is above ``residual`` in size: measured and first-order decrease do not agree.

    Curvature (steps too large for first order) or wiring (a loss scale, rows or masks that differ). Judged on valid
    rows whose cosine is at least ``cosine`` in size: near pi/2 the residual divides by nothing. Three standard errors
    of a sample of rows are allowed for.
    """

    residual: float = 0.9
    steps: int = 5
    cosine: float = 0.02
    name: str = "large residual"

    def judge(self, record: Record, header: Mapping[str, Any]) -> Judgement:
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
class _Function:
    """A user's function ``(record, header) -> [(layer, value, message), ...]``, or None if it has nothing to judge by.

    Layers that it does not list are well again.
    """

    function: Callable[[Record, Mapping[str, Any]], Iterable[tuple[str | None, float | None, str]] | None]
    name: str
    steps: int = 1

    def judge(self, record: Record, header: Mapping[str, Any]) -> Judgement:
        found = self.function(record, header)
        if found is None:
            return {}
        result: Judgement = dict.fromkeys([*row_names(header)[0], None])
        for layer, value, message in found:
            result[layer] = Finding(None if value is None else float(value), str(message))
        return result


def default_alerts() -> list[Alert]:
    """What a monitor looks for unless told otherwise."""
    return [AngleCollapse(), LayerFrozen(), UpdateAbove(), NonFinite(), ResidualLarge()]


class Alerts:
    """The rules of a run and what they have seen.

    Args:
        rules: rules, or functions ``(record, header) -> list of (layer, value, message)``, called for measured and
            predicted records; the default rules if None.
        header: of the run.

    Raises:
        TypeError: no list, or an entry that is neither a rule nor a function.
        ValueError: a rule whose name or number of steps is none.
    """

    def __init__(self, rules: Sequence[Any] | None, header: Mapping[str, Any]) -> None:
        self.header = header
        self._rules: dict[str, Alert] = {}
        if rules is not None and (isinstance(rules, (str, bytes)) or not isinstance(rules, Sequence)):
            raise TypeError(f"alerts: expected a list of rules such as AngleCollapse() or functions, got {rules!r}")
        for rule in default_alerts() if rules is None else rules:
            alert = _as_alert(rule)
            name, number = alert.name, 1
            while name in self._rules:
                number += 1
                name = f"{alert.name} {number}"
            self._rules[name] = alert
        self._streaks: dict[str, dict[str | None, int]] = {name: {} for name in self._rules}
        self._lock = Lock()

    def update(self, record: Record) -> tuple[list[Record], list[tuple[str, BaseException]]]:
        """Judge a record.

        Returns:
            The alerts that it raises, and the rules that failed.
        """
        raised: list[Record] = []
        failed: list[tuple[str, BaseException]] = []
        if record.kind not in ("measured", "predicted"):
            return raised, failed
        for name, rule in self._rules.items():
            try:
                judgement = rule.judge(record, self.header)
                with self._lock:
                    raised += self._raised(name, rule, judgement, record)
            except BaseException as error:  # in the writer's thread: a rule that ends it would lose all rows to come
                failed.append((name, error))
        return raised, failed

    def _raised(self, name: str, rule: Alert, judgement: Judgement, record: Record) -> list[Record]:
        raised = []
        for layer, finding in judgement.items():
            if (message := self._count(name, rule, layer, finding)) is not None:
                value = None if finding is None or finding.value is None else float(finding.value)
                layer = None if layer is None else str(layer)
                scalars: dict[str, Any] = {"rule": name, "layer": layer, "value": value, "message": message}
                raised.append(Record("alert", record.step, record.time, scalars))
        return raised

    def state_dict(self) -> dict[str, Any]:
        """Streaks by rule, as ``[layer, number]``: plain data that JSON can hold."""
        with self._lock:
            return {name: [list(item) for item in streaks.items()] for name, streaks in self._streaks.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; rules that are not in it start anew, those that are gone are left out.

        Raises:
            ValueError: not such a state; nothing is taken over then.
        """
        streaks = checked_streaks(state)
        with self._lock:
            for name in self._streaks:
                self._streaks[name] = dict(streaks.get(name, {}))

    def _count(self, name: str, rule: Alert, layer: str | None, finding: Finding | None) -> str | None:
        """The message, at the moment when the streak is long enough."""
        streaks = self._streaks[name]
        if finding is None:
            streaks.pop(layer, None)
            return None
        streaks[layer] = streaks.get(layer, 0) + 1
        if streaks[layer] != rule.steps:
            return None
        message = f"{finding.message}, {rule.steps} measured steps in a row" if rule.steps > 1 else str(finding.message)
        return message.encode("utf-8", "backslashreplace").decode("utf-8")  # what no file can hold


def checked_streaks(state: Any) -> dict[str, dict[str | None, int]]:
    """What :meth:`Alerts.state_dict` gave, also after JSON.

    Raises:
        ValueError: something else; the entry is named.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"alerts: expected a dictionary of rules, got {type(state).__name__}")
    result: dict[str, dict[str | None, int]] = {}
    for name, streaks in state.items():
        if not isinstance(name, str) or isinstance(streaks, (str, bytes)) or not isinstance(streaks, Sequence):
            raise ValueError(f"alerts: {name!r}: expected a list of [layer, number], got {streaks!r:.100}")
        result[name] = {}
        for item in streaks:
            pair = tuple(item) if isinstance(item, (list, tuple)) else ()
            if (
                len(pair) != 2
                or not isinstance(pair[0], (str, type(None)))
                or isinstance(pair[1], bool)
                or not isinstance(pair[1], int)
                or pair[1] < 0
            ):
                raise ValueError(f"alerts: {name!r}: expected [layer, number], got {item!r:.100}")
            result[name][pair[0]] = pair[1]
    return result


def _as_alert(rule: Any) -> Alert:
    if isinstance(rule, Alert) and not isinstance(rule, type):
        if not isinstance(rule.name, str) or not callable(rule.judge):
            raise TypeError(f"alerts: expected a rule with a name and a method judge, got {rule!r}")
        if isinstance(rule.steps, bool) or not isinstance(rule.steps, int) or rule.steps < 1:
            raise ValueError(f"alerts: {rule.name}: steps: expected an integer >= 1, got {rule.steps!r}")
        return rule
    if callable(rule) and not isinstance(rule, type):
        return _Function(rule, getattr(rule, "__name__", type(rule).__name__))
    raise TypeError(f"alerts: expected a rule such as AngleCollapse() or a function, got {rule!r}")


def _number(value: Any) -> float:
    """NaN for what is missing: it fails every comparison."""
    return math.nan if value is None else float(value)


def _rows(
    record: Record,
    header: Mapping[str, Any],
    *columns: str,
    also: tuple[str, ...] = (),
    valid: bool = False,
    groups: bool = True,
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Layers of a measured record that have finite numbers in all ``columns``, with them and what there is ``also``."""
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
