"""The report page in a real browser: it loads without an error and without the network, and its controls work."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastfs._report.page import build_page, write_page
from tests.helpers import report_cases as cases
from tests.helpers.browser import Browser
from tests.report.test_report_page import large_table

pytestmark = pytest.mark.browser

EVIL = "</script><img src=x onerror=alert(1)>&lt;b <a href='http://example.com'>"
PLOTS = ("heat", "lines", "scatter", "speed", "residual", "loss")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One page per kind of record."""
    folder = tmp_path_factory.mktemp("pages")
    lines = {
        "small": cases.run_lines(4, 20, every=2, groups=True, alerts=(6,), invalid=0.2),
        "middle": cases.run_lines(100, 400, every=4, alerts=(17, 100)),
        "ranks": cases.with_ranks(cases.run_lines(8, 60, every=2), 8, missing_from=43, apart=(5, 2, 30)),
        "invalid": cases.run_lines(4, 20, invalid=1.0),
        "predicted": cases.run_lines(4, 20, kinds=("predicted",)),
        "empty": [cases.header(cases.names_of(3))],
        "evil": [*cases.run_lines(2, 6, every=2, names=[EVIL, "b"]), {**cases.alert(2, layer=EVIL), "message": EVIL}],
    }
    found = {}
    for name, records in lines.items():
        record = cases.write(folder / f"{name}.jsonl", records)
        found[name] = write_page(record, folder / f"{name}.html")
    found["large"] = folder / "large.html"
    found["large"].write_text(build_page(large_table()))
    return found


def load(browser: Any, page: Any, width: int = 1280, *, dark: bool = False) -> Any:
    browser.problems.clear()
    browser.requests.clear()
    browser.size(width, 900, dark=dark, mobile=width < 600)
    return browser.open(page)


def assert_clean(browser: Any, page: Any) -> None:
    browser.evaluate("new Promise((done) => setTimeout(done, 100))")  # for pending events
    assert browser.problems == []
    outside = [url for url in browser.requests if not url.startswith(("data:", "blob:"))]
    assert outside == [page.resolve().as_uri()]


def choose(browser: Any, control: Any, value: Any) -> None:
    browser.evaluate(
        f"(() => {{ const c = document.getElementById('{control}'); c.value = '{value}';"
        " for (const name of ['input', 'change']) c.dispatchEvent(new Event(name, {bubbles: true})); })()"
    )


def heat(browser: Any, what: Any) -> Any:
    return browser.evaluate(f"(() => {{ const plot = document.getElementById('heat'); return {what}; }})()")


