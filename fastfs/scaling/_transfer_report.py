"""The verdict of :func:`fastfs.scaling.transfer` as text, table and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fastfs._utils.extras import frame
from fastfs.scaling._fit import Exponent, Status
from fastfs.scaling._rendering import some
from fastfs.scaling._report import exponent_row, exponent_table, worst
from fastfs.scaling._verdicts import AXES, Verdict

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["TransferReport"]


@dataclass(frozen=True)
class TransferReport:
    """The result of :func:`fastfs.scaling.transfer`. ``str()`` is the verdict in a few lines.

    Attributes:
        labels: of the runs.
        sizes: (width, depth) of each run.
        steps: measured steps that were used.
        axes: those that were judged, of ``"width"`` and ``"depth"``.
        tolerance: permitted deviation of an exponent from 0.
        confidence: level of the intervals.
        verdicts: all exponents with their status.
        values: judged quantities of each run, by name; NaN where one is missing, not valid or not positive.
    """

    labels: tuple[str, ...]
    sizes: tuple[tuple[float, float], ...]
    steps: tuple[int, ...]
    axes: tuple[str, ...]
    tolerance: float
    confidence: float
    verdicts: tuple[Verdict, ...]
    values: tuple[Mapping[str, float], ...]

    @property
    def status(self) -> Status:
        """FAIL if a quantity fails, otherwise UNCLEAR if one is unclear, otherwise PASS."""
        return worst(v.status for v in self.verdicts)

    def of(self, axis: str) -> Status:
        """Return the worst status of an axis.

        Args:
            axis: ``"width"`` or ``"depth"``.

        Returns:
            The status.

        Raises:
            ValueError: the axis was not judged.
        """
        if axis not in self.axes:
            raise ValueError(f"axis: expected one of {', '.join(self.axes)}, got {axis!r}")
        return worst(v.status for v in self.verdicts if v.axis == axis)

    def exponent(self, quantity: str, axis: str) -> Exponent:
        """Return the fitted exponent of a quantity, such as ``("feature speed", "width")``.

        Args:
            quantity: name of the quantity.
            axis: ``"width"`` or ``"depth"``.

        Returns:
            The exponent with its interval.

        Raises:
            ValueError: there is no such exponent.
        """
        for verdict in self.verdicts:
            if (verdict.quantity, verdict.axis) == (quantity, axis) and verdict.fit is not None:
                return verdict.fit
        names = ", ".join(f"{v.quantity} ({v.axis})" for v in self.verdicts if v.fit is not None)
        raise ValueError(f"no exponent of {quantity!r} over {axis!r}; there are: {names}")

    def to_frame(self) -> DataFrame:
        """Return one row per exponent, with the columns of :meth:`ScalingReport.to_frame`; ``seeds`` counts runs.

        Returns:
            A DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame([exponent_row(verdict) for verdict in self.verdicts])

    def to_dict(self) -> dict[str, Any]:
        """Return everything: verdict, settings, exponents (the rows of :meth:`to_frame`) and values of the runs.

        Returns:
            Mappings, lists, texts and numbers; numbers that are missing are NaN.
        """
        return {
            "status": self.status.value,
            "axes": {axis: self.of(axis).value for axis in self.axes},
            "verdict": str(self).split("\n"),
            "settings": {"steps": self.steps, "tolerance": self.tolerance, "confidence": self.confidence},
            "exponents": [exponent_row(verdict) for verdict in self.verdicts],
            "runs": [
                {"label": label, **dict(zip(AXES, size, strict=True)), **values}
                for label, size, values in zip(self.labels, self.sizes, self.values, strict=True)
            ],
        }

    def table(self) -> Table:
        """Return the exponents as a rich table."""
        title = f"Exponents of {len(self.labels)} runs, {self.confidence:.0%} intervals, target 0 +- {self.tolerance:g}"
        return exponent_table(self.verdicts, title)

    def __str__(self) -> str:
        """Return a line on the verdict, and one for each axis."""
        steps = f"{len(self.steps)} measured steps ({self.steps[0]:,} to {self.steps[-1]:,})"
        lines = [f"{self.status.value}: {len(self.labels)} runs, {steps}, exponents against 0 +- {self.tolerance:g}"]
        return "\n".join([*lines, *(self._about(axis) for axis in AXES)])

    def _about(self, axis: str) -> str:
        sizes = sorted({size[AXES.index(axis)] for size in self.sizes})
        span = ", ".join(f"{size:g}" for size in sizes)
        if axis not in self.axes:
            return f"over {axis} ({span}): not judged, which takes at least 3 different sizes"
        status = self.of(axis)
        if status is Status.PASS:
            return f"over {axis} ({span}): PASS, every quantity keeps its size"
        own = [v for v in self.verdicts if v.axis == axis and v.status is status]
        own.sort(key=lambda v: -abs(v.fit.exponent) if v.fit else -math.inf)
        said = some([f"{v.quantity} ({f'{v.fit.exponent:+.2f}' if v.fit else 'no exponent'})" for v in own])
        more = next((v.advice for v in own if v.advice), "")
        return f"over {axis} ({span}): {status.value}, {said}" + (f". {more[0].upper()}{more[1:]}" if more else "")
