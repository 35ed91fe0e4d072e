"""Alerts as text for experiment trackers."""

from __future__ import annotations

from collections.abc import Sequence

from fastfs._record.record import Record

__all__ = ["alert_texts"]


def alert_texts(records: Sequence[Record]) -> list[tuple[str, str, int]]:
    """Returns title, text and step for each rule and step of the alerts among the records; a line per layer."""
    texts: dict[tuple[str, int], list[str]] = {}
    for record in records:
        if record.kind == "alert":
            layer, rule = record.scalars.get("layer"), str(record.scalars.get("rule"))
            line = f"step {record.step}: {'' if layer is None else f'{layer}: '}{record.scalars.get('message')}"
            texts.setdefault((rule, record.step), []).append(line)
    return [(f"fastfs: {rule}", "\n".join(lines), step) for (rule, step), lines in texts.items()]
