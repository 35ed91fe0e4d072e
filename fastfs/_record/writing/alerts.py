"""Counts what the alert rules find, and raises each alert once until its condition has cleared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastfs._record.record import Record
from fastfs._record.writing.alert_rules import AlertRule, Finding, Findings, FunctionRule, default_alerts
from fastfs._record.writing.interruptible_lock import InterruptibleLock

__all__ = ["Alerts", "checked_streaks"]


class Alerts:
    """The rules of a run, with the number of consecutive findings (the streak) of each rule and layer.

    Args:
        rules: rules, or functions ``(record, header) -> list of (layer, value, message)``, for measured and predicted
            records; the default rules if None.
        header: of the run.

    Raises:
        TypeError: not a list, or an entry that is neither a rule nor a function.
        ValueError: ``steps`` of a rule is not an integer >= 1.
    """

    def __init__(self, rules: Sequence[Any] | None, header: Mapping[str, Any]) -> None:
        self.header = header
        self._rules: dict[str, AlertRule] = {}
        if rules is not None and (isinstance(rules, (str, bytes)) or not isinstance(rules, Sequence)):
            raise TypeError(f"alerts: expected a list of rules such as AngleCollapse() or functions, got {rules!r}")
        for rule in default_alerts() if rules is None else rules:
            checked = _as_rule(rule)
            name, number = checked.name, 1
            while name in self._rules:
                number += 1
                name = f"{checked.name} {number}"
            self._rules[name] = checked
        self._streaks: dict[str, dict[str | None, int]] = {name: {} for name in self._rules}
        self._lock = InterruptibleLock()

    def update(self, record: Record) -> tuple[list[Record], list[tuple[str, BaseException]]]:
        """Applies the rules to a record.

        Returns:
            The alerts that it raises, and the rules that failed with their errors.
        """
        raised: list[Record] = []
        failed: list[tuple[str, BaseException]] = []
        if record.kind not in ("measured", "predicted"):
            return raised, failed
        for name, rule in self._rules.items():
            try:
                findings = rule.check(record, self.header)
                with self._lock:
                    raised += self._raised(name, rule, findings, record)
            except BaseException as error:  # if it ended the writer's thread, all later rows would be lost
                failed.append((name, error))
        return raised, failed

    def _raised(self, name: str, rule: AlertRule, findings: Findings, record: Record) -> list[Record]:
        raised = []
        for layer, finding in findings.items():
            if (message := self._count(name, rule, layer, finding)) is not None:
                value = None if finding is None or finding.value is None else float(finding.value)
                layer = None if layer is None else str(layer)
                scalars: dict[str, Any] = {"rule": name, "layer": layer, "value": value, "message": message}
                raised.append(Record("alert", record.step, record.time, scalars))
        return raised

    def state_dict(self) -> dict[str, Any]:
        """Returns the streaks of each rule as a list of ``[layer, number]``, which JSON can represent."""
        with self._lock:
            return {name: [list(item) for item in streaks.items()] for name, streaks in self._streaks.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state. Rules that are not in it start at zero; it may have rules that no longer exist.

        Raises:
            ValueError: not a state of :meth:`state_dict`; nothing is restored.
        """
        streaks = checked_streaks(state)
        with self._lock:
            for name in self._streaks:
                self._streaks[name] = dict(streaks.get(name, {}))

    def _count(self, name: str, rule: AlertRule, layer: str | None, finding: Finding | None) -> str | None:
        """Updates a streak; returns the message of an alert at the record that makes the streak long enough."""
        streaks = self._streaks[name]
        if finding is None:
            streaks.pop(layer, None)
            return None
        streaks[layer] = streaks.get(layer, 0) + 1
        if streaks[layer] != rule.steps:
            return None
        message = f"{finding.message}, {rule.steps} measured steps in a row" if rule.steps > 1 else str(finding.message)
        return message.encode("utf-8", "backslashreplace").decode("utf-8")  # unpaired surrogates cannot be written


def checked_streaks(state: Any) -> dict[str, dict[str | None, int]]:
    """Checks a state of :meth:`Alerts.state_dict`, which may have been stored as JSON.

    Returns:
        The streaks of each rule by layer.

    Raises:
        ValueError: not such a state; the message names the entry.
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


def _as_rule(rule: Any) -> AlertRule:
    if isinstance(rule, AlertRule) and not isinstance(rule, type):
        if not isinstance(rule.name, str) or not callable(rule.check):
            raise TypeError(f"alerts: expected a rule with a name and a method check, got {rule!r}")
        if isinstance(rule.steps, bool) or not isinstance(rule.steps, int) or rule.steps < 1:
            raise ValueError(f"alerts: {rule.name}: steps: expected an integer >= 1, got {rule.steps!r}")
        return rule
    if callable(rule) and not isinstance(rule, type):
        return FunctionRule(rule, getattr(rule, "__name__", type(rule).__name__))
    raise TypeError(f"alerts: expected a rule such as AngleCollapse() or a function, got {rule!r}")
