"""Figures, each drawn from its table alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastfs._reproduce.paper.published import PUBLISHED

try:
    import pandas
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullLocator
except ImportError as missing:
    what = 'fastfs reproduce needs matplotlib, pandas and scipy: pip install "fastfs[plot,spectrum]"'
    raise ImportError(what) from missing

__all__ = [
    "draw_decomposition",
    "draw_depth",
    "draw_layer",
    "draw_mlp_exponent",
    "draw_scale",
    "draw_sensitivity",
    "draw_spectral",
    "draw_tail",
    "draw_training",
    "draw_transformer",
    "png",
]

_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")  # Okabe and Ito, colorblind-safe
_MARKERS = ("o", "s", "^", "D", "v", "P")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_GREY = "0.45"
_LAWS = {
    "1/L": r"$\beta = 1/L$",
    "0.5/sqrt(L)": r"$\beta = 0.5/\sqrt{L}$",
    "1/sqrt(L)": r"$\beta = 1/\sqrt{L}$",
    "2/sqrt(L)": r"$\beta = 2/\sqrt{L}$",
    "1": r"$\beta = 1$ (MLP)",
}
_ANGLE = "backward-feature angle (rad)"


def png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file."""
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=170, metadata={"Software": "fastfs reproduce"})
    return buffer.getvalue()


def _figure(columns: int = 1, width: float = 5.4, height: float = 3.7, **options: Any) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width * columns if columns > 1 else width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [*np.atleast_1d(figure.subplots(1, columns, **options))]
    for axes in panels:
        axes.grid(True, which="major", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _angle_axis(axes: Any, low: float = 0.0) -> None:
    """Set the axis to angles from ``low`` to pi/2 with ticks at multiples of pi/8."""
    axes.set_ylim(low, math.pi / 2 * 1.03)
    axes.yaxis.set_major_locator(FixedLocator([k * math.pi / 8 for k in range(5)]))
    names = ("0", r"$\pi/8$", r"$\pi/4$", r"$3\pi/8$", r"$\pi/2$")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: names[round(value / (math.pi / 8))]))
    axes.axhline(math.pi / 2, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_ylabel(_ANGLE)


def _ticks(axis: Any, values: Sequence[float]) -> None:
    """Set plain numbers as ticks of a logarithmic axis."""
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _band(axes: Any, x: Any, mean: Any, spread: Any, color: str) -> None:
    axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.18, linewidth=0)


def _published(figure: str, key: str) -> tuple[float, float]:
    for entry in PUBLISHED:
        if (entry.figure, entry.key) == (figure, key):
            return entry.low, entry.high
    raise KeyError(f"nothing is published for {key!r} of figure {figure}")


def draw_layer(table: pandas.DataFrame) -> Figure:
    """Draw (a)."""
    figure, (axes,) = _figure()
    for n, (law, rows) in enumerate(table.groupby("branch_scale", sort=False)):
        axes.plot(rows["layer"], rows["angle"], color=_COLORS[n], linestyle=_STYLES[n], label=_LAWS[str(law)])
        _band(axes, rows["layer"], rows["angle"], rows["angle_std"], _COLORS[n])
    axes.set_xlim(1, table["layer"].max())
    axes.set_xlabel(r"layer $\ell$")
    _angle_axis(axes)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 0.95))
    return figure


def draw_depth(table: pandas.DataFrame) -> Figure:
    """Draw (b)."""
    figure, (axes,) = _figure()
    for n, (law, rows) in enumerate(table.groupby("branch_scale", sort=False)):
        axes.errorbar(
            rows["depth"], rows["angle"], rows["angle_std"], color=_COLORS[n], linestyle=_STYLES[n],
            marker=_MARKERS[n], markersize=4, capsize=2, linewidth=1.3, label=_LAWS[str(law)],
        )  # fmt: skip
    for c in ("0.5", "1", "2"):
        axes.axhspan(*_published("b", f"c={c},L=100"), color=_GREY, alpha=0.3, linewidth=0)
    mlp = _published("b", "mlp,L=100")[0]
    axes.plot([100], [mlp], "*", color="black", markersize=9, zorder=5)
    axes.fill_between([], [], [], color=_GREY, alpha=0.3, linewidth=0, label="published")
    axes.plot([], [], "*", color="black", label="published, MLP")
    axes.set_xscale("log")
    _ticks(axes.xaxis, sorted(set(table["depth"]) - {70, 140}))
    axes.set_xlabel(r"depth $L$")
    _angle_axis(axes)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 0.95))
    return figure


