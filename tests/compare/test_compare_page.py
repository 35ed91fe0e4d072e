"""``fastfs diff``: exit status, text, JSON, and its page in a real browser."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastfs._cli.app import app
from tests.helpers import report_cases as cases
from tests.helpers.browser import Browser
from tests.helpers.recorded_runs import train

pytest.importorskip("plotly")
pytest.importorskip("scipy")

EVIL = "</script><img src=x onerror=alert(1)>&lt;b"


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    return result.exit_code, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs")
    train(made / "a.jsonl")
    train(made / "twin.jsonl")
    train(made / "changed.jsonl", changed=2)
    train(made / "seed.jsonl", seed=1)
    return made


def test_status_text_and_json(folder: Path, tmp_path: Path) -> None:
    code, output = run("diff", folder / "a.jsonl", folder / "twin.jsonl")
    assert (code, "twin.jsonl against a.jsonl: equal in every number." in output) == (0, True)
    code, output = run("diff", folder / "a.jsonl", folder / "changed.jsonl", "--json", tmp_path / "result.json")
    assert code == 1
    assert "part first at step 0, Parameter update / gradient of blocks.2: x1.1" in output
    assert "Where each quantity parts first" in output
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["parted"], result["partings"][0]["layer"]) == (True, "blocks.2")
    code, output = run("diff", folder / "a.jsonl", "--against", folder / "seed.jsonl")
    assert (code, "nothing parts" in output) == (0, True)
    code, output = run("diff", folder / "a.jsonl", tmp_path / "none.jsonl")
    assert (code, output) == (2, f"fastfs diff: {tmp_path / 'none.jsonl'}: no such file or folder")
    code, output = run("diff", folder / "a.jsonl", folder / "seed.jsonl", "--out", folder)
    assert code == 2
    assert "is a folder, expected a regular file or a new one" in output


def test_standard_output_is_json_alone(folder: Path) -> None:
    result = CliRunner().invoke(app, ["diff", str(folder / "a.jsonl"), str(folder / "changed.jsonl"), "--json", "-"])
    assert json.loads(result.stdout)["layers"] == [f"blocks.{i}" for i in range(5)]


def test_the_report_of_several_runs_is_the_page_of_the_comparison(folder: Path, tmp_path: Path) -> None:
    runs = [folder / f"{name}.jsonl" for name in ("a", "changed", "seed")]
    for name, command, status in (("diff", "diff", 1), ("report", "report", 0)):
        code, output = run(command, *runs, "--out", tmp_path / f"{name}.html", "--json", tmp_path / f"{name}.json")
        assert code == status
        assert f"{name}.html (" in output
    for kind in ("html", "json"):
        assert (tmp_path / f"report.{kind}").read_bytes() == (tmp_path / f"diff.{kind}").read_bytes()
    code, output = run("report", *runs, "--run", "r1")
    assert code == 2
    assert "PATH::ID" in output
    code, output = run("report", runs[0], runs[0], "--out", tmp_path / "same.html")
    assert code == 1
    assert output.startswith("fastfs report: a.jsonl and a.jsonl are the same run")
    assert not (tmp_path / "same.html").exists()


@pytest.mark.filterwarnings("always:.*damaged.jsonl")
def test_damaged_lines_are_said(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text((folder / "changed.jsonl").read_text() + '{"kind": "measured"}\n')
    code, output = run("diff", folder / "a.jsonl", damaged)
    assert code == 1
    assert "damaged.jsonl, line 6: cannot be read and is" in output


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with Browser() as running:
        yield running


def page_of(name: str, folder: Path, out: Path) -> Path:
    if name == "real":
        runs = [folder / f"{one}.jsonl" for one in ("a", "changed", "seed")]
    else:
        shape = (60, 1200) if name == "large" else (3, 8)
        names = [EVIL, "b", "c"] if name == "evil" else None
        runs = []
        for i in range(2):
            lines = cases.run_lines(*shape, every=2, invalid=0.3 * i, names=names)
            runs.append(cases.write(out / f"{i}.jsonl", [{**line, "run": f"r{i}"} for line in lines]))
    code, output = run("diff", *runs, "--out", out / f"{name}.html")
    assert code < 2, output
    return out / f"{name}.html"


@pytest.mark.browser
@pytest.mark.parametrize("name", ["real", "evil", "large"])
def test_the_page_opens_without_errors_or_requests(browser: Any, folder: Path, tmp_path: Path, name: str) -> None:
    page = page_of(name, folder, tmp_path)
    for width, dark in ((1280, False), (400, True)):
        browser.problems.clear()
        browser.requests.clear()
        browser.size(width, 900, dark=dark, mobile=width < 600)
        browser.open(page)
        pictures = os.environ.get("FASTFS_SCREENSHOTS")
        if pictures:
            browser.screenshot(Path(pictures) / f"diff-{name}-{width}.png")
        assert browser.problems == []
        assert {one.split(":")[0] for one in browser.requests} <= {"file", "data", "blob"}
        assert browser.evaluate("document.documentElement.scrollWidth") <= width + 1


@pytest.mark.browser
def test_heat_maps_share_a_scale_and_differences_are_signed(browser: Any, folder: Path, tmp_path: Path) -> None:
    browser.size(1280, 900)
    browser.open(page_of("real", folder, tmp_path))
    assert browser.evaluate("document.querySelectorAll('#runs .plot').length") == 3
    scales = browser.evaluate("[0, 1, 2].map((i) => { const t = $('run' + i).data[0]; return [t.zmin, t.zmax]; })")
    assert scales[0] == scales[1] == scales[2]
    assert scales[0][0] < scales[0][1]
    difference = "$('difference').data[0]"
    assert browser.evaluate("document.querySelector('#quantity').value") == "measured:update_per_gradient"
    assert browser.evaluate(f"10 ** {difference}.z[2][0]") == pytest.approx(1.1, rel=1e-3)  # the changed layer
    assert browser.evaluate(f"{difference}.z[1][0]") == pytest.approx(0, abs=1e-6)
    assert browser.evaluate(f"{difference}.zmin === -{difference}.zmax")
    assert browser.evaluate("$('difference').data.filter((t) => t.name === 'parts here').map((t) => [t.x, t.y])") == [
        [[0], [2]]
    ]
    browser.evaluate("$('quantity').value = 'measured:angle'; $('quantity').dispatchEvent(new Event('change'))")
    assert "Difference of the runs" in browser.evaluate("$('difference-title').textContent")
    browser.evaluate("$('second').value = '2'; $('second').dispatchEvent(new Event('change'))")
    assert browser.evaluate("$('difference-title').textContent").endswith("seed.jsonl against a.jsonl")
    browser.evaluate("$('filter').value = 'blocks.4'; $('filter').dispatchEvent(new Event('input'))")
    browser.wait_for("$('run0').data[0].z.length === 1")
    assert browser.problems == []
