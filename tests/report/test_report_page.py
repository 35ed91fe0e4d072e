"""The report page without a browser: thinning, escaping, size."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from fastfs._record.reading.load import load
from fastfs._report import summary
from fastfs._report.grids import Grid, Predictions, make_grid, thin, thin_series
from fastfs._report.page import build_page, page_data, write_page
from fastfs._report.quantities import QUANTITIES
from tests.helpers import report_cases as cases

MOST_BYTES = 15_000_000


def data_of(page: Any) -> Any:
    """The data as a browser reads it: the text of the element up to the first end of a script."""
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script', page, re.S)[1])


def column(part: Any, name: str, dtype: str = "<f4") -> Any:
    text = part["columns"][name] if name in part["columns"] else part[name]
    return np.frombuffer(base64.b64decode(text), dtype).reshape(-1, len(part["steps"]))


def grid_of(steps: int, invalid: Any) -> Any:
    empty = np.full(len(steps), np.nan)
    return Grid(np.array(steps), empty, empty, empty, {}, invalid, np.zeros(invalid.shape, np.uint8), [])


def large_table(layers: int = 100, steps: int = 10_000, every: int = 1, seed: int = 0) -> Any:
    """A table of a large run as `load` returns it; 2 % of the cells are not valid."""
    random = np.random.default_rng(seed)
    size = layers * len(range(0, steps, every))
    columns = {q.key: random.random(size).astype(np.float32) for q in QUANTITIES}
    valid = random.random(size) >= 0.02
    table = pandas.DataFrame(
        {
            "kind": "measured",
            "run": "r1",
            "step": np.repeat(np.arange(0, steps, every), layers),
            "time": np.repeat(np.arange(0.0, steps, every), layers) + cases.START,
            "layer": np.tile(np.arange(layers), size // layers),
            "valid": valid,
            "why": np.where(valid, None, "rounding"),
            "loss": 1.0,
            "overhead_seconds": 0.01,
            **columns,
        }
    )
    table.attrs = {
        "headers": [cases.header(cases.names_of(layers))],
        "alerts": [cases.alert(step) for step in (777, 4321)],
        "structure": [cases.structure(cases.names_of(layers))],
        "skipped": [],
    }
    return table


def test_a_small_run_is_drawn_whole(tmp_path: Path) -> None:
    path = cases.write(tmp_path / "record.jsonl", cases.run_lines(4, 20, every=2, groups=True))
    page = write_page(path, tmp_path / "new" / "report.html").read_text()
    data = data_of(page)
    table = load(path)
    assert data["measured"]["steps"] == list(range(0, 20, 2))
    assert data["predicted"]["steps"] == list(range(1, 20, 2))
    assert data["thinned"] == []
    assert [row["name"] for row in data["rows"]] == [*cases.names_of(4), "first half", "second half"]
    assert [row["group"] for row in data["rows"]] == [False] * 4 + [True] * 2
    assert data["rows"][3]["cut"] is False
    assert "residual block" in data["rows"][3]["reason"]
    for name in ("angle", "update_rms", "angle_se", "residual", "aligned_decrease"):
        expected = table[table["kind"] == "measured"].pivot_table(index="layer", columns="step", values=name)
        assert column(data["measured"], name) == pytest.approx(expected.to_numpy(), rel=1e-6)
    assert ["metadata: git", "abc123"] in data["facts"]
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.html"]


def test_every_quantity_says_what_it_is() -> None:
    for quantity in QUANTITIES:
        assert quantity.unit
        assert quantity.about.endswith(".")
    assert len({quantity.key for quantity in QUANTITIES}) == len(QUANTITIES)


@pytest.mark.parametrize("most", [1, 7, 20, 99, 100, 101])
def test_thinning_keeps_alerts_and_says_how_many_cells_were_not_valid(most: int) -> None:
    invalid = np.zeros((3, 100), dtype=bool)
    invalid[1, [13, 14, 57]] = True
    invalid[:, 88] = True
    steps = list(range(0, 1000, 10))
    kept = thin(grid_of(steps, invalid), most, [424])
    assert len(kept.index) == min(most, 100)
    assert kept.merged.sum() == 100
    assert kept.invalid.sum(axis=1).tolist() == [1, 4, 1]
    shown = np.array(steps)[kept.index]
    assert 420 in shown  # the last measured step before the alert at 424
    if most >= 20:
        assert 880 in shown
        assert 570 in shown
    assert (np.diff(kept.index) > 0).all()


def test_thinning_of_nothing() -> None:
    kept = thin(grid_of([], np.zeros((3, 0), dtype=bool)), 10, [5])
    assert len(kept.index) == 0
    assert kept.invalid.shape == (3, 0)


def test_a_line_keeps_its_spikes() -> None:
    values = np.ones(10_000)
    values[[1234, 9999]] = 100.0
    values[5000] = -7.0
    values[77] = np.nan
    steps, kept = thin_series(np.arange(10_000), values, 200)
    assert len(steps) <= 202
    assert {1234, 5000, 9999, 0} <= set(steps.tolist())
    assert (values[steps] == kept).all()


def test_predictions_are_shown_with_their_factor_or_withheld(tmp_path: Path) -> None:
    lines = cases.run_lines(4, 81, every=2)
    for line in lines:
        if line["kind"] == "measured":  # the angle of blocks.1 says nothing about the next one
            cosine = 0.9 if line["step"] % 4 else 0.1
            line["layers"]["cos_angle"][1] = cosine
    table = load(cases.write(tmp_path / "record.jsonl", lines))
    data = page_data(table)
    predicted = data["predicted"]
    recorded = table[table["kind"] == "predicted"].pivot_table(index="layer", columns="step", values="update_rms")
    speed, factor = column(predicted, "update_rms"), column(predicted, "factor")
    withheld = column(predicted, "withheld", "u1").astype(bool)
    assert not np.isfinite(speed[withheld]).any()
    assert withheld[1].all()  # the factor is 9
    assert not np.isfinite(speed[3]).any()  # nothing was predicted: not a cut
    assert not withheld[3].any()
    assert withheld[0, :4].all()  # fewer than 4 comparisons
    assert not withheld[0, 6:].any()
    assert factor[1, -1] == pytest.approx(9, rel=0.2)
    assert speed[[0, 2], 6:] == pytest.approx(recorded.loc[[0, 2]].to_numpy()[:, 6:])
    assert (factor[[0, 2], 6:] < 3).all()
    said = " ".join(data["findings"])
    assert f"Predicted speeds: {3 * 40}; {int(withheld.sum())} are withheld" in said
    compared = np.isfinite(column(data["measured"], "predicted")).sum()
    assert f"80 % of {compared} measured speeds are within a factor" in said
    # What the formula would have predicted at measured steps, beside what was measured there.
    there = column(data["measured"], "predicted")
    rows = {line["step"]: line["layers"] for line in lines if line["kind"] == "measured"}
    for step in (20, 42):
        now, before = rows[step], rows[step - 2]
        if now["valid"][2] and before["valid"][2] and before["linear"][2]:
            ratio = before["cos_angle"][2] / ((1 - now["residual"][2]) * now["cos_angle"][2])
            assert there[2, step // 2] == pytest.approx(now["update_rms"][2] / ratio, rel=1e-3)


def test_nothing_tells_how_good_predictions_without_measurements_are(tmp_path: Path) -> None:
    data = page_data(load(cases.write(tmp_path / "r.jsonl", cases.run_lines(4, 20, kinds=("predicted",)))))
    given = column(data["predicted"], "withheld", "u1")
    assert given.tolist() == [[1] * 20] * 3 + [[0] * 20]
    assert np.isnan(column(data["predicted"], "update_rms")).all()
    assert "they are withheld" in data["findings"][0]


def test_the_largest_residual_is_named(tmp_path: Path) -> None:
    lines = cases.run_lines(4, 20, invalid=0.0)
    lines[9]["layers"]["residual"][2] = -7.25
    step = lines[9]["step"]
    data = page_data(load(cases.write(tmp_path / "r.jsonl", lines)))
    assert any(f"the largest is -7.25, in blocks.2 at step {step}." in text for text in data["findings"])


@pytest.mark.parametrize("ratio", [None, {"measured_step": 1.5, "other_step": 1.02, "at_this_every": 1.1}, 3])
def test_the_page_says_what_the_monitor_cost_only_if_it_was_measured(tmp_path: Path, ratio: Any) -> None:
    lines = cases.run_lines(2, 6, every=2)
    lines[0]["metadata"][summary.STEP_TIME_RATIO] = ratio
    path = cases.write(tmp_path / "r.jsonl", lines)
    cards = {card["label"]: card for card in page_data(load(path))["cards"]}
    assert "Overhead" not in cards
    assert cards["In the monitor"] == {
        "label": "In the monitor",
        "value": "0.063 s",
        "note": "host time: 20 ms per measured step, 1 ms per predicted step",
    }
    assert "Step time ratio" not in cards
    lines[0]["metadata"][summary.STEP_TIME_RATIO] = {**(ratio if isinstance(ratio, dict) else {}), "at_every_100": 1.03}
    if isinstance(ratio, dict):
        card = {c["label"]: c for c in page_data(load(cases.write(path, lines)))["cards"]}["Step time ratio"]
        assert card["value"] == "1.50"
        assert card["note"] == "of a measured step; 1.02 of others, 1.10 on average here, 1.03 at every=100"


def test_a_step_that_was_repeated_after_a_resume_counts_once(tmp_path: Path) -> None:
    names = cases.names_of(2)
    lines = [cases.header(names), *(cases.measured(names, step) for step in range(6))]
    lines += [cases.header(names, resumed_at=4), *(cases.measured(names, step, seed=3) for step in range(4, 8))]
    data = page_data(load(cases.write(tmp_path / "record.jsonl", lines)))
    assert data["measured"]["steps"] == list(range(8))
    assert data["resumed"] == [4]
    expected = [cases.measured(names, step, seed=3 if step >= 4 else 0)["layers"]["angle"][0] for step in range(8)]
    assert column(data["measured"], "angle")[0] == pytest.approx(expected, rel=1e-5)


def test_no_text_of_the_record_can_end_its_element(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- <b>@@plotly.js@@ &amp; \u2028 \\u003c"
    lines = cases.run_lines(2, 3, names=[evil, "b"])
    lines[0]["metadata"] = {evil: [evil]}
    lines[0]["model"] = evil
    lines.append({**cases.alert(2, layer=evil), "message": evil, "rule": evil})
    page = build_page(load(cases.write(tmp_path / "record.jsonl", lines)), source=evil)
    assert page.count("alert(1)</script>") == 0
    assert page.count("<!-- <b>") == 0
    data = data_of(page)
    assert data["rows"][0]["name"] == evil
    assert data["alerts"][0]["message"] == evil
    assert data["alerts"][0]["row"] == 0
    assert [f"metadata: {evil}", json.dumps([evil])] in data["facts"]
    title = re.search(r"<title>(.*?)</title>", page, re.S)[1]
    assert "<" not in title
    # Apart from its text, plotly.js and the data there is nothing that a browser would fetch.
    outside = page.replace(re.search(r"<script>/\*\*\n\* plotly.*?</script>", page, re.S)[0], "")
    targets = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)""", outside.split('<script id="data"')[0])
    assert targets == ["data:,"]