def draw_scale(table: pandas.DataFrame) -> Figure:
    """Draw (c)."""
    figure, (axes,) = _figure()
    for n, (depth, rows) in enumerate(table.groupby("depth")):
        axes.plot(
            rows["sqrt_depth_beta"], rows["angle"], color=_COLORS[n], marker=_MARKERS[n], markersize=3.5,
            linewidth=1.2, linestyle=_STYLES[n], label=f"$L = {depth}$",
        )  # fmt: skip
        _band(axes, rows["sqrt_depth_beta"], rows["angle"], rows["angle_std"], _COLORS[n])
    curve = np.geomspace(0.05, 4.5, 200)
    axes.plot(curve, np.arctan(np.sqrt(2 / 3) * curve), color="black", linewidth=0.8, linestyle=":",
              label=r"$\arctan(\sqrt{2/3}\,c)$")  # fmt: skip
    for c in (0.1, 0.5, 1.0, 2.0):
        low, high = _published("c", f"c={c:g},L=100")
        axes.errorbar(
            [c], [(low + high) / 2], [(high - low) / 2 + 1e-3], color="black", capsize=5, linewidth=2, zorder=5,
            label="published" if c == 2.0 else None,
        )  # fmt: skip
    axes.set_xscale("log")
    _ticks(axes.xaxis, (0.05, 0.1, 0.2, 0.5, 1, 2, 4))
    axes.set_xlabel(r"$c = \sqrt{L}\,\beta$")
    _angle_axis(axes)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def draw_decomposition(table: pandas.DataFrame) -> Figure:
    """Draw (d)."""
    laws = ("1/L", "1/sqrt(L)", "1")
    figure, panels = _figure(3, width=3.7, height=3.6, sharey=True)
    parts = (
        ("total", "whole update", "black", "-"),
        ("carried", "carried over from the layer below", _COLORS[1], "--"),
        ("own", "by the layer's own matrix", _COLORS[0], "-"),
        ("aligned", "along $-b$", _COLORS[2], "-."),
        ("orthogonal", "orthogonal to $b$", _COLORS[3], ":"),
    )
    for axes, law in zip(panels, laws, strict=True):
        rows = table[table["branch_scale"] == law]
        for part, label, color, style in parts:
            shown = rows[rows[part] > rows["total"].max() * 1e-5]  # nothing is carried into the first layer
            axes.plot(shown["layer"], shown[part], color=color, linestyle=style, linewidth=1.5, label=label)
        axes.set_yscale("log")
        axes.set_title(_LAWS[law], fontsize=10)
        axes.set_xlabel(r"layer $\ell$")
        axes.set_xlim(1, rows["layer"].max())
    panels[0].set_ylabel(r"rms of the part of $\delta f_\ell$")
    figure.legend(
        *panels[0].get_legend_handles_labels(), fontsize=8.5, frameon=False, loc="outside lower center", ncols=5
    )
    return figure


def draw_sensitivity(table: pandas.DataFrame) -> Figure:
    """Draw (e)."""
    figure, panels = _figure(2, width=4.8, height=3.5, sharey=True)
    names = {"ntk": "NTK (median)", "mup": r"MF + $\mu$P", "fsc": "FSC", **_LAWS}
    for axes, family in zip(panels, ("MLP", "ResNet"), strict=True):
        part = table[table["network"] == family]
        for n, (scaling, rows) in enumerate(part.groupby("scaling", sort=False)):
            value = rows["median"] if scaling == "ntk" else rows["sensitivity"]
            spread = np.abs(np.stack([rows["quartile_low"], rows["quartile_high"]]) - value.to_numpy())
            axes.errorbar(
                rows["depth"], value, spread, color=_COLORS[n], linestyle=_STYLES[n], marker=_MARKERS[n], markersize=4,
                capsize=2, linewidth=1.3, label=names[str(scaling)],
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        _ticks(axes.xaxis, sorted(set(part["depth"]) - {80} if family == "ResNet" else set(part["depth"])))
        axes.set_xlabel(r"depth $L$")
        axes.set_title(family, fontsize=10)
    _ticks(panels[0].yaxis, (0.1, 0.2, 0.5, 1, 2, 5))
    depths = [5, 10, 20, 40]
    panels[0].plot(depths, [_published("e", f"mup,L={d}")[0] for d in depths], "_", color="black", markersize=14,
                   markeredgewidth=2, label="published", zorder=5)  # fmt: skip
    for scheme in ("ntk", "fsc"):
        panels[0].fill_between(depths, *_published("e", f"{scheme},L=5"), color=_GREY, alpha=0.25, linewidth=0)
    panels[0].set_ylabel(r"sensitivity $S$")
    for axes in panels:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 0.95))
    return figure


