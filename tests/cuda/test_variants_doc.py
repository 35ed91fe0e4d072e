"""The tables of docs/kernels.md are those of the result files, of the catalogue and of the model."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.tuning import model_tables, static
from benchmarks.tuning.catalogue import BASELINE, VARIANTS
from benchmarks.tuning.model import FORMER, PRESENT, Constants, Design, Gpu, simulate

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text().splitlines()
FILE = json.loads((ROOT / "benchmarks" / "results" / "variants-static.json").read_text())


def test_table_of_variants_is_that_of_the_file() -> None:
    lines = static.markdown(FILE["results"], static.COMPARED)
    assert len(lines) == len(VARIANTS)
    assert [line for line in lines if line not in PAGE] == []


def test_table_of_architectures_is_that_of_the_file() -> None:
    only = [r for r in FILE["results"] if r["variant"] == BASELINE]
    for name, at in FILE["architectures"].items():
        low, high = (round(n / 1024) for n in at["bytes needed in flight"])
        (line,) = static.markdown(only, name)
        assert line.replace(f"| {BASELINE} |", f"| {at['gpu']} | {low} to {high} |") in PAGE


def test_every_variant_has_its_prediction_and_a_place_for_what_is_measured() -> None:
    for v in VARIANTS:
        cells = [re.escape(v.name), "(yes|short rows|layers|no)", re.escape(v.prediction), "[^|]+", "[^|]*"]
        wanted = r"\| " + r" \| ".join(cells) + r" ?\|"
        assert any(re.fullmatch(wanted, line) for line in PAGE), v.name


def test_tables_of_measurements_are_those_of_the_files() -> None:
    lines = model_tables.measured_lines()
    assert len(lines) > 30
    assert [line for line in lines if line not in PAGE] == []


@pytest.mark.slow
def test_tables_of_the_model_are_what_it_computes() -> None:
    lines = [*model_tables.residual_lines(), *model_tables.prediction_lines()]
    assert len(lines) == 3 * len(model_tables.VARIANTS) + 12
    assert [line for line in lines if line not in PAGE] == []
    for fit in (model_tables.FREE, model_tables.BOUND):
        text = f"root mean square {model_tables.spread(fit):.3f}"
        assert any(text in line for line in PAGE), text


def test_the_model_in_cases_that_are_known() -> None:
    constants = Constants(trip=1.0, between=0.5, reduction=0.25, stream=2.0, unevenness=0.0)
    gpu = Gpu(multiprocessors=1, bandwidth=100.0)
    present, former = Design(PRESENT, flight=100), Design(FORMER, flight=100, grid=3)

    def time(design: Design, *segments: tuple[int, int]) -> float:
        return simulate([segments], design, gpu, constants)

    # One chunk: the first loads, then at the rate of the bytes in flight, then the reduction.
    assert time(present, (1000, 1000)) == pytest.approx(2 + 1000 / 50 + 0.25)
    # Three at a time share the bandwidth; the last one adds the partial sums: two trips, and one to read them.
    assert time(present, (1000, 3000)) == pytest.approx(2 + 3000 / 100 + 0.25 + 2 + 1)
    assert time(former, (1000, 3000)) == pytest.approx(2 + 3000 / 100 + 0.25 + 2.5 + 1)
    # With segments of one chunk there is nothing to add. A slot that ends takes the next block.
    assert time(present, *[(1000, 1000)] * 6) == pytest.approx(2 + 30 + 0.25 + 0.5 + 30 + 0.25)
