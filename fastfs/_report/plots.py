"""Pictures of a record: a layer x step heat map of a quantity, beside one line per layer."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfs._record.reading.load import load
from fastfs._utils.output_files import write_whole

try:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, MaxNLocator
except ImportError as missing:
    raise ImportError('fastfs._report.plots needs matplotlib: pip install "fastfs[plot]"') from missing

if TYPE_CHECKING:
    import pandas

__all__ = ["PLOTS", "SOFTWARE", "Plot", "plot_layers", "plot_record"]

SOFTWARE = "fastfs._report.plots"
"""The ``Software`` entry in the metadata of every picture."""

_MOST_NAMES = 26
_MOST_LEGEND = 8
_MOST_DOTS = 4000


@dataclass(frozen=True)
class Plot:
    """How to draw a column of a record."""

    column: str
    file: str
    title: str
    label: str
    colors: str
    logarithmic: bool


PLOTS = (
    Plot(
        "angle",
        "angle.png",
        "Backward-feature angle",
        "angle between feature update and -dLoss/df (radians)",
        "viridis",
        False,
    ),
    Plot(
        "update_rms", "speed.png", "Feature speed", "rms of the feature update (feature units per step)", "magma", True
    ),
    Plot(
        "relative_update",
        "relative_update.png",
        "Relative feature update",
        "|feature update| / |feature| (per step)",
        "magma",
        True,
    ),
)


def plot_record(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, title: str = "", run: str | None = None
) -> list[Path]:
    """Draws all plots of a record.

    Args:
        path: of the record.
        out: folder for the pictures; created if missing.
        title: of the run, appended to the title of each plot.
        run: id of the run; the last one by default.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib or pandas is not installed.
        ValueError: the record has no rows of that run.
    """
    table = load(path)
    table = table[(table["kind"] == "measured") & ~table["group"]]
    if len(table) and run is None:
        run = table["run"].iloc[-1]
    table = table[table["run"] == run]
    if not len(table):
        raise ValueError(f"{path}: no measured step to draw")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for plot in PLOTS:
        figure = plot_layers(table, plot, title=title)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=130, metadata={"Software": SOFTWARE})
        written.append(write_whole(folder / plot.file, picture.getvalue()))
    return written


def plot_layers(table: pandas.DataFrame, plot: Plot, *, title: str = "") -> Figure:
    """Draws a heat map over steps and layers, the first layer on top, and a line over steps for each layer.

    Gray cells were not measured; dots mark rows that are not valid.

    Returns:
        The figure.

    Raises:
        ValueError: the table is empty.
    """
    if not len(table):
        raise ValueError("an empty record cannot be drawn")
    values = table.pivot_table(index="layer", columns="step", values=plot.column, aggfunc="last", dropna=False)
    valid = table.pivot_table(index="layer", columns="step", values="valid", aggfunc="last").reindex_like(values)
    names = table.drop_duplicates("layer").sort_values("layer")["name"].tolist()
    steps = values.columns.to_numpy(dtype=float)
    data = values.to_numpy(dtype=float)
    if plot.logarithmic:
        data = np.where(data > 0, data, np.nan)
    norm = _norm(data, plot.logarithmic)

    figure = Figure(figsize=(12.5, 4.9 if len(names) <= 12 else 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    heat, lines = figure.subplots(1, 2, width_ratios=(1.15, 1))
    figure.suptitle(f"{plot.title}: {title}" if title else plot.title, fontsize=13)

    heat.set_facecolor("0.85")
    mesh = heat.pcolormesh(
        _edges(steps), np.arange(len(names) + 1) - 0.5, np.ma.masked_invalid(data), cmap=plot.colors, norm=norm
    )
    flagged = np.argwhere(np.isfinite(data) & ~(valid.to_numpy(dtype=float, na_value=math.nan) > 0))
    shown = flagged[:: 1 + len(flagged) // _MOST_DOTS]
    heat.plot(steps[shown[:, 1]], shown[:, 0], ".", color="0.6", markersize=3)
    notes = ["grey: not measured"] * bool(np.isnan(data).any()) + ["dots: not valid"] * bool(len(flagged))
    heat.set_xlabel("optimizer step" + (f"   ({', '.join(notes)})" if notes else ""))
    _name_layers(heat, names)
    heat.invert_yaxis()  # the first layer on top, as on the report page
    figure.colorbar(mesh, ax=heat, extend=_extend(data, norm))  # the axis of the lines next to it has the label

    colors = colormaps["viridis"](np.linspace(0.0, 0.92, len(names)))
    marker = "." if len(steps) <= 3 else None
    for row, (name, color) in enumerate(zip(names, colors, strict=True)):
        lines.plot(steps, data[row], color=color, linewidth=1.3 if len(names) <= 40 else 0.7, marker=marker, label=name)
    lines.set_xlabel("optimizer step")
    lines.set_ylabel(plot.label)
    lines.grid(True, which="major", alpha=0.3)
    lines.margins(x=0.01)
    if plot.logarithmic and np.isfinite(data).any():
        lines.set_yscale("log")
    if plot.column == "angle":
        lines.axhline(math.pi / 2, color="0.35", linestyle="--", linewidth=1)
        lines.margins(y=0.08)
        lines.annotate(
            "pi/2: move unrelated to the loss", (1, math.pi / 2), xycoords=("axes fraction", "data"),
            xytext=(-4, 3), textcoords="offset points", ha="right", va="bottom", color="0.35", fontsize=8,
        )  # fmt: skip
    if len(names) <= _MOST_LEGEND:
        lines.legend(fontsize=8, framealpha=0.85)
    else:
        depth = ScalarMappable(Normalize(0, len(names) - 1), colormaps["viridis"].resampled(256))
        bar = figure.colorbar(depth, ax=lines, label="layer number of the lines", ticks=MaxNLocator(8, integer=True))
        bar.ax.invert_yaxis()
    for axes in (heat, lines):
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True) if len(steps) > 1 else FixedLocator(steps.tolist()))
    return figure


def _norm(data: np.ndarray[Any, Any], logarithmic: bool) -> Normalize:
    """Color range from the 1st to the 99th percentile, so that outliers leave the rest readable."""
    finite = data[np.isfinite(data)]
    if not finite.size:
        return Normalize(0.0, 1.0)
    low, high = (float(v) for v in np.percentile(finite, (1, 99)))
    if logarithmic:
        return LogNorm(low, high) if high > low * 1.01 else LogNorm(low / 1.5, high * 1.5)
    return Normalize(low, high) if high - low > 1e-9 else Normalize(low - 0.5, high + 0.5)


def _extend(data: np.ndarray[Any, Any], norm: Normalize) -> str:
    finite = data[np.isfinite(data)]
    low = bool(finite.size) and norm.vmin is not None and float(finite.min()) < norm.vmin
    high = bool(finite.size) and norm.vmax is not None and float(finite.max()) > norm.vmax
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[low, high]


def _edges(steps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Edges of cells around the measured steps, which need not be evenly spaced."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _name_layers(axes: Any, names: Sequence[str]) -> None:
    """Labels the axis with names if they fit, otherwise with indices. A common prefix goes to the axis label."""
    prefix = _shared_parents(names)
    if len(names) <= _MOST_NAMES:
        axes.set_yticks(range(len(names)), [name[len(prefix) :] for name in names], fontsize=8)
        axes.set_ylabel(f"layer ({prefix}*)" if prefix else "layer")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.set_ylabel(f"layer number ({names[0]} to {names[-1]})")


def _shared_parents(names: Sequence[str]) -> str:
    """The common prefix of all names, up to and including a dot; empty for a single name."""
    parents = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared) if len(names) > 1 else ""