@pytest.mark.parametrize(
    "lines",
    [
        [cases.header(cases.names_of(3))],
        [cases.header([])],
        [cases.header(cases.names_of(3)), cases.structure(cases.names_of(3)), cases.alert(0, layer=None)],
        [cases.header(cases.names_of(3)), {"kind": "skipped", "run": "r1", "step": 1, "time": 0.0, "reason": "inf"}],
    ],
)
def test_a_record_without_rows_is_a_page(tmp_path: Path, lines: list[Any]) -> None:
    data = page_data(load(cases.write(tmp_path / "record.jsonl", lines)))
    assert data["measured"]["steps"] == data["predicted"]["steps"] == []
    assert data["cards"][0]["value"] == "none"
    assert data["findings"] == []
    json.dumps(data, allow_nan=False)


def test_only_predictions(tmp_path: Path) -> None:
    path = cases.write(tmp_path / "record.jsonl", cases.run_lines(4, 10, kinds=("predicted",)))
    data = page_data(load(path))
    assert data["measured"]["total"] == 0
    assert {q["key"] for q in data["predicted"]["quantities"]} >= {"aligned_decrease", "update_rms"}
    assert "No step was measured" in data["findings"][0]


def test_the_page_says_that_no_angle_is_valid(tmp_path: Path) -> None:
    data = page_data(load(cases.write(tmp_path / "record.jsonl", cases.run_lines(4, 10, invalid=1.0))))
    assert any("No angle of this run is valid" in text and "noise floor" in text for text in data["findings"])
    assert next(card for card in data["cards"] if card["label"] == "Angles valid")["value"] == "0 %"
    assert column(data["measured"], "invalid", "u1").all()


