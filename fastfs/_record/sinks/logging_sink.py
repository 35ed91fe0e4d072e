"""Records as messages of Python's ``logging``."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastfs._record.record import Record

__all__ = ["LoggingSink"]


class LoggingSink:
    """Logs a line for each measured and each skipped step, and a warning for each alert.

    A measured step is summarized by its loss, the number of valid layers (without groups) and the median of their
    angles. Predicted steps and structure are not logged. Handlers run in the writer's thread.

    Args:
        logger: name of the logger.
        level: of measured and skipped steps.
    """

    def __init__(self, logger: str = "fastfs", *, level: int = logging.INFO) -> None:
        self._logger = logging.getLogger(logger)
        self._level = level
        self._layers = 0

    def open(self, header: Mapping[str, Any]) -> None:
        self._layers = len(header["layers"])

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            scalars = record.scalars
            if record.kind == "measured":
                self._logger.log(self._level, "step %d: %s", record.step, self._summary(record))
            elif record.kind == "skipped":
                self._logger.log(self._level, "step %d: skipped: %s", record.step, scalars["reason"])
            elif record.kind == "alert":
                layer = "" if scalars["layer"] is None else f"{scalars['layer']}: "
                self._logger.warning("step %d: %s%s [%s]", record.step, layer, scalars["message"], scalars["rule"])

    def close(self) -> None:
        pass

    def _summary(self, record: Record) -> str:
        angle, valid = (record.columns.get(name, [])[: self._layers] for name in ("angle", "valid"))
        angles = [a for a, v in zip(angle, valid, strict=False) if v and a is not None and math.isfinite(a)]
        loss = record.scalars.get("loss")
        parts = [] if loss is None else [f"loss {loss:.4g}"]
        parts.append(f"{sum(map(bool, valid))} of {self._layers} layers valid")
        if angles:
            parts.append(f"median angle {statistics.median(angles):.3f} rad")
        return ", ".join(parts)
