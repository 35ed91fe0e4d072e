"""What an alert rule is, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from fastfs._record.record import Record

__all__ = ["AlertRule", "Finding", "Findings"]


class Finding(NamedTuple):
    """What a rule found at a layer.

    Attributes:
        value: the number that met the condition, if there is one.
        message: follows the layer's name in the alert.
    """

    value: float | None
    message: str


Findings = dict[str | None, Finding | None]
"""Result of a check by layer (None is the whole model): a finding, or None if the layer is healthy.

A layer that is missing could not be checked.
"""


@runtime_checkable
class AlertRule(Protocol):
    """A rule that raises an alert once :attr:`steps` consecutive checked records meet its condition.

    An alert is raised once, and again only after the condition has cleared.
    """

    @property
    def name(self) -> str:
        """Appears in alerts."""

    @property
    def steps(self) -> int:
        """Number of consecutive records, at least 1."""

    def check(self, record: Record, header: Mapping[str, Any]) -> Findings:
        """Checks a record.

        Args:
            record: A measured or predicted record.
            header: The header of its run.

        Returns:
            A finding, or None, for each layer that could be checked.
        """