def draw_tail(table: pandas.DataFrame) -> Figure:
    """Draw (f)."""
    figure, (axes,) = _figure()
    first = table.iloc[0]
    x = table["sqrt_depth_beta"].to_numpy()
    axes.errorbar(
        x, table["cos_angle"], table["cos_angle_std"], color=_COLORS[0], marker="o", markersize=5, linestyle="none",
        capsize=3, label=f"ResNet, $L = {first['depth']:g}$, width {first['width']:g}",
    )  # fmt: skip
    center = np.exp(np.mean(np.log(table["cos_angle"])) - first["exponent"] * np.mean(np.log(x)))
    axes.plot(x, center * x ** first["exponent"], color=_COLORS[3], linewidth=1.3,
              label=rf"fit: $c^{{{first['exponent']:.2f} \pm {first['exponent_interval']:.2f}}}$")  # fmt: skip
    axes.plot(x, 1 / x, color="black", linestyle=":", linewidth=1, label=r"$1/c$")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _ticks(axes.xaxis, [c for c in (2, 3, 4, 5, 6, 8, 10) if c <= x.max() * 1.01])
    _ticks(axes.yaxis, (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5))
    axes.set_xlabel(r"$c = \sqrt{L}\,\beta$")
    axes.set_ylabel(r"output $\cos\,\theta_L$")
    axes.legend(fontsize=8, frameon=False)
    return figure


def draw_mlp_exponent(table: pandas.DataFrame) -> Figure:
    """Draw (g)."""
    figure, (axes,) = _figure()
    first = table.iloc[0]
    layers = table["layer"].to_numpy()
    axes.plot(layers, table["cos_angle"], color=_COLORS[0], linewidth=1.6,
              label=f"MLP, width {first['width']:g}")  # fmt: skip
    _band(axes, layers, table["cos_angle"], table["cos_angle_std"], _COLORS[0])
    fitted = layers >= 10
    x, y = layers[fitted], table["cos_angle"].to_numpy()[fitted]
    exponent = first["exponent"]
    center = np.exp(np.mean(np.log(y)) - exponent * np.mean(np.log(x)))
    axes.plot(x, center * x**exponent, color=_COLORS[3], linewidth=1.3, linestyle="--",
              label=rf"fit: $\ell^{{{exponent:.2f} \pm {first['exponent_interval']:.2f}}}$")  # fmt: skip
    axes.plot(layers, 1.22 * layers**-0.5, color="black", linestyle=":", linewidth=1, label=r"$\sqrt{3/(2\ell)}$")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _ticks(axes.xaxis, (1, 2, 5, 10, 20, 50, 100))
    _ticks(axes.yaxis, (0.1, 0.2, 0.5, 1))
    axes.set_xlabel(r"layer $\ell$")
    axes.set_ylabel(r"$\cos\,\theta_\ell$")
    axes.legend(fontsize=8, frameon=False)
    return figure


