"""Pictures of records of any size, including empty ones."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastfs._record.columns import SCHEMA
from fastfs._record.reading.load import load
from fastfs._record.record import Record
from fastfs._record.sinks.jsonl_sink import JsonlSink
from fastfs._report.plots import PLOTS, plot_layers, plot_record


def write(
    path: Any,
    layers: Any,
    steps: Any,
    angle: Any = lambda step, layer: 1.0 + 0.1 * math.sin(step + layer),
    run: str = "a",
    prefix: str = "blocks.",
) -> Any:
    sink = JsonlSink(path)
    names = [f"{prefix}{layer}" for layer in range(layers)]
    sink.open({"kind": "header", "schema": SCHEMA, "run": run, "layers": names, "groups": {"all": names}})
    for step in steps:
        values = [0.01 * (1 + layer) for layer in [*range(layers), 50]]
        columns = {
            **dict.fromkeys(("cos_angle", "update_rms", "relative_update", "feature_rms", "backward_rms"), values),
            "angle": [*(angle(step, layer) for layer in range(layers)), 1.5],
            "valid": [step % 2 == 0] * (layers + 1),
            "nonfinite": [0] * (layers + 1),
            "count": [10] * (layers + 1),
        }
        scalars = {"loss": None, "micro_batches": 1, "overhead_seconds": 0.1}
        sink.write([Record("measured", step, 0.0, scalars, columns)])
        sink.write([Record("predicted", step + 1, 0.0, {"loss": 1.0}, {"update_rms": values})])
    sink.close()
    return path


def measured(path: Any) -> Any:
    table = load(path)
    return table[(table["kind"] == "measured") & ~table["group"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "steps"), [(1, [0]), (4, range(0, 200, 5)), (26, [0, 1, 7, 100]), (100, range(0, 1000, 20))]
)
def test_every_plot_is_written(tmp_path: Path, layers: int, steps: Any) -> None:
    files = plot_record(write(tmp_path / "record.jsonl", layers, steps), tmp_path / "new", title="run")
    assert [file.name for file in files] == ["angle.png", "speed.png", "relative_update.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000 for file in files)


def test_labels_have_units_and_layers_have_names(tmp_path: Path) -> None:
    table = measured(write(tmp_path / "record.jsonl", 4, range(5)))
    for plot, unit in zip(PLOTS, ("radians", "per step", "per step"), strict=True):
        figure = plot_layers(table, plot, title="a run")
        heat, lines, bar = figure.axes
        assert figure.get_suptitle() == f"{plot.title}: a run"
        assert heat.get_xlabel().startswith("optimizer step")
        assert lines.get_xlabel() == "optimizer step"
        assert unit in lines.get_ylabel()
        assert bar.get_ylabel() == ""  # the label of the lines, next to it, is that of both
        assert heat.get_ylabel() == "layer (blocks.*)"
        assert heat.yaxis_inverted()  # the first layer is on top, as on the page
        assert [tick.get_text() for tick in heat.get_yticklabels()] == ["0", "1", "2", "3"]
        assert len(lines.get_legend().get_texts()) == 4


def test_many_layers_get_a_color_bar_instead_of_names(tmp_path: Path) -> None:
    figure = plot_layers(measured(write(tmp_path / "record.jsonl", 100, range(3))), PLOTS[0])
    heat, lines, *bars = figure.axes
    assert len(bars) == 2
    assert lines.get_legend() is None
    assert heat.get_ylabel() == "layer number (blocks.0 to blocks.99)"
    assert len(heat.get_yticks()) <= 12


def test_layers_without_values_are_gray_and_labelled(tmp_path: Path) -> None:
    path = write(tmp_path / "record.jsonl", 3, range(4), angle=lambda step, layer: math.nan if layer == 1 else 1.0)
    figure = plot_layers(measured(path), PLOTS[0])
    assert "grey: not measured" in figure.axes[0].get_xlabel()
    assert "dots: not valid" in figure.axes[0].get_xlabel()
    drawn = figure.axes[0].collections[0].get_array()
    assert np.ma.getmaskarray(drawn).reshape(3, 4).all(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize("value", [math.nan, 0.0, 1.0])
def test_constant_or_missing_numbers_can_be_drawn(tmp_path: Path, value: Any) -> None:
    path = write(tmp_path / "record.jsonl", 2, range(3), angle=lambda step, layer: value)
    plot_record(path, tmp_path)


def test_the_last_run_is_drawn_unless_told_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "record.jsonl", 2, range(3), run="a")
    write(path, 3, range(3), run="b")
    plot_record(path, tmp_path)
    plot_record(path, tmp_path, run="a")
    with pytest.raises(ValueError, match="no measured step to draw"):
        plot_record(path, tmp_path, run="c")


def test_a_record_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no measured step to draw"):
        plot_record(write(tmp_path / "record.jsonl", 2, []), tmp_path)


def test_without_matplotlib_plots_say_what_to_install() -> None:
    script = "import sys; sys.modules['matplotlib'] = None; import fastfs._report.plots"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert 'fastfs._report.plots needs matplotlib: pip install "fastfs[plot]"' in done.stderr


def test_importing_fastfs_imports_no_optional_packages() -> None:
    script = (
        "import sys, fastfs; fastfs.Monitor, fastfs.feature_stats; import fastfs.models; "
        "names = ('matplotlib', 'pandas', 'pyarrow', 'tensorboard', 'rich', 'typer', 'sklearn', 'scipy'); "
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
