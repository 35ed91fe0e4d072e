"""Transfer verdicts from records: exponents of made runs, sizes, errors, and real runs through the command."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import fastfs
from fastfs._cli.app import app
from fastfs.scaling import Status, fit_exponent, transfer
from tests.compare.test_compare_runs import lines_of, write
from tests.helpers.recorded_runs import train

pytest.importorskip("pandas")
pytest.importorskip("scipy")

POWERS = {"feature_rms": (0.0, 0.0), "update_rms": (0.5, -1.0), "aligned_decrease": (0.5, 0.0)}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """A record per size, as a real run writes it, whose numbers then follow powers of width and depth exactly."""
    folder = tmp_path_factory.mktemp("sizes")
    first = train(folder / "first.jsonl", depth=9)
    found = {}
    for width in (8, 16, 32):
        for depth in (4, 6, 8):
            lines = lines_of(first)
            lines[0]["metadata"] = {"width": width, "depth": depth}
            lines[0]["run"] = f"{width}-{depth}"
            lines[0]["layers"] = lines[0]["layers"][:depth]
            for line in lines[1:]:
                line["run"] = lines[0]["run"]
                line["layers"] = {name: values[:depth] for name, values in line["layers"].items()}
                for column, (over_width, over_depth) in POWERS.items():
                    if line["kind"] == "measured":
                        line["layers"][column] = [0.1 * width**over_width * depth**over_depth] * depth
            found[width, depth] = write(folder / f"{width}-{depth}.jsonl", lines)
    return found


def test_exponents_of_exact_powers(records: dict[tuple[int, int], Path]) -> None:
    report = transfer(list(records.values()))
    for axis, place in (("width", 0), ("depth", 1)):
        size, speed, decrease = (POWERS[name][place] for name in POWERS)
        assert report.exponent("feature size", axis).exponent == pytest.approx(size, abs=1e-6)
        assert report.exponent("feature speed", axis).exponent == pytest.approx(speed, abs=1e-6)
        assert report.exponent("feature speed, mean of layers", axis).exponent == pytest.approx(speed, abs=1e-6)
        assert report.exponent("aligned decrease", axis).exponent == pytest.approx(decrease, abs=1e-6)
        assert report.exponent("sensitivity", axis).exponent == pytest.approx(speed - decrease, abs=1e-6)
    assert report.sizes[0] == (8.0, 4.0)
    assert [report.of(axis).value for axis in ("width", "depth")] == ["FAIL", "FAIL"]
    said = str(report)
    assert said.startswith("FAIL: 9 runs, 3 measured steps (0 to 6), exponents against 0 +- 0.15")
    assert "over width (8, 16, 32): FAIL, " in said
    assert "feature speed (-1.00)" in said
    table = report.to_frame()
    assert set(table["status"]) == {"PASS", "FAIL", "info"} | (set(table["status"]) & {"UNCLEAR"})
    result = report.to_dict()
    assert result["runs"][0]["feature speed"] == pytest.approx(0.1 * 8**0.5 / 4)
    with pytest.raises(ValueError, match=r"no exponent of 'x' over 'width'; there are: feature size \(width\)"):
        report.exponent("x", "width")


def test_one_axis_and_given_sizes(records: dict[tuple[int, int], Path]) -> None:
    some = [records[width, 6] for width in (8, 16, 32)]
    report = transfer(some)
    assert report.axes == ("width",)
    assert "over depth (6): not judged, which takes at least 3 different sizes" in str(report)
    with pytest.raises(ValueError, match=r"axis: expected one of width, got 'depth'"):
        report.of("depth")
    other = transfer(some, sizes=[(8**2, None), (16**2, 6), (32**2, 6)])
    assert other.exponent("feature speed", "width").exponent == pytest.approx(0.25, abs=1e-6)
    assert transfer(some, steps=1).steps == (0,)


def test_errors_name_what_is_wrong(records: dict[tuple[int, int], Path], tmp_path: Path) -> None:
    every = list(records.values())
    plain = [train(tmp_path / f"{i}.jsonl", seed=i) for i in range(3)]
    with pytest.raises(ValueError, match=r"0.jsonl: no width was given, and the record's metadata has none"):
        transfer(plain)
    with pytest.raises(ValueError, match=r"2.jsonl: expected a positive depth, got 0"):
        transfer(plain, sizes=[(1, 1), (2, 1), (3, 0)])
    with pytest.raises(ValueError, match=r"sizes: expected one for every run, got 1 for 3 runs"):
        transfer(plain, sizes=[(1, 1)])
    with pytest.raises(ValueError, match=r"at least 3 different sizes, got the widths 8, 16 and the depths 4"):
        transfer([records[8, 4], records[16, 4]])
    with pytest.raises(ValueError, match=r"tolerance: expected a number between 0 and 1, got 0"):
        transfer(every, tolerance=0)
    with pytest.raises(ValueError, match=r"steps: expected at least 1, got 0"):
        transfer(every, steps=0)
    header = write(tmp_path / "header.jsonl", lines_of(plain[0])[:1])
    with pytest.raises(ValueError, match=r"header.jsonl: the run has no measured rows yet"):
        transfer([header, *plain[1:]], sizes=[(1, 1), (2, 1), (3, 1)])


def test_quantities_without_valid_numbers_are_unclear(records: dict[tuple[int, int], Path], tmp_path: Path) -> None:
    lines = lines_of(records[8, 4])
    for line in lines:
        if line["kind"] == "measured":
            line["layers"]["valid"] = [False] * 4
            line["layers"]["why"] = ["a test"] * 4
    others = [path for size, path in records.items() if size != (8, 4)]
    report = transfer([write(tmp_path / "8-4.jsonl", lines), *others])
    by_name = {(v.quantity, v.axis): v for v in report.verdicts}
    speed = by_name["feature speed", "width"]
    assert (speed.status, speed.fit) == (Status.UNCLEAR, None)
    assert speed.advice == "feature speed is missing, not valid or not positive in 1 of 9 runs"
    assert by_name["feature size", "width"].status is Status.PASS


def test_blocks_have_constants_of_their_own() -> None:
    rng = np.random.default_rng(0)
    held, times = 0, 400
    for _ in range(times):
        sizes, values, blocks = [], [], []
        for depth in (4, 8, 16):
            for width in (8, 16, 32):
                sizes.append(width)
                blocks.append(depth)
                values.append(depth**2 * width**0.7 * math.exp(0.1 * rng.standard_normal()))
        fit = fit_exponent(sizes, values, blocks=blocks)
        held += fit.low <= 0.7 <= fit.high
        assert fit.at(0.95).low == pytest.approx(fit.low)
    assert abs(held / times - 0.95) < 4 * math.sqrt(0.95 * 0.05 / times)
    with pytest.raises(ValueError, match=r"expected at least 5 measurements in 3 blocks, got 3"):
        fit_exponent([1, 2, 3], [1, 2, 3], blocks="abc")
    with pytest.raises(ValueError, match=r"different sizes within a block"):
        fit_exponent([1, 1, 2, 2, 3, 3], [1] * 6, blocks="aabbcc")
    with pytest.raises(ValueError, match=r"a block for every size, got 2 blocks and 3 sizes"):
        fit_exponent([1, 2, 3], [1, 2, 3], blocks="ab")


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    return result.exit_code, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def test_the_command(records: dict[tuple[int, int], Path], tmp_path: Path) -> None:
    every = list(records.values())
    code, output = run("transfer", *every, "--json", tmp_path / "result.json")
    assert code == 1
    assert "FAIL: 9 runs" in output
    assert json.loads((tmp_path / "result.json").read_text())["axes"] == {"width": "FAIL", "depth": "FAIL"}
    some = [records[width, 6] for width in (8, 16, 32)]
    code, output = run("transfer", *some, "--size", f"{some[0]}=64,", "--size", f"{some[2]}=4,6")
    assert code == 1
    assert "over width (4, 16, 64)" in output
    assert run("transfer", *some, "--size", "x=1,2")[1].startswith("fastfs transfer: --size x=1,2: expected RUN=WIDTH")
    code, output = run("transfer", *some, "--size", f"{some[0]}=a")
    assert code == 2
    assert f"such as {some[0]}=128,8" in output


def test_all_runs_of_one_record(tmp_path: Path) -> None:
    record = tmp_path / "all.jsonl"
    for seed, width in enumerate((8, 16, 32)):
        train(record, seed=seed, width=width, steps=2, every=1, metadata={"width": width, "depth": 6})
    report = fastfs.scaling.transfer([record])
    assert list(report.sizes) == [(8, 6), (16, 6), (32, 6)]
    assert report.axes == ("width",)