@pytest.mark.parametrize("name", ["small", "middle", "ranks", "invalid", "predicted", "empty", "evil", "large"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_pages_load(browser: Any, pages: Any, name: str, width: int, dark: bool) -> None:
    seconds = load(browser, pages[name], width, dark=dark)
    assert_clean(browser, pages[name])
    assert browser.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert seconds < 30
    drawn = browser.evaluate("['heat', 'lines', 'loss'].filter((id) => document.getElementById(id).data).length")
    assert drawn == (0 if name == "empty" else 3)
    assert browser.evaluate("document.getElementById('nothing').hidden") is (name != "empty")
    if folder := os.environ.get("FASTFS_SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"{name}-{width}-{'dark' if dark else 'light'}.png")


@pytest.mark.parametrize("name", ["small", "middle", "large"])
@pytest.mark.parametrize("width", [1280, 390])
def test_labels_of_layers_do_not_overlap(browser: Any, pages: Any, name: str, width: int) -> None:
    load(browser, pages[name], width)
    boxes = browser.evaluate(
        "[...document.querySelectorAll('#heat .ytick text')].map((t) => t.getBoundingClientRect())"
        ".map((r) => [r.top, r.bottom, r.left]).sort((a, b) => a[0] - b[0])"
    )
    assert len(boxes) >= 4
    assert all(below[0] >= above[1] - 2 for above, below in itertools.pairwise(boxes))
    assert all(left >= 0 for _, _, left in boxes)


@pytest.mark.parametrize("name", ["small", "large"])
def test_controls_work(browser: Any, pages: Any, name: str) -> None:
    load(browser, pages[name])
    layers = 4 if name == "small" else 100
    before = heat(browser, "[plot.data[0].z.length, plot.data[0].z[0][1], plot.data[0].colorbar.title.text]")
    assert before[0] == layers
    assert before[2] == "rad"

    choose(browser, "quantity", "measured:relative_update")
    assert "Relative update" in browser.evaluate("document.getElementById('heat-title').textContent")
    after = heat(browser, "[plot.data[0].z.length, plot.data[0].z[0][1], plot.data[0].colorbar.title.text]")
    assert after[0] == layers
    assert after[1:] != before[1:]
    assert browser.evaluate("document.getElementById('scale').value") == "log"
    assert browser.evaluate("document.getElementById('lines').layout.yaxis.type") == "log"
    choose(browser, "scale", "linear")
    assert heat(browser, "plot.data[0].z[0][1]") == pytest.approx(10 ** after[1], rel=1e-4)
    assert browser.evaluate("document.getElementById('lines')._fullLayout.yaxis.type") == "linear"

    choose(browser, "filter", "blocks.3")
    wanted = 1 if name == "small" else 11
    browser.wait_for(f"document.getElementById('heat').data[0].z.length === {wanted}")
    assert browser.evaluate("document.querySelectorAll('#picks button').length") == wanted
    choose(browser, "filter", "1-2")
    browser.wait_for("document.getElementById('heat').data[0].z.length === 2")
    choose(browser, "filter", "nothing is called this")
    browser.wait_for("document.getElementById('heat').data[0].z.length === 0")
    assert "No layer matches" in browser.evaluate("document.getElementById('heat-legend').textContent")
    choose(browser, "filter", "")
    browser.wait_for(f"document.getElementById('heat').data[0].z.length === {layers}")

    drawn = "(t) => (t.mode || '').startsWith('lines') && t.hovertemplate"
    lines = f"document.getElementById('lines').data.filter({drawn}).length"
    browser.evaluate("document.getElementById('pick-none').click()")
    assert browser.evaluate(lines) == 0
    browser.evaluate("document.querySelectorAll('#picks button')[1].click()")
    assert browser.evaluate(lines) == 1
    assert browser.evaluate("document.querySelector('#picks button[aria-pressed=true]').textContent") == "blocks.1"

    choose(browser, "from", "4")
    choose(browser, "to", "9")
    for plot in ("heat", "lines", "loss"):
        low, high = browser.evaluate(f"document.getElementById('{plot}')._fullLayout.xaxis.range")
        assert 3 <= low <= 4 <= 9 <= high <= 10
    browser.evaluate("document.getElementById('reset').click()")
    assert heat(browser, "plot._fullLayout.xaxis.range[0]") <= 0
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate("document.documentElement.dataset.theme") == "dark"
    assert_clean(browser, pages[name])


@pytest.mark.parametrize("name", ["small", "predicted"])
def test_no_button_sends_anything_anywhere(browser: Any, pages: Any, name: str) -> None:
    load(browser, pages[name])
    titles = browser.evaluate(
        "[...new Set([...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title))]"
    )
    assert sorted(titles) == ["Download plot as a PNG", "Pan", "Reset axes", "Zoom", "Zoom in", "Zoom out"]
    outside = "document.querySelectorAll('a[href]:not([href^=\"#guide-\"]), form, iframe').length"
    assert browser.evaluate(outside) == 0
    assert browser.evaluate("Plotly.toImage('heat', {format: 'png'}).then((url) => url.length)") > 1000
    # The content security policy forbids requests, whatever causes them.
    refused = "fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')"
    assert browser.evaluate(refused) == "refused"
    assert any("Content Security Policy" in problem for problem in browser.problems)


def test_zooming_one_plot_moves_the_others(browser: Any, pages: Any) -> None:
    load(browser, pages["small"])
    browser.evaluate("Plotly.relayout('loss', {'xaxis.range[0]': 5, 'xaxis.range[1]': 10}).then(() => true)")
    browser.wait_for("document.getElementById('from').value === '5'")
    low, high = heat(browser, "plot._fullLayout.xaxis.range")
    assert low == pytest.approx(5, abs=0.6)
    assert high == pytest.approx(10, abs=0.6)
    assert_clean(browser, pages["small"])


def hover(browser: Any, row: Any, column: Any) -> Any:
    """Moves the mouse to a cell. Returns the text of the tooltip."""
    browser.move(5, 5)
    browser.evaluate("document.getElementById('heat').scrollIntoView({block: 'center'})")
    x, y = heat(
        browser,
        "(() => { const box = plot.querySelector('.nsewdrag').getBoundingClientRect(), l = plot._fullLayout;"
        f" return [box.left + l.xaxis.c2p(plot.data[0].x[{column}]), box.top + l.yaxis.c2p({row})]; }})()",
    )
    browser.move(x - 1, y)
    browser.move(x, y)
    browser.wait_for("!document.getElementById('tip').hidden", timeout=10)
    return browser.evaluate("document.getElementById('tip').textContent")


def test_the_tooltip_shows_values_validity_and_reasons(browser: Any, pages: Any) -> None:
    load(browser, pages["small"])
    width = heat(browser, "plot.data[0].x.length")
    flags = browser.evaluate("[...data.measured.invalid]")
    good, bad = flags.index(0), flags.index(1)
    text = hover(browser, good // width, good % width)
    assert f"blocks.{good // width}" in text
    assert "rad (" in text
    assert "noise floor: 2e-5" in text
    assert "standard error" in text
    assert "NOT VALID" not in text
    text = hover(browser, bad // width, bad % width)
    assert "NOT VALID: update below 5x the noise floor" in text
    grey = heat(browser, "plot.data.find((t) => t.name === 'not valid').z.flat().filter((v) => v === 1).length")
    assert grey == sum(flags[: 4 * width])
    assert heat(browser, f"plot.data[0].z[{bad // width}][{bad % width}]") is None
    browser.evaluate("document.getElementById('show-invalid').click()")
    assert heat(browser, f"plot.data[0].z[{bad // width}][{bad % width}]") > 0
    assert heat(browser, "plot.data.some((t) => t.name === 'not valid')") is False


def test_the_tooltip_of_a_thinned_page_says_what_a_cell_represents(browser: Any, pages: Any) -> None:
    load(browser, pages["large"])
    assert "recorded steps" in hover(browser, 50, 100)
    assert "of 10,000 measured steps are drawn" in browser.evaluate("document.getElementById('thinned').textContent")


def test_a_click_on_the_heat_map_picks_the_layer(browser: Any, pages: Any) -> None:
    load(browser, pages["small"])
    browser.evaluate("document.getElementById('pick-none').click()")
    hover(browser, 2, 3)
    x, y = heat(
        browser,
        "(() => { const box = plot.querySelector('.nsewdrag').getBoundingClientRect(), l = plot._fullLayout;"
        " return [box.left + l.xaxis.c2p(plot.data[0].x[3]), box.top + l.yaxis.c2p(2)]; })()",
    )
    browser.click(x, y)
    browser.wait_for("document.querySelector('#picks button[aria-pressed=true]')?.textContent === 'blocks.2'", 10)


def test_groups_can_be_shown(browser: Any, pages: Any) -> None:
    load(browser, pages["small"])
    choose(browser, "kind", "groups")
    assert heat(browser, "plot.layout.yaxis.ticktext") == ["first half", "second half"]
    load(browser, pages["middle"])
    assert browser.evaluate("document.getElementById('kind-box').hidden") is True


def test_alerts_are_listed_and_marked(browser: Any, pages: Any) -> None:
    load(browser, pages["small"])
    assert browser.evaluate("document.getElementById('alarm').textContent") == (
        "Alerts: angle_collapse (1). Details are in the table below."
    )
    assert "at step 6" in browser.evaluate("document.querySelector('#alerts tbody tr').textContent")
    assert heat(browser, "plot.data.find((t) => t.name === 'alerts').x") == [6]


@pytest.mark.slow
def test_names_are_plain_text(browser: Any, pages: Any) -> None:
    load(browser, pages["evil"])
    assert browser.evaluate("document.querySelector('#picks button').textContent") == EVIL
    assert browser.evaluate("document.querySelector('#structure tbody td:nth-child(2)').textContent") == EVIL
    assert browser.evaluate("document.querySelectorAll('img, a[href*=example], b:not(.card b, #guide b)').length") == 0
    shown = browser.evaluate("document.querySelector('#heat .ytick text').textContent")
    assert shown.startswith("</")
    assert_clean(browser, pages["evil"])


@pytest.mark.parametrize(("name", "expected"), [("small", range(4)), ("ranks", range(8)), ("middle", range(0, 100, 9))])
def test_as_many_layers_are_picked_as_the_lines_can_tell_apart(
    browser: Any, pages: Any, name: str, expected: range
) -> None:
    load(browser, pages[name])
    picked = browser.evaluate(
        "[...document.querySelectorAll('#picks button[aria-pressed=true]')].map((b) => b.textContent)"
    )
    assert picked == [f"blocks.{i}" for i in expected]
    looks = browser.evaluate(
        "document.getElementById('lines').data.filter((t) => (t.mode || '').startsWith('lines') && t.hovertemplate)"
        ".map((t) => [t.name, t.line.color, t.line.dash])"
    )
    assert [look[0] for look in looks] == picked
    assert len({(color, dash) for _, color, dash in looks}) == len(picked)


@pytest.fixture(scope="module")
def spiky(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A page with residuals of 40 and -3, and angles of blocks.1 that say nothing about the next ones."""
    lines = cases.run_lines(4, 80, every=2, invalid=0.0)
    for line in lines:
        if line["kind"] == "measured":
            line["layers"]["cos_angle"][1] = 0.9 if line["step"] % 4 else 0.1
    rows = {line["step"]: line["layers"] for line in lines if line["kind"] == "measured"}
    rows[40]["residual"][2], rows[60]["residual"][0] = 40.0, -3.0
    folder = tmp_path_factory.mktemp("spiky")
    return write_page(cases.write(folder / "r.jsonl", lines), folder / "r.html")


def test_the_residual_shows_its_main_event(browser: Any, spiky: Any) -> None:
    load(browser, spiky)
    axis, points = browser.evaluate(
        "(() => { const p = document.getElementById('residual'); return [p._fullLayout.yaxis.range,"
        " p.data.filter((t) => t.customdata).flatMap((t) => t.customdata.map((v, i) => [v, t.y[i]]))]; })()"
    )
    drawn = {value: place for value, place in points if value is not None}
    assert {40.0, -3.0} <= set(drawn)
    assert axis[0] < drawn[-3.0] < 0 < drawn[40.0] < axis[1]
    small = [place for value, place in drawn.items() if abs(value) < 0.1]
    assert max(small) - min(small) > (axis[1] - axis[0]) / 40  # not flattened by the spike
    assert [drawn[value] for value in sorted(drawn)] == sorted(drawn.values())
    ticks = browser.evaluate("document.getElementById('residual').layout.yaxis.ticktext")
    assert "0" in ticks
    assert len(set(ticks)) == len(ticks)
    words = browser.evaluate("document.getElementById('residual-legend').textContent")
    assert "Largest of the shown layers: 40, in blocks.2 at step 40." in words
    assert "beyond them, the axis is logarithmic" in words
    assert_clean(browser, spiky)
    if folder := os.environ.get("FASTFS_SCREENSHOTS"):
        browser.screenshot(Path(folder) / "spiky.png")


def test_a_small_residual_has_an_ordinary_axis(browser: Any, pages: Any) -> None:
    load(browser, pages["middle"])
    same = "document.getElementById('residual').data.every((t) => t.y.every((v, i) => v === t.customdata[i]))"
    assert browser.evaluate(same) is True
    assert "logarithmic" not in browser.evaluate("document.getElementById('residual-legend').textContent")


def test_predictions_have_a_band_or_are_withheld(browser: Any, spiky: Any) -> None:
    load(browser, spiky)
    note = browser.evaluate("document.getElementById('formula-note').textContent")
    assert "of the measured speeds are within a factor" in note
    assert "predictions are withheld: their factor is above 3, or not known" in note
    lines = browser.evaluate(
        "document.getElementById('speed').data.map((t) => [t.name, t.y.filter((v) => v !== null).length])"
    )
    counts = dict(line for line in lines if line[0].endswith("predicted"))
    assert counts["blocks.1, predicted"] == counts["blocks.3, predicted"] == 0  # withheld; not a cut
    assert counts["blocks.0, predicted"] == counts["blocks.2, predicted"] > 30
    bands = [count for name, count in lines if name == "band"]
    assert bands == [2 * counts["blocks.0, predicted"]] * 2
    choose(browser, "quantity", "predicted:update_rms")
    legend = browser.evaluate("document.getElementById('heat-legend').textContent")
    withheld = browser.evaluate("[...data.predicted.withheld]")
    assert f"predictions withheld ({sum(withheld)})" in legend
    row, width = 1, len(withheld) // 4
    assert heat(browser, f"plot.data[0].z[{row}].every((v) => v === null)") is True
    text = hover(browser, 0, width - 1)
    low, high = re.search(r"80 %: within (\S+) to (\S+)", text).groups()
    value = float(re.search(r"predicted: (\S+)", text)[1])
    factor = browser.evaluate(f"data.predicted.columns.factor[{width - 1}]")
    assert float(low) == pytest.approx(value / factor, rel=0.01)
    assert float(high) == pytest.approx(value * factor, rel=0.01)
    choose(browser, "quantity", "predicted:factor")
    assert heat(browser, f"plot.data[0].z[1][{width - 1}]") == pytest.approx(math.log10(9), abs=0.1)
    assert_clean(browser, spiky)


def test_the_first_layer_is_on_top(browser: Any, pages: Any) -> None:
    load(browser, pages["small"])
    tops = browser.evaluate(
        "[...document.querySelectorAll('#heat .ytick text')].map((t) => [t.textContent, t.getBoundingClientRect().top])"
    )
    assert [name for name, _ in sorted(tops, key=lambda one: one[1])] == ["0", "1", "2", "3"]


def test_quantities_alerts_and_signs_lead_to_their_paragraph(browser: Any, pages: Any, tmp_path: Path) -> None:
    lines = cases.run_lines(6, 40, every=2)
    for line in lines:
        if line["kind"] == "measured":
            line["layers"]["feature_rms"] = [3.0**i for i in range(6)]
    alerts = [{**cases.alert(4, layer=None), "rule": rule} for rule in ("large update 2", "a rule of mine")]
    record = cases.write(tmp_path / "record.jsonl", [*lines, *alerts])
    load(browser, write_page(record, tmp_path / "page.html"))
    links = browser.evaluate("[...document.querySelectorAll('a')].map((a) => [a.textContent, a.getAttribute('href')])")
    speed, size = "#guide-speed-and-relative-update", "#guide-feature-size"
    assert links.count(["large update 2", speed]) == 2  # above the page, and in the table
    assert ["What to do", size] in links
    assert ["What do I do with this number?", "#guide-angle"] in links
    assert "a rule of mine" not in [text for text, _ in links]
    choose(browser, "quantity", "measured:relative_update")
    assert browser.evaluate("document.querySelector('#heat-about a').getAttribute('href')") == speed
    targets = {href for _, href in links}
    assert browser.evaluate(f"{sorted(targets)}.every((id) => document.querySelector(id))")
    assert not browser.evaluate("document.getElementById('guide').open")
    browser.evaluate("document.querySelector('#signs a').click()")
    browser.wait_for(f"document.querySelector('{size}').getBoundingClientRect().top < window.innerHeight")
    assert browser.evaluate("document.getElementById('guide').open")
    assert "1/sqrt(depth)" in browser.evaluate(f"document.querySelector('{size}').textContent")
    assert browser.evaluate(f"document.querySelector('{size} b').textContent") == "Healthy:"
    if folder := os.environ.get("FASTFS_SCREENSHOTS"):
        browser.screenshot(Path(folder) / "guide.png")
    assert browser.problems == []
