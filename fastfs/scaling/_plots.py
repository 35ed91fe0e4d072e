"""The figure of a scaling check."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from fastfs.scaling._verdicts import AXES, Point, Verdict

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ImportError as missing:
    raise ImportError('the figure of a scaling check needs matplotlib: pip install "fastfs[scaling]"') from missing

__all__ = ["plot_exponents"]

_QUANTITIES: tuple[tuple[str, str, Callable[[Point], float]], ...] = (
    ("feature size", "rms(f), last hidden layer", lambda p: p.feature_rms),
    ("feature speed", "rms(df), per step", lambda p: p.update_rms),
    ("loss decrease", "decrease of the loss, per step", lambda p: p.decrease),
    ("sensitivity", "S = rms(df) / decrease", lambda p: p.sensitivity),
    ("cos(angle)", "cos(angle) of df and -b", lambda p: p.cos_angle),
)


def plot_exponents(points: Sequence[Point], verdicts: Sequence[Verdict], title: str) -> Figure:
    """Plot every seed, geometric means and fits: one column per quantity, one row over widths and one over depths.

    Args:
        points: all measurements.
        verdicts: all exponents.
        title: title of the figure.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(17.0, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(AXES), len(_QUANTITIES), squeeze=False)
    fits = {(v.quantity, v.axis): v for v in verdicts}
    for row, axis in zip(grid, AXES, strict=True):
        own = [p for p in points if p.axis == axis]
        for axes, (name, label, value) in zip(row, _QUANTITIES, strict=True):
            _draw(axes, own, value)
            verdict = fits.get((name, axis))
            if verdict is not None and verdict.fit is not None:
                ends = [min(p.size for p in own), max(p.size for p in own)]
                line = [verdict.fit.constant * s**verdict.fit.exponent for s in ends]
                state = f" {verdict.status.value}" if verdict.status else ""
                axes.plot(ends, line, color="C3", linewidth=1.2, label=f"{verdict.fit}{state}")
                axes.legend(fontsize=8, framealpha=0.85)
            axes.set_xlabel(axis)
            axes.set_ylabel(label)
    figure.suptitle(title)
    return figure


def _draw(axes: Any, points: Sequence[Point], value: Callable[[Point], float]) -> None:
    sizes = sorted({p.size for p in points})
    kept = [(p.size, value(p)) for p in points if math.isfinite(value(p)) and value(p) > 0]
    axes.plot(*zip(*kept, strict=True), ".", color="0.6", markersize=4) if kept else None
    means = [(s, [v for size, v in kept if size == s]) for s in sizes]
    drawn = [(s, statistics.geometric_mean(v)) for s, v in means if v]
    if drawn:
        axes.plot(*zip(*drawn, strict=True), "o", color="C0", markersize=5)
        axes.set_yscale("log")
        _label(axes.yaxis, [v for _, v in kept])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(s) for s in sizes], fontsize=8)
    axes.grid(True, which="major", alpha=0.3)


def _label(axis: Any, values: Sequence[float]) -> None:
    """Use a few plain tick labels for values of a small range, and powers of ten for a large range."""
    axis.set_minor_locator(NullLocator())
    span = max(values) / min(values)
    if span >= 100:
        axis.set_major_locator(LogLocator(numticks=6))
        return
    round_numbers = LogLocator(subs=(1, 2, 5), numticks=10)
    axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]) if span < 5 else round_numbers)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
