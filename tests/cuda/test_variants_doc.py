"""The tables of docs/kernels.md are those of the result file and of the catalogue."""

import json
import re
from pathlib import Path

from benchmarks.tuning import static
from benchmarks.tuning.catalogue import BASELINE, VARIANTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text().splitlines()
FILE = json.loads((ROOT / "benchmarks" / "results" / "variants-static.json").read_text())


def test_table_of_variants_is_that_of_the_file() -> None:
    lines = static.markdown(FILE["results"], "90")
    assert len(lines) == len([v for v in VARIANTS if v.waves == 1])
    assert [line for line in lines if line not in PAGE] == []


def test_table_of_architectures_is_that_of_the_file() -> None:
    only = [r for r in FILE["results"] if r["variant"] == BASELINE]
    for name, at in FILE["architectures"].items():
        low, high = (round(n / 1024) for n in at["bytes needed in flight"])
        (line,) = static.markdown(only, name)
        assert line.replace(f"| {BASELINE} |", f"| {at['gpu']} | {low} to {high} |") in PAGE


def test_every_variant_has_its_prediction_and_a_place_for_what_is_measured() -> None:
    for v in VARIANTS:
        wanted = rf"\| {re.escape(v.name)} \| (yes|short rows|no) \| {re.escape(v.prediction)} \| [^|]+ \| [^|]*\|"
        assert any(re.fullmatch(wanted, line) for line in PAGE), v.name
