"""``fastfs reproduce``: files, invalid arguments, and exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from typer.testing import CliRunner

from fastfs._cli.app import app
from fastfs._reproduce.paper import run as command
from fastfs._reproduce.paper.published import Published
from fastfs._reproduce.paper.studies import STUDIES


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["reproduce", *map(str, arguments)])
    return result.exit_code, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def test_chosen_figures_are_written_with_a_summary(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    code, output = run("--quick", "--only", "b,a", "--out", out)
    assert code == 0, output
    assert "within the accepted bands" in output
    assert sorted(p.name for p in out.iterdir()) == ["a.csv", "a.png", "b.csv", "b.png", "summary.html", "summary.json"]
    table = pandas.read_csv(out / "b.csv")
    assert set(table["depth"]) == {10, 30, 100}
    assert table["angle"].between(0, 1.58).all()

    summary = json.loads((out / "summary.json").read_text())
    assert summary["passed"] is True
    assert list(summary["figures"]) == ["a", "b"]
    mlp = next(c for c in summary["checks"] if (c["figure"], c["key"]) == ("b", "mlp,L=100"))
    assert mlp["published"] == [1.45, 1.45]
    row = table[(table["depth"] == 100) & (table["branch_scale"] == "1")]
    assert mlp["ours"] == pytest.approx(row["angle"].item())
    assert mlp["accepted"][0] < mlp["ours"] < mlp["accepted"][1]

    page = (out / "summary.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert set(re.findall(r'(?:href|src)="(http[^"]*)"', page)) == {"https://arxiv.org/abs/2311.18718"}
    assert page.count("✓ pass") == 2 * len(summary["checks"])
    assert "✗" not in page


def test_seeds_are_what_numbers_depend_on(tmp_path: Path) -> None:
    tables = []
    for name, options in (("x", ()), ("y", ()), ("z", ("--seed", 7)), ("w", ("--seeds", 2))):
        run("--quick", "--only", "a", "--out", tmp_path / name, *options)
        tables.append(pandas.read_csv(tmp_path / name / "a.csv"))
    same, again, other, fewer = tables
    pandas.testing.assert_frame_equal(same, again)
    assert not same["angle"].equals(other["angle"])
    assert set(fewer["seeds"]) == {2}


def test_a_number_that_is_not_the_published_one_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Published("a", "mlp", "an angle that it is not", 0.1, 0.2)
    monkeypatch.setattr("fastfs._reproduce.paper.published.PUBLISHED", (wrong,))
    code, output = run("--quick", "--only", "a", "--out", tmp_path)
    assert code == 1
    assert "1 of 1 numbers are outside of the accepted bands" in output
    assert json.loads((tmp_path / "summary.json").read_text())["passed"] is False
    assert "✗ fail" in (tmp_path / "summary.html").read_text()


@pytest.mark.parametrize(("only", "message"), [("a,z", "no figure 'z'; available figures"), (" , ", "no figure given")])
def test_unknown_figures_are_named_with_those_that_exist(tmp_path: Path, only: str, message: str) -> None:
    code, output = run("--quick", "--only", only, "--out", tmp_path / "out")
    assert code == 2
    assert message in output
    for study in STUDIES.values():
        assert study.title in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    code, output = run("--quick", "--only", "a", "--out", tmp_path / place)
    assert code == 2
    assert re.search(r"fastfs reproduce: .*(exists and is not a folder|cannot be written to)", output)
    assert "Traceback" not in output
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("package", ["matplotlib", "pandas", "scipy"])
def test_a_missing_package_is_named_before_anything_is_computed(tmp_path: Path, package: str) -> None:
    script = f"import sys; sys.modules['{package}'] = None; from fastfs._cli.app import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", script, "reproduce", "--quick", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "fastfs reproduce: " in done.stderr
    assert 'pip install "fastfs[' in done.stderr
    assert package in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_a_killed_process_could_not_clean_up_goes_with_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"old")
    (tmp_path / f"{command._MARK}abc").write_bytes(b"half of it")
    command._prepare(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_the_summary_of_an_earlier_run_goes_before_its_figures_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--quick", "--only", "a", "--out", tmp_path)[0] == 0
    assert (tmp_path / "summary.html").exists()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastfs._reproduce.paper.run._compute", killed)
    run("--quick", "--only", "a", "--out", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.png"]


def test_a_summary_that_is_not_ours_stays_until_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "summary.html").write_text("mine")
    command._prepare(tmp_path)
    assert (tmp_path / "summary.html").read_text() == "mine"