def test_numbers_that_are_missing_or_not_finite(tmp_path: Path) -> None:
    names = cases.names_of(2)
    row = cases.measured(names, 0)
    row["layers"] = {**row["layers"], "angle": [None, 1.0], "update_rms": [1e300, None], "new_column": [1.0, None]}
    row["loss"] = None
    data = page_data(load(cases.write(tmp_path / "record.jsonl", [cases.header(names), row])))
    assert np.isnan(column(data["measured"], "angle")[0, 0])
    assert np.isnan(column(data["measured"], "update_rms")).all()  # overflows float32
    assert data["loss"]["steps"] == []
    assert "new_column" in {q["key"] for q in data["measured"]["quantities"]}


def test_runs_are_chosen_by_id(tmp_path: Path) -> None:
    lines = cases.run_lines(2, 3)
    other = [{**line, "run": "other"} for line in cases.run_lines(3, 5)]
    table = load(cases.write(tmp_path / "record.jsonl", lines + other))
    assert len(page_data(table)["rows"]) == 3
    data = page_data(table, run="r1")
    assert len(data["rows"]) == 2
    assert ["other runs in this record", "other"] in data["facts"]
    with pytest.raises(ValueError, match="no run 'nope' in the record; it has: r1, other"):
        page_data(table, run="nope")


