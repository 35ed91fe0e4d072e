"""The result of a scaling check, as text, tables, files and pictures."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from fastfs._utils.extras import frame
from fastfs._utils.output_files import check_output, write_whole
from fastfs.scaling._fit import Exponent, Status
from fastfs.scaling._predicted import Sizes, matching
from fastfs.scaling._rendering import render
from fastfs.scaling._verdicts import Point, Verdict, curvature

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["ScalingReport"]

_COLORS = {Status.PASS: "green", Status.UNCLEAR: "yellow", Status.FAIL: "red"}
_MOST_SEEDS = 1000  # beyond that, more seeds are no advice


@dataclass(frozen=True)
class ScalingReport:
    """What :func:`fastfs.scaling.check` found. ``str()`` is the table.

    Attributes:
        widths, depths: sizes that were run; widths at ``at_depth``, depths at ``at_width``.
        seeds: initialisations at every size.
        optimizer: name of the optimizer's type.
        tolerance, confidence: what the verdicts were made with.
        points: every measurement.
        verdicts: every exponent and what it says.
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
        """FAIL if a desideratum fails, else UNCLEAR if one is unclear, else PASS."""
        found = {v.status for v in self.verdicts}
        return next((s for s in (Status.FAIL, Status.UNCLEAR) if s in found), Status.PASS)

    @property
    def passed(self) -> bool:
        """Whether all desiderata pass; an unclear one does not."""
        return self.status is Status.PASS

    def of(self, desideratum: str) -> Status:
        """The status of ``"SP"``, ``"FL"``, ``"LD"`` or ``"BC"`` over both sizes: the worst one.

        Raises:
            ValueError: another name.
        """
        found = {v.status for v in self.verdicts if v.desideratum == desideratum}
        if not desideratum or not found:
            raise ValueError(f"desideratum: expected one of SP, FL, LD, BC, got {desideratum!r}")
        return next((s for s in (Status.FAIL, Status.UNCLEAR) if s in found), Status.PASS)

    def exponent(self, quantity: str, axis: str) -> Exponent:
        """The fitted exponent of a quantity, such as ``("feature speed", "width")``.

        Raises:
            ValueError: there is none of that name, or its values have no logarithm.
        """
        for verdict in self.verdicts:
            if (verdict.quantity, verdict.axis) == (quantity, axis) and verdict.fit is not None:
                return verdict.fit
        names = ", ".join(sorted({f"{v.quantity} ({v.axis})" for v in self.verdicts if v.fit is not None}))
        raise ValueError(f"no exponent of {quantity!r} over {axis!r}; there are: {names}")

    def matches(self, tolerance: float = 0.2) -> list[str]:
        """Schemes of :func:`fastfs.scaling.mlp` whose exponents of speed, decrease, sensitivity and angle fit."""
        sizes = Sizes(self.widths, self.depths, self.at_width, self.at_depth)
        return matching(self.verdicts, sizes, tolerance)

    def classify(self, tolerance: float = 0.2) -> str | None:
        """The only scheme that matches, or None: none does, or the intervals are too wide to tell."""
        found = self.matches(tolerance)
        return found[0] if len(found) == 1 else None

    @property
    def curvature(self) -> float:
        """Largest distance of the real from the first-order loss decrease, relative to the latter."""
        return curvature(self.points)

    def to_frame(self) -> DataFrame:
        """One row an exponent: desideratum, quantity, axis, exponent, low, high, status, seeds, advice.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = []
        for v in self.verdicts:
            fit = (v.fit.exponent, v.fit.low, v.fit.high) if v.fit else (math.nan,) * 3
            row = dict(zip(("exponent", "low", "high"), fit, strict=True))
            status = v.status.value if v.status else "info"
            head = {"desideratum": v.desideratum, "quantity": v.quantity, "axis": v.axis}
            rows.append({**head, **row, "status": status, "seeds": v.seeds, "advice": v.advice})
        return frame(rows)

    def points_frame(self) -> DataFrame:
        """One row a measurement, with the contribution of every group in a column ``contribution:<group>``.

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
        """The exponents as a rich table."""
        grid = Table(
            title=f"Exponents over width (at depth {self.at_depth}) and depth (at width {self.at_width}). "
            f"{self.optimizer}, {self.seeds} seeds, {self.confidence:.0%} intervals, wanted 0 +- {self.tolerance:g}",
            title_justify="left",
        )
        for column in ("", "quantity", "over"):
            grid.add_column(column)
        grid.add_column("exponent", justify="right", no_wrap=True)
        grid.add_column("", no_wrap=True)
        for v in self.verdicts:
            status = "" if v.status is None else f"[{_COLORS[v.status]}]{v.status.value}[/]"
            fit = "not positive" if v.fit is None else str(v.fit)
            grid.add_row(v.desideratum or "info", escape(v.quantity), v.axis, escape(fit), status)
        return grid

    def words(self) -> str:
        """What to change, what is unclear, and which scheme this looks like."""
        lines = [f"{v.desideratum} over {v.axis}: {v.advice}." for v in self.verdicts if v.status is Status.FAIL]
        for v in self.verdicts:
            if v.status is Status.UNCLEAR and v.seeds is not None:
                lines.append(f"{v.desideratum} over {v.axis}: {v.quantity} is unclear; {self._more(v)}.")
        if self.curvature > 0.3:
            lines.append(
                f"The loss decrease is off its first order by up to {self.curvature:.2g} times it: these are numbers "
                "of steps that large; with smaller learning rates they would be those of the scaling alone."
            )
        found = self.matches()
        if len(found) == 1:
            lines.append(f"Speed, decrease, sensitivity and angle scale as in the table's {found[0]!r} MLP.")
        elif found:
            lines.append(
                f"Speed, decrease, sensitivity and angle scale as in one of {', '.join(found)}: too uncertain to tell."
            )
        lines.append(f"{self.status.value}: " + ", ".join(f"{d} {self.of(d).value}" for d in ("SP", "FL", "LD", "BC")))
        return "\n".join(lines)

    def __str__(self) -> str:
        return render(self.table(), self.words())

    def write(self, out: str | os.PathLike[str]) -> list[Path]:
        """Write ``scaling-check.csv`` (exponents), ``scaling-check-points.csv`` and ``scaling-check.png`` to a folder.

        Raises:
            ImportError: pandas or matplotlib is not installed.
            NotADirectoryError, FileExistsError: the folder is a file.
            ValueError: one of the files is there, and no regular file.
        """
        from fastfs.scaling._plots import plot_report

        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"scaling-check{end}" for end in (".csv", "-points.csv", ".png")]
        for file in files:
            check_output(file)
        write_whole(files[0], self.to_frame().to_csv(index=False).encode())
        write_whole(files[1], self.points_frame().to_csv(index=False).encode())
        figure: Any = plot_report(self)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120, metadata={"Software": "fastfs.scaling"})
        write_whole(files[2], picture.getvalue())
        return files

    def _more(self, v: Verdict) -> str:
        assert v.seeds is not None
        if v.seeds > _MOST_SEEDS:
            return f"it would take more than {_MOST_SEEDS} seeds; larger sizes, further apart, or more rows will tell"
        return f"about {max(math.ceil(v.seeds), self.seeds + 1)} seeds instead of {self.seeds} would tell"
