"""The numbers of one run that signs are looked for in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfs._report.grids import Grid, make_grid
from fastfs._report.quantities import QUANTITIES

if TYPE_CHECKING:
    import pandas

__all__ = ["RunNumbers", "cuts"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class RunNumbers:
    """The measured steps of one run.

    Attributes:
        header: of the run.
        names: of the layers, without groups.
        grid: its first rows are the layers.
        cut: whether each layer is a cut, bool (L,).
        alerts, skipped: the records of these kinds.
    """

    header: Mapping[str, Any]
    names: list[str]
    grid: Grid
    cut: Array
    alerts: Sequence[Mapping[str, Any]]
    skipped: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, table: pandas.DataFrame, run: str | None = None) -> RunNumbers:
        """Selects a run of a table.

        Args:
            table: of :func:`fastfs.load`.
            run: id of the run; the last one by default.

        Returns:
            Its numbers.

        Raises:
            ValueError: the table has no such run, or no measured step of it.
        """
        headers = {str(header["run"]): dict(header) for header in table.attrs["headers"]}
        run = next(reversed(headers)) if run is None else run
        if run not in headers:
            raise ValueError(f"no run {run!r} in the record; it has: {', '.join([*headers][-20:])}")
        names = [str(name) for name in headers[run].get("layers", [])]
        mine = np.asarray((table["run"] == run) & (table["kind"] == "measured") & (table["layer"] < len(names)))
        if not mine.any():
            raise ValueError(f"run {run}: no measured step yet, so there is nothing to explain")
        grid = make_grid(table, len(names), [quantity.key for quantity in QUANTITIES], mine)
        events = {
            kind: [one for one in table.attrs[kind] if one["run"] == run] for kind in ("alerts", "skipped", "structure")
        }
        cut = cuts(events.pop("structure"), len(names))
        return cls(headers[run], names, grid, cut, **events)

    @property
    def invalid(self) -> Array:
        """Which rows were measured and are not valid, bool (L, steps)."""
        rows: Array = self.grid.invalid[: len(self.names)]
        return rows

    def column(self, name: str, *, valid: bool = True) -> Array:
        """Returns a quantity, (L, steps), NaN where it is missing or, with ``valid``, the row is not valid."""
        values = self.grid.columns.get(name)
        if values is None:
            return np.full(self.invalid.shape, np.nan)
        values = values[: len(self.names)]
        return np.where(self.invalid, np.nan, values) if valid else values

    def families(self) -> list[list[int]]:
        """Returns the layers whose names differ by a number only, such as ``blocks.0`` and ``blocks.1``, in order."""
        found: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            found.setdefault(re.sub(r"\d+", "#", name), []).append(index)
        return [family for family in found.values() if len(family) > 2]

    def reasons(self) -> Counter[str]:
        """Returns why rows are not valid, and how many for each reason."""
        codes = self.grid.why[: len(self.names)][self.invalid].tolist()
        return Counter(self.grid.reasons[code] for code in codes)

    @property
    def last_cut(self) -> int | None:
        """The last layer that is a cut: its aligned decrease is that of nearly all parameters."""
        found = np.flatnonzero(self.cut)
        return int(found[-1]) if len(found) else None


def cuts(structures: Sequence[Mapping[str, Any]], layers: int) -> Array:
    """Returns which layers are cuts by the last record of a structure, bool (L,); none if there is no record."""
    found = np.zeros(layers, dtype=bool)
    flags = (structures[-1].get("layers") or {}).get("cut") or [] if structures else []
    found[: len(flags)] = [flag is True for flag in flags[:layers]]
    return found
