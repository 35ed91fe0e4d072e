"""The result of a scaling check as text, tables, files and a figure."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from fastfs._utils.extras import frame
from fastfs._utils.output_files import check_output, write_whole
from fastfs.scaling._fit import Exponent, Status
from fastfs.scaling._predicted import Sizes, matching
from fastfs.scaling._rendering import render, some
from fastfs.scaling._verdicts import DESIDERATA, Point, Verdict, curvature

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["ScalingReport", "exponent_row", "exponent_table", "worst"]

_COLORS = {Status.PASS: "green", Status.UNCLEAR: "yellow", Status.FAIL: "red"}
_CURVED = 0.3  # relative deviation of the loss decrease from first order that is worth a word
_MOST_SEEDS = 1000  # beyond this number, more seeds are not suggested


def exponent_row(v: Verdict) -> dict[str, Any]:
    """Return a verdict as a row of a table or of JSON."""
    fit = (v.fit.exponent, v.fit.low, v.fit.high) if v.fit else (math.nan,) * 3
    numbers = dict(zip(("exponent", "low", "high"), fit, strict=True))
    status = v.status.value if v.status else "info"
    head = {"desideratum": v.desideratum, "quantity": v.quantity, "axis": v.axis}
    return {**head, **numbers, "status": status, "seeds": v.seeds, "advice": v.advice}


def exponent_table(verdicts: Iterable[Verdict], title: str) -> Table:
    """Return exponents with their status as a rich table."""
    grid = Table(title=title, title_justify="left")
    for column in ("", "quantity", "over"):
        grid.add_column(column)
    grid.add_column("exponent", justify="right", no_wrap=True)
    grid.add_column("", no_wrap=True)
    for v in verdicts:
        status = "" if v.status is None else f"[{_COLORS[v.status]}]{v.status.value}[/]"
        fit = "not positive" if v.fit is None else str(v.fit)
        grid.add_row(v.desideratum or "info", escape(v.quantity), v.axis, escape(fit), status)
    return grid


def worst(statuses: Iterable[Status | None]) -> Status:
    """FAIL if one of them is, otherwise UNCLEAR if one is, otherwise PASS."""
    found = set(statuses)
    return next((s for s in (Status.FAIL, Status.UNCLEAR) if s in found), Status.PASS)


def _span(sizes: tuple[int, ...]) -> str:
    return f"{min(sizes)} to {max(sizes)}"


@dataclass(frozen=True)
class ScalingReport:
    """The result of :func:`fastfs.scaling.check`. ``str()`` is the verdict in three lines.

    Attributes:
        widths: widths that were run at ``at_depth``.
        depths: depths that were run at ``at_width``.
        at_width: width at which depths were varied.
        at_depth: depth at which widths were varied.
        seeds: number of initializations per size.
        optimizer: name of the optimizer class.
        tolerance: permitted deviation of an exponent from 0.
        confidence: level of the intervals.
        points: all measurements.
        verdicts: all exponents with their status.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    at_width: int
    at_depth: int
    seeds: int
    optimizer: str
    tolerance: float
    confidence: float
    points: tuple[Point, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def status(self) -> Status:
        """FAIL if a desideratum fails, otherwise UNCLEAR if one is unclear, otherwise PASS."""
        return worst(v.status for v in self.verdicts)

    @property
    def passed(self) -> bool:
        """Whether all desiderata pass; an unclear one does not count as passed."""
        return self.status is Status.PASS

    def of(self, desideratum: str) -> Status:
        """Return the worst status of ``"SP"``, ``"FL"``, ``"LD"`` or ``"BC"`` over both axes.

        Args:
            desideratum: one of these names.

        Returns:
            The status.

        Raises:
            ValueError: the name is unknown.
        """
        found = {v.status for v in self.verdicts if v.desideratum == desideratum}
        if not desideratum or not found:
            raise ValueError(f"desideratum: expected one of SP, FL, LD, BC, got {desideratum!r}")
        return worst(found)

    def exponent(self, quantity: str, axis: str) -> Exponent:
        """Return the fitted exponent of a quantity, such as ``("feature speed", "width")``.

        Args:
            quantity: name of the quantity.
            axis: ``"width"`` or ``"depth"``.

        Returns:
            The exponent with its interval.

        Raises:
            ValueError: there is no such quantity, or some of its values have no logarithm.
        """
        for verdict in self.verdicts:
            if (verdict.quantity, verdict.axis) == (quantity, axis) and verdict.fit is not None:
                return verdict.fit
        names = ", ".join(sorted({f"{v.quantity} ({v.axis})" for v in self.verdicts if v.fit is not None}))
        raise ValueError(f"no exponent of {quantity!r} over {axis!r}; there are: {names}")

    def matches(self, tolerance: float = 0.2) -> list[str]:
        """Return the schemes of :func:`fastfs.scaling.mlp` with the same exponents of speed, decrease, S and angle.

        Args:
            tolerance: permitted deviation where the interval is narrower.

        Returns:
            Names of the schemes.
        """
        sizes = Sizes(self.widths, self.depths, self.at_width, self.at_depth)
        return matching(self.verdicts, sizes, tolerance)

    def classify(self, tolerance: float = 0.2) -> str | None:
        """Return the only scheme that matches, or None if none does or the intervals are too wide to tell.

        Args:
            tolerance: permitted deviation where the interval is narrower.

        Returns:
            Name of the scheme, or None.
        """
        found = self.matches(tolerance)
        return found[0] if len(found) == 1 else None

    @property
    def curvature(self) -> float:
        """Largest deviation of the actual loss decrease from the first-order one, relative to the latter."""
        return curvature(self.points)

    def to_frame(self) -> DataFrame:
        """Return one row per exponent: desideratum, quantity, axis, exponent, low, high, status, seeds, advice.

        Returns:
            A DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame([exponent_row(verdict) for verdict in self.verdicts])

    def to_dict(self) -> dict[str, Any]:
        """Return everything: verdict, settings, exponents (the rows of :meth:`to_frame`) and measurements.

        Returns:
            Mappings, lists, texts and numbers; numbers that are missing are NaN, and those without a bound infinite.
        """
        fields = ("widths", "depths", "at_width", "at_depth", "seeds", "optimizer", "tolerance", "confidence")
        return {
            "status": self.status.value,
            "desiderata": {name: self.of(name).value for name in DESIDERATA},
            "verdict": str(self).split("\n"),
            "settings": {name: getattr(self, name) for name in fields},
            "exponents": [exponent_row(verdict) for verdict in self.verdicts],
            "curvature": self.curvature,
            "matches": self.matches(),
            "points": [dataclasses.asdict(point) for point in self.points],
        }

    def points_frame(self) -> DataFrame:
        """Return one row per measurement, with one column ``contribution:<group>`` per group of parameters.

        Returns:
            A DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = []
        for point in self.points:
            row = dataclasses.asdict(point)
            shares = row.pop("contributions")
            rows.append({**row, **{f"contribution:{name}": c for name, c in shares.items()}})
        return frame(rows)

    def table(self) -> Table:
        """Return the exponents as a rich table."""
        return exponent_table(
            self.verdicts,
            f"Exponents over width (at depth {self.at_depth}) and depth (at width {self.at_width}). "
            f"{self.optimizer}, {self.seeds} seeds, {self.confidence:.0%} intervals, target 0 +- {self.tolerance:g}",
        )

    def words(self) -> str:
        """Return all advice: what to change, what is unclear, and which scheme the exponents match."""
        lines = [f"{v.desideratum} over {v.axis}: {v.advice}." for v in self.verdicts if v.status is Status.FAIL]
        for v in self.verdicts:
            if v.status is Status.UNCLEAR and v.seeds is not None:
                lines.append(f"{v.desideratum} over {v.axis}: {v.quantity} is unclear; {self._more(v)}.")
        if self.curvature > _CURVED:
            lines.append(f"Smaller learning rates would measure the scaling alone: {self._curved()}.")
        found = self.matches()
        if len(found) == 1:
            lines.append(f"Speed, decrease, sensitivity and angle scale as in the table's {found[0]!r} MLP.")
        elif found:
            lines.append(
                f"Speed, decrease, sensitivity and angle scale as in one of {', '.join(found)}: too uncertain to tell."
            )
        return "\n".join(lines)

    def details(self) -> str:
        """Return the verdict, the table of exponents and all advice, as ``fastfs scaling-check --verbose`` prints."""
        return render(str(self), self.table(), self.words())

    def __str__(self) -> str:
        """Return the verdict in three lines: what passes and fails, which exponents fail, and what to do first."""
        found = ", ".join(f"{name} {self.of(name).value}" for name in DESIDERATA)
        sizes = f"{self.optimizer}, widths {_span(self.widths)} at depth {self.at_depth}, "
        sizes += f"depths {_span(self.depths)} at width {self.at_width}, {self.seeds} seeds"
        return "\n".join((f"{self.status.value}: {found} ({sizes})", self._what(), self._first_step()))

    def _what(self) -> str:
        """Say which exponents decided the status."""
        if self.passed:
            return f"All exponents of size, speed, loss decrease and balance are 0 within {self.tolerance:g}."
        own = [v for v in self.verdicts if v.status is self.status]
        own.sort(key=lambda v: -abs(v.fit.exponent) if v.fit else -math.inf)
        said = [
            f"{v.desideratum} {v.quantity} over {v.axis} ({f'{v.fit.exponent:+.2f}' if v.fit else 'not positive'})"
            for v in own
        ]
        what = "Not 0 within" if self.status is Status.FAIL else "Unclear whether 0 within"
        return f"{what} {self.tolerance:g}, exponents of {some(said)}."

    def _first_step(self) -> str:
        """Say what to do first. The sizes of features come before their speed, which depends on them, and so on."""
        if self.curvature > _CURVED:
            return f"Do first: check again with smaller learning rates; {self._curved()}."
        if self.passed:
            return "Nothing has to change."
        if self.status is Status.UNCLEAR:
            most = max((v for v in self.verdicts if v.status is Status.UNCLEAR and v.seeds), key=lambda v: v.seeds or 0)
            return f"To decide {most.desideratum} {most.quantity} over {most.axis}: {self._more(most)}."
        ordered = ("feature size", "feature size, mean of layers", "sensitivity", "loss decrease")
        failed = [v for v in self.verdicts if v.status is Status.FAIL]

        def order(v: Verdict) -> tuple[int, float]:
            last = len(ordered) + (v.quantity == "feature speed")  # its advice refers to the others
            place = ordered.index(v.quantity) if v.quantity in ordered else last
            return place, -abs(v.fit.exponent) if v.fit else -math.inf

        first = min(failed, key=order)
        return f"Do first, then check again: {first.desideratum} over {first.axis}: {first.advice}."

    def write(self, out: str | os.PathLike[str]) -> list[Path]:
        """Write ``scaling-check.csv`` (exponents), ``scaling-check-points.csv`` and ``scaling-check.png`` to a folder.

        Args:
            out: the folder; created if necessary.

        Returns:
            Paths of the files.

        Raises:
            ImportError: pandas or matplotlib is not installed.
            NotADirectoryError: a parent of the folder is a file.
            FileExistsError: the folder is a file.
            ValueError: one of the files exists and is not a regular file.
        """
        from fastfs.scaling._plots import plot_exponents

        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"scaling-check{end}" for end in (".csv", "-points.csv", ".png")]
        for file in files:
            check_output(file)
        write_whole(files[0], self.to_frame().to_csv(index=False).encode())
        write_whole(files[1], self.points_frame().to_csv(index=False).encode())
        title = (
            f"Scaling check: {self.optimizer}, {self.seeds} seeds; widths at depth {self.at_depth}, depths at width "
            f"{self.at_width}; fitted exponents with {self.confidence:.0%} intervals"
        )
        figure: Any = plot_exponents(self.points, self.verdicts, title)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120, metadata={"Software": "fastfs.scaling"})
        write_whole(files[2], picture.getvalue())
        return files

    def _curved(self) -> str:
        return (
            f"the loss decrease deviates from first order by up to {self.curvature:.2g} times its size, and the "
            "exponents include this curvature"
        )

    def _more(self, v: Verdict) -> str:
        assert v.seeds is not None
        if v.seeds > _MOST_SEEDS:
            return f"this would take more than {_MOST_SEEDS} seeds; use larger sizes, further apart, or more rows"
        return f"about {max(math.ceil(v.seeds), self.seeds + 1)} seeds instead of {self.seeds} would decide it"