def test_a_large_run_stays_small() -> None:
    data = page_data(large_table())
    page = build_page(large_table())
    assert len(page.encode()) < MOST_BYTES
    part = data["measured"]
    assert 200 <= len(part["steps"]) <= 800
    assert part["total"] == sum(part["merged"]) == 10_000
    assert {777, 4321} <= set(part["steps"])
    merged = column(part, "invalid_merged", "<u2")
    assert merged.sum() == (~large_table()["valid"]).sum()
    assert any("of 10,000 measured steps are drawn" in text for text in data["thinned"])
    # A column is a single step as it was recorded.
    table = large_table()
    step = part["steps"][3]
    expected = table.loc[table["step"] == step, "angle"].to_numpy()
    assert column(part, "angle")[:, 3] == pytest.approx(expected)


def test_very_many_layers_and_alerts_stay_small() -> None:
    table = large_table(layers=3000, steps=60)
    table.attrs["alerts"] = [{**cases.alert(step % 60), "message": "long " * 2000} for step in range(5000)]
    page = build_page(table)
    assert len(page.encode()) < MOST_BYTES
    data = data_of(page)
    assert len(data["alerts"]) == 1000
    assert data["alert_rules"] == [["angle_collapse", 5000]]
    assert any("of 5,000" in text for text in data["thinned"])


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        ([1.0, 1.002, 0.998], "Gradient scale 1.000 (90 % between 0.9982 and 1.002): as declared."),
        ([2.0, 2.01, np.nan], "Gradient scale 2.005 (90 % between 2.001 and 2.009): gradients are 2 times as large as"),
        ([0.3, 0.7, 0.5], "it varies, by clipping or by steps that are too large for first order."),
    ],
)
def test_the_scale_of_gradients_is_said_in_words(scales: Any, said: str) -> None:
    grid = replace(grid_of([0, 1, 2], np.zeros((1, 3), dtype=bool)), scale=np.array(scales))
    nothing = Predictions(np.full((1, 3), np.nan), np.zeros((1, 0), bool), np.zeros((1, 0)))
    assert said in " ".join(summary.findings(["a"], 1, grid, nothing))
    empty = replace(grid, scale=None)
    assert "Gradient scale" not in " ".join(summary.findings(["a"], 1, empty, nothing))


def test_durations_and_numbers_are_readable() -> None:
    seconds = (0.5, 9.99, 10, 61, 3600, 90_061, math.nan)
    expected = ["0.5 s", "10 s", "10 s", "1 min 1 s", "1 h", "1 d 1 h", "-"]
    assert [summary.since(s) for s in seconds] == expected
    values = (0.0, 12.3456, 9999, 1e-7, 2e9, None)
    assert [summary.number(v) for v in values] == ["0", "12.3", "9,999", "1e-07", "2e+09", "-"]


def test_reasons_beyond_a_byte_are_not_mixed_up() -> None:
    table = pandas.DataFrame({"step": range(400), "layer": 0, "valid": False, "why": [f"why {i}" for i in range(400)]})
    grid = make_grid(table, 1, [])
    assert grid.reasons[grid.why[0, 253]] == "why 253"
    assert grid.reasons[grid.why[0, 254]] == "no reason given"


def test_without_plotly_it_says_what_to_install() -> None:
    script = "import sys; sys.modules['plotly'] = None; import fastfs._report.page"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert 'pip install "fastfs[report]"' in done.stderr