def draw_spectral(table: pandas.DataFrame) -> Figure:
    """Draw (h)."""
    figure, (axes,) = _figure()
    x = table["sqrt_depth_beta"].to_numpy()
    axes.plot(x, table["predicted"], color=_COLORS[1], linewidth=1.6, label=r"predicted: $M_1/\sqrt{M_2}$ of $K_L$")
    axes.plot(
        x, table["predicted_wide"], color="black", linestyle=":", linewidth=1, label="predicted for infinite width"
    )
    axes.errorbar(x, table["measured"], table["measured_std"], color=_COLORS[0], marker="o", markersize=4.5,
                  linestyle="none", capsize=3, label="measured")  # fmt: skip
    probed = table["probed_first_seed"].notna()
    axes.errorbar(
        x[probed] * 1.06, table["probed_first_seed"][probed], 2 * table["probed_error"][probed], color=_COLORS[3],
        marker="x", markersize=5, linestyle="none", capsize=2, label="predicted from random probes, one seed",
    )  # fmt: skip
    axes.set_xscale("log")
    _ticks(axes.xaxis, (0.1, 0.2, 0.5, 1, 2, 5, 10))
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(r"$c = \sqrt{L}\,\beta$   (the last one is the MLP)")
    axes.set_ylabel(r"output $\cos\,\theta_L$")
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    return figure


_SCALES = {"1": "residual scale 1", "1/sqrt(2L)": r"residual scale $1/\sqrt{2L}$"}


def draw_transformer(table: pandas.DataFrame) -> Figure:
    """Draw (i)."""
    figure, (left, right) = _figure(2, width=4.3, height=3.5, sharey=True)
    for n, (name, rows) in enumerate(table.groupby("residual_scale", sort=False)):
        ends = rows[rows["block"] == rows["depth"]]
        deepest = rows[rows["depth"] == rows["depth"].max()]
        left.errorbar(ends["depth"], ends["angle"], ends["angle_std"], color=_COLORS[n], marker=_MARKERS[n],
                      markersize=4, capsize=2, linestyle=_STYLES[n], label=_SCALES[str(name)])  # fmt: skip
        right.plot(deepest["block"], deepest["angle"], color=_COLORS[n], linestyle=_STYLES[n], linewidth=1.4)
        _band(right, deepest["block"], deepest["angle"], deepest["angle_std"], _COLORS[n])
    left.set_xscale("log")
    _ticks(left.xaxis, sorted(set(table["depth"])))
    left.set_xlabel(r"depth $L$ (blocks)")
    left.set_title("after the last block", fontsize=10)
    right.set_xlabel("block")
    right.set_title(f"after every block, $L = {table['depth'].max()}$", fontsize=10)
    for axes in (left, right):
        _plain_angles(axes, float(table["angle"].min()) - 0.08)
    right.set_ylabel("")
    left.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def _plain_angles(axes: Any, low: float) -> None:
    axes.set_ylim(math.floor(low * 10) / 10, math.pi / 2 * 1.01)
    axes.yaxis.set_major_locator(MultipleLocator(0.1))
    axes.axhline(math.pi / 2, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_ylabel(_ANGLE)


def draw_training(table: pandas.DataFrame) -> Figure:
    """Draw (j)."""
    figure, panels = _figure(3, width=3.6, height=3.5)
    blocks = int(table["layer"].max()) + 1
    colors = colormaps["viridis"](np.linspace(0.0, 0.9, blocks))
    for n, (axes, (name, rows)) in enumerate(zip(panels, table.groupby("residual_scale", sort=False), strict=False)):
        for layer, line in rows.groupby("layer"):
            number = int(str(layer))
            label = f"block {number + 1}" if number in (0, blocks - 1) else None
            axes.plot(line["step"], line["angle"], color=colors[number], linewidth=1.2, label=label)
        axes.set_title(_SCALES[str(name)], fontsize=10)
        _plain_angles(axes, float(table["angle"].min()) - 0.05)
        axes.set_xlabel("optimizer step")
        loss = rows.drop_duplicates("step")
        panels[2].plot(loss["step"], loss["loss"], color=_COLORS[n], linestyle=_STYLES[n], label=_SCALES[str(name)])
    panels[0].legend(fontsize=8, frameon=False, loc="lower right")
    panels[1].set_ylabel("")
    panels[2].set_title("loss", fontsize=10)
    panels[2].set_ylabel("cross-entropy (nats per byte)")
    panels[2].set_xlabel("optimizer step")
    panels[2].legend(fontsize=8, frameon=False)
    return figure
