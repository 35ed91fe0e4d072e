"""The sample of the parameters: what is read, that estimates are unbiased, and that their variance is not too small."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastfs._monitor.measure.parameter_sample import ParameterChunks, Reading, coverage, standing_out
from fastfs._monitor.measure.sampled_calls import CENSUS_PERIOD, SampledCall, SampledCalls
from fastfs._stats import ParameterStats

CPU = torch.device("cpu")
DOT = ParameterStats.names.index("dot")
COUNT = ParameterStats.names.index("count")
COLUMNS = len(ParameterStats.names)
SIZES = st.lists(st.integers(0, 5000), min_size=1, max_size=6)


def known(chunks: ParameterChunks, share: float, seed: int = 0) -> list[Any]:
    """Random chunks that stand out."""
    numbers = np.random.default_rng(seed)
    return [numbers.random(count) < share if count else None for count in chunks.counts]


def sums_of(values: list[Tensor], pieces: Tensor) -> Tensor:
    """What `optimizer_stats` says of the pieces, if <g, dw> of an element is its value: (Q, C)."""
    result = torch.zeros(len(pieces), COLUMNS, dtype=torch.float64)
    for row, (index, begin, count) in zip(result, pieces.tolist(), strict=True):
        row[:] = values[index][begin : begin + count].sum()
        row[COUNT] = count
    return result


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(2, 5), st.integers(1, 40), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.booleans())
def test_pieces_are_disjoint_and_within_their_parameter(
    sizes: list[int], every: int, least: int, share: float, census: bool
) -> None:
    chunks = ParameterChunks(sizes, every, least=least)
    reading = Reading(chunks, range(len(sizes)), known(chunks, share), CPU, census=census)
    read = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    for index, begin, count in reading.pieces.tolist():
        assert 0 <= begin <= begin + count <= sizes[index]
        read[index][begin : begin + count] += 1
    assert reading.elements == sum(int(x.sum()) for x in read)
    for index, x in enumerate(read):
        assert (x <= 1).all()
        if census or not chunks.counts[index]:
            assert (x == 1).all()
    # All elements are represented: the estimate of a constant is exact.
    estimate = reading.estimate(sums_of([torch.ones(size, dtype=torch.float64) for size in sizes], reading.pieces))
    assert estimate[:, COUNT].tolist() == sizes
    assert not estimate[:, COLUMNS].any()
    sampled = [bool((x == 0).any()) for x in read]
    assert (estimate[:, COLUMNS + 1] == torch.tensor(sampled)).all()


@given(SIZES, st.integers(2, 5), st.integers(0, 3))
def test_the_draws_are_a_function_of_the_sizes(sizes: list[int], every: int, number: int) -> None:
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first, again = (ParameterChunks(sizes, every, number, least=8) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first.draws, again.draws, strict=True))
    assert all(((draws >= 0) & (draws < every)).all() for draws in first.draws)
    assert (state[0] == torch.get_rng_state()).all()
    assert state[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_draws_are_uniform_and_differ_between_parameters_and_optimizers() -> None:
    draws = [ParameterChunks([64 * 400] * 3, 4, number, least=64).draws for number in range(30)]
    together = np.concatenate([np.concatenate(each) for each in draws])
    assert len(together) == 9000
    counts = np.bincount(together, minlength=4)
    assert (np.abs(counts - 2250) < 5 * np.sqrt(9000 * 3 / 16)).all()
    for a, b in itertools.combinations([*draws[0], *draws[1]], 2):
        assert abs((a == b).mean() - 0.25) < 5 * np.sqrt(3 / 16 / 100)


def test_large_parameters_are_read_by_a_quarter_and_small_ones_as_a_whole() -> None:
    sizes = [768 * 768, 768 * 3072, 50257 * 768, 768, 2**18 - 1]
    chunks = ParameterChunks(sizes, 4)
    reading = Reading(chunks, range(5), known(chunks, 0.0), CPU)
    table = reading.pieces
    shares = [table[table[:, 0] == i, 2].sum().item() / size for i, size in enumerate(sizes)]
    assert shares[:3] == pytest.approx([0.25] * 3, abs=0.01)
    assert shares[3:] == [1.0, 1.0]
    assert (table[table[:, 0] < 3, 1] % 64 == 0).all()
    assert len(table) < 1000


def test_the_number_of_pieces_stays_bounded() -> None:
    chunks = ParameterChunks([4096 * 4096, 4096 * 11008] * 100, 4)  # 6.2e9 elements
    assert len(Reading(chunks, range(200), known(chunks, 0.0), CPU).pieces) < 2**11 + 200


def every_draw(every: int, strata: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(every), repeat=strata))


@pytest.mark.parametrize("standing", [[], [3, 11]])
@pytest.mark.parametrize("shape", ["noise", "trend", "first", "last", "periodic", "heavy"])
def test_estimates_are_unbiased_and_the_variance_is_at_least_the_true_one(shape: str, standing: list[int]) -> None:
    """Over all draws of the 5 or 6 strata, so that nothing is left to chance."""
    size, every = 18 * 7 + 2, 3
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    place = torch.arange(size) / size
    values = {
        "noise": noise,
        "trend": noise + 5 * place,
        "first": noise * (1 + 20 * (place < 0.1)),
        "last": noise * (1 + 20 * (place > 0.9)),
        "periodic": 0.01 * noise + (torch.arange(size) // 7 % 3).double(),
        "heavy": noise**5,
    }[shape]
    chunks = ParameterChunks([size], every, least=7)
    assert (chunks.counts, chunks.lengths) == ([18], [7])
    mask = np.isin(np.arange(18), standing)
    estimates, variances = [], []
    for draws in every_draw(every, 5 if standing else 6):
        chunks.draws = [np.array(draws)]
        reading = Reading(chunks, [0], [mask], CPU)
        found = reading.estimate(sums_of([values], reading.pieces))[0]
        estimates.append(found[DOT])
        variances.append(found[COLUMNS])
    assert any(variance > 0 for variance in variances)
    total, truth = torch.stack(estimates), values.sum()
    assert total.mean().item() == pytest.approx(truth.item(), rel=1e-12, abs=1e-12)
    true_variance = (total - truth).square().mean().item()
    assert torch.stack(variances).mean().item() >= true_variance * (1 - 1e-12)
    if shape == "noise":
        assert torch.stack(variances).mean().item() <= 2 * true_variance


def test_the_variance_is_that_of_the_docstring() -> None:
    """E[v] = sum of V_h + 1/2 sum of (Y_h - Y_(h+1))^2."""
    values = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    chunks = ParameterChunks([16], 4, least=1)
    strata = values.reshape(4, 4)
    means = strata.sum(dim=1)
    expected = (16 * strata.var(dim=1, correction=0)).sum() + 0.5 * (means - means.roll(-1)).square().sum()
    found = []
    for draws in every_draw(4, 4):
        chunks.draws = [np.array(draws)]
        reading = Reading(chunks, [0], [np.zeros(16, dtype=bool)], CPU)
        found.append(reading.estimate(sums_of([values], reading.pieces))[0, COLUMNS])
    assert torch.stack(found).mean().item() == pytest.approx(expected.item(), rel=1e-12)


def test_what_stands_out() -> None:
    ones = np.ones(64)
    assert not standing_out(ones, 4).any()
    ones[[5, 40]] = [100.0, -30.0]
    assert np.flatnonzero(standing_out(ones, 4)).tolist() == [5, 40]
    assert standing_out(np.zeros(64), 4).all()
    assert standing_out(np.eye(64)[3], 4).all()  # nothing is known of the rest
    ones[7] = np.nan
    assert standing_out(ones, 4).all()


def test_coverage_is_that_of_the_draws() -> None:
    numbers = np.random.default_rng(0)
    nothing = np.zeros(256, dtype=bool)
    assert coverage(numbers.standard_normal(256), nothing, 4) > 0.93
    rare = np.ones(256) + 1e-3 * numbers.standard_normal(256)
    rare[100] = 1000.0  # three of four draws do not know of it
    assert 0.15 < coverage(rare, nothing, 4) < 0.35
    assert coverage(rare, np.arange(256) == 100, 4) > 0.93
    assert coverage(rare, np.arange(256) >= 12, 4) == 1.0  # nothing is sampled


def test_a_parameter_is_sampled_only_if_the_census_before_was_a_good_guide() -> None:
    call = SampledCalls(4, least=64).find([6400, 6400], [0, 1], [[torch.zeros(6400)] * 2], CPU)
    assert call is not None
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        values = [torch.rand(6400, generator=generator, dtype=torch.float64) for _ in range(2)]
        values[1][640 * step] = 1000.0  # somewhere else in each step
        reading = call.next()
        found = call.estimate(reading, sums_of(values, reading.pieces))
    assert found[:, COLUMNS + 1].tolist() == [1.0, 0.0]


def test_other_numbers_in_one_parameter_do_not_matter() -> None:
    chunks = ParameterChunks([4096, 4096], 4, least=64)
    reading = Reading(chunks, [0, 1], known(chunks, 0.0), CPU)
    values = [torch.full((4096,), torch.nan, dtype=torch.float64), torch.randn(4096, dtype=torch.float64)]
    found = reading.estimate(sums_of(values, reading.pieces))
    assert found[0, DOT].isnan()
    assert found[1].isfinite().all()


def test_a_census_comes_first_and_then_seldom() -> None:
    sizes = [6400, 10]
    call = SampledCalls(4, least=64).find(sizes, [0, 1], [[torch.zeros(6400), torch.zeros(10)]], CPU)
    assert isinstance(call, SampledCall)
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes]
    values[0][640] = 1000.0
    census = []
    for step in range(1, 3 * CENSUS_PERIOD + 1):
        reading = call.next()
        if reading.elements == 6410:
            census.append(step)
        else:
            assert reading.elements == 64 * (1 + 24 + 3) + 10  # what stands out, 24 strata, 3 chunks that are left over
            begins = reading.pieces[reading.pieces[:, 0] == 0, 1]
            assert 640 in begins.tolist()  # its chunk stands out
        found = call.estimate(reading, sums_of(values, reading.pieces))
        assert (found[0, COLUMNS] > 0) == (step not in census)
        assert found[1, DOT].item() == values[1].sum().item()
    assert census == [1, 2, 4, 8, 16, 32, 64, 128, 192]


def test_calls_are_told_apart() -> None:
    calls, dense = SampledCalls(4, least=64), torch.zeros(80, 80)
    sizes = [6400, 6400]
    both = calls.find(sizes, [0, 1], [[dense, dense]], CPU)
    assert both is not None
    assert calls.find(sizes, [0, 1], [[dense, dense]], CPU) is both
    assert calls.find(sizes, [0], [[dense]], CPU) is not both
    assert calls.find(sizes, [0, 1], [[dense, dense], [dense, torch.zeros(80, 160)[:, ::2]]], CPU) is not both
    assert calls.find(sizes, [0], [[torch.zeros(80, 160)[:, ::2]]], CPU) is None  # it is read as a whole
    assert calls.find([6400, 10], [1], [[torch.zeros(10)]], CPU) is None
    assert SampledCalls(1, least=64).find(sizes, [0, 1], [[dense, dense]], CPU) is None
