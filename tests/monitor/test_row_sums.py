"""Sums of rows to sums of layers, and numbers of parameters to sums over sets of them: against one layer at a time."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastfs._functional import feature_stats, first_order_stats
from fastfs._monitor.capture.sampling import RowChoice, SampleSubset
from fastfs._monitor.measure.incidence import Incidence
from fastfs._monitor.measure.row_sums import (
    BACKWARD,
    DOT,
    NONFINITE,
    UPDATE,
    Triple,
    from_direction,
    from_replay,
    totals,
)
from fastfs._monitor.measure.segment_sums import SegmentSums
from fastfs._network.parameter_sets import ParameterSets, intervals_of, union
from fastfs._record.ranks.assembly import relative_errors
from fastfs._stats import FeatureStats

CPU = torch.device("cpu")
QUANTILES = (0.0, 0.1, 0.5, 1.0)


class Operators(TorchDispatchMode):
    """Counts operators; none may read a number of a tensor, which on a GPU waits for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.overloadpacket.__name__ not in self.WAITING, function
        self.count += 1
        return function(*args, **(kwargs or {}))


def visit(draw: random.Random, choice: RowChoice) -> Triple:
    rows = choice.kept
    width = draw.randint(1, 5)
    before = torch.randn(rows, width)
    if draw.random() < 0.1:
        before[0, 0] = torch.nan
    after, backward = before + 1e-2 * torch.randn(rows, width), torch.randn(rows, width) * draw.choice([1, 0])
    return Triple(before, after, backward, choice)


def choice(draw: random.Random, rows: int, factor: int) -> RowChoice:
    """So many rows of `factor` times as many; of every other tensor, by samples."""
    if draw.random() < 0.5:
        return RowChoice(rows * factor, rows)
    samples = draw.choice([n for n in range(1, rows + 1) if rows % n == 0])
    batch = samples * draw.choice([n for n in range(1, factor + 1) if factor % n == 0])
    return RowChoice(rows * factor, rows, SampleSubset(samples, batch))


def step(seed: int) -> list[list[list[Triple]]]:
    """Of each pass, per layer its visits."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    layers, passes, even = draw.randint(1, 5), draw.randint(1, 3), draw.random() < 0.4
    rows = draw.randint(1, 40)

    def visits() -> list[Triple]:
        if even:
            return [visit(draw, choice(draw, rows, draw.choice([1, 3])))]
        sizes = [draw.choice([1, 2, draw.randint(3, 80)]) for _ in range(draw.choice([0, 1, 1, 2]))]
        return [visit(draw, choice(draw, size, draw.choice([1, 1, 4]))) for size in sizes]

    return [[visits() for _ in range(layers)] for _ in range(passes)]


def variance_of_total(values: Tensor, chosen: RowChoice) -> Tensor:
    """Of an estimate of a total over all rows, from those of a two-stage sample (Cochran 1977, equation 10.15)."""
    units, all_units = chosen.samples or (chosen.kept, chosen.total)
    rows, all_rows = chosen.kept // units, chosen.total // all_units
    first, second = units / all_units, rows / all_rows
    within = torch.zeros(3, dtype=torch.float64)
    means = values.reshape(units, rows, 3)
    if rows > 1:
        within = means.var(dim=1).mean(dim=0)
    elif second < 1:
        first = 0.0  # on the safe side
    between = means.mean(dim=1).var(dim=0) if units > 1 else torch.full((3,), torch.nan if first < 1 else 0.0)
    relative = (1 - first) / units * between + first * (1 - second) / (units * rows) * within
    return chosen.total**2 * relative


def one_layer(visits: list[tuple[Tensor, RowChoice]]) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, relative standard errors and quantiles of a layer, from the sums of its rows."""
    total = torch.zeros(9, dtype=torch.float64)
    for rows, chosen in visits:
        scale = torch.full((9,), chosen.total / chosen.kept, dtype=torch.float64)
        scale[NONFINITE] = 1.0
        total = total + rows.sum(dim=0) * scale
    halves = torch.zeros((3, 9), dtype=torch.float64)
    halves[0, DOT], halves[0, UPDATE], halves[0, BACKWARD] = 1.0, -0.5, -0.5
    halves[1, UPDATE], halves[2, DOT] = 0.5, 1.0
    weights = (halves / total).T
    weights = torch.where(weights.isfinite(), weights, 0.0)
    variance = torch.zeros(3, dtype=torch.float64)
    for rows, chosen in visits:
        if chosen.kept < chosen.total:
            variance = variance + variance_of_total(rows @ weights, chosen)
    if not visits:
        return total, variance, torch.full((2, len(QUANTILES)), torch.nan, dtype=torch.float64)
    stats = FeatureStats(torch.cat([rows for rows, _ in visits]))
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    return total, variance.sqrt(), torch.stack([torch.nanquantile(v, at) for v in (stats.cos_angle, stats.update_rms)])


@pytest.mark.parametrize("start", range(0, 80, 20))
@pytest.mark.parametrize("direction", [False, True])
def test_totals_are_those_of_one_layer_at_a_time(start: Any, direction: bool) -> None:
    for seed in range(start, start + 20):
        passes = step(seed)
        found = totals([(from_direction if direction else from_replay)(layers) for layers in passes], QUANTILES, CPU)
        for layer in range(len(passes[0])):
            visits = [triple for layers in passes for triple in layers[layer]]
            function = first_order_stats if direction else feature_stats
            rows = [function([t.before], [t.after], [t.backward], per_row=True)[0].sums for t in visits]
            sums, errors, quantiles = one_layer([(r, t.choice) for r, t in zip(rows, visits, strict=True)])
            what = f"seed {seed}, layer {layer}"
            options: dict[str, Any] = {
                "rtol": 1e-9,
                "atol": 1e-12,
                "equal_nan": True,
                "msg": lambda m, w=what: f"{w}: {m}",
            }
            torch.testing.assert_close(found.stats.sums[layer], sums, **options)
            torch.testing.assert_close(found.quantiles[layer], quantiles, **options)
            cosine_se, update_se, dot_se = map(torch.from_numpy, relative_errors(found.spread.numpy()))
            torch.testing.assert_close(torch.stack([update_se[layer], dot_se[layer]]), errors[1:], **options)
            cosine = FeatureStats(sums).cos_angle
            angle = errors[0] * cosine.abs() / (1.0 - cosine.square()).clamp_min(0.0).sqrt()
            own = cosine_se[layer] * cosine.abs() / (1.0 - cosine.square()).clamp_min(0.0).sqrt()
            torch.testing.assert_close(own, angle, **{**options, "rtol": 1e-6})
            assert found.rows[layer] == (sum(map(len, rows)), sum(t.choice.total for t in visits))


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("samples", [False, True])
def test_operators_do_not_grow_with_layers_and_none_waits(uneven: bool, samples: bool) -> None:
    counts = []
    for layers in (3, 200):
        draw = random.Random(0)
        choices = [RowChoice(30, 6 + uneven * (layer % 3)) for layer in range(layers)]
        if samples:
            choices = [RowChoice(30, 4 + 2 * uneven * (layer % 3), SampleSubset(2, 3)) for layer in range(layers)]
        triples = [[visit(draw, choice)] for choice in choices]
        found = from_replay(triples)
        with Operators() as operators:
            totals([found, found], (), CPU)
        counts.append(operators.count)
    assert counts[0] == counts[1]


def test_layers_without_a_visit() -> None:
    found = totals([from_replay([[], []])], (0.5,), CPU)
    assert found.stats.sums.eq(0.0).all()
    assert found.rows == [(0, 0), (0, 0)]
    assert found.quantiles.isnan().all()
    assert found.quantiles.shape == (2, 2, 1)


def test_segments_of_all_lengths() -> None:
    draw = random.Random(1)
    for _ in range(30):
        lengths = np.array([draw.choice([0, 1, 5, 32, 33, 1100]) for _ in range(draw.randint(1, 6))])
        matrix = torch.randn(int(lengths.sum()), 3, dtype=torch.float64)
        expected = torch.stack([part.sum(dim=0) for part in matrix.split(lengths.tolist())])
        torch.testing.assert_close(SegmentSums(lengths, CPU)(matrix), expected)
        order = np.array(draw.sample(range(len(matrix)), len(matrix)), dtype=np.int64)
        expected = torch.stack([part.sum(dim=0) for part in matrix[torch.from_numpy(order)].split(lengths.tolist())])
        torch.testing.assert_close(SegmentSums(lengths, CPU, order)(matrix), expected)


def random_sets(draw: random.Random) -> tuple[ParameterSets, Tensor]:
    layers, parameters = draw.randint(1, 7), draw.randint(1, 70)
    bits = torch.tensor([[draw.random() < 0.4 for _ in range(parameters)] for _ in range(layers)])
    numbering = np.array(draw.sample(range(parameters), parameters))
    rows = bits.numpy()[:, numbering]
    return ParameterSets.of(numbering, [intervals_of(np.flatnonzero(row).tolist()) for row in rows]), bits


def test_parameter_sets() -> None:
    draw = random.Random(2)
    for _ in range(100):
        sets, bits = random_sets(draw)
        assert torch.equal(sets.dense(), bits)
        assert sets.counts().tolist() == bits.sum(dim=1).tolist()
        values = torch.randint(100, (bits.shape[1],))
        assert sets.total(values.numpy()).tolist() == (bits * values).sum(dim=1).tolist()
        dense = ParameterSets.from_dense(bits)
        assert torch.equal(dense.dense(), bits)
        assert dense.same_as(sets)
        again = ParameterSets.from_state(sets.state_dict())
        assert again.same_as(sets)
        other = bits.clone()
        other[0, 0] = ~other[0, 0]
        assert not ParameterSets.from_dense(other).same_as(sets)
        every = [i for i in range(bits.shape[1]) if bits[:, i].any()]
        rows = [intervals_of(row.nonzero().flatten().tolist()) for row in bits]
        assert union(rows) == intervals_of(every)


def test_sums_over_parameters() -> None:
    draw = random.Random(3)
    for seed in range(100):
        torch.manual_seed(seed)
        sets, bits = random_sets(draw)
        incidence = Incidence(sets, ~bits, CPU)
        values = torch.randn(bits.shape[1], 3, dtype=torch.float64)
        torch.testing.assert_close(incidence.upstream(values), bits.double() @ values)
        torch.testing.assert_close(incidence.own(values), (~bits).double() @ values)
        assert torch.equal(incidence.known, bits.any(dim=1))
        again = Incidence.from_state(incidence.state_dict(), CPU)
        assert torch.equal(again.upstream(values), incidence.upstream(values))


def test_a_parameter_counts_for_its_own_layers_only() -> None:
    """Neither NaN nor a number that is larger by many orders of magnitude gets into other sums."""
    own = Incidence(torch.eye(5, dtype=torch.bool), torch.eye(5, dtype=torch.bool), CPU)
    values = torch.tensor([1e300, 1e-300, torch.nan, 3.0, torch.inf], dtype=torch.float64)[:, None]
    torch.testing.assert_close(own.own(values), values, rtol=0.0, atol=0.0, equal_nan=True)


def test_sums_over_parameters_take_memory_in_proportion_and_do_not_wait() -> None:
    layers = 3000
    below = [(0, layer + 1) for layer in range(layers)]
    numbering = np.arange(layers)
    sets = ParameterSets.of(numbering, below)
    own = ParameterSets.of(numbering, [(layer, layer + 1) for layer in range(layers)])
    incidence = Incidence(sets, own, CPU)
    with Operators() as operators:
        found = incidence.upstream(torch.ones(layers, 1, dtype=torch.float64))
    assert found.flatten().tolist() == list(range(1, layers + 1))
    assert operators.count < 60
    assert sum(tensor.nbytes for tensor in sets.state_dict().values()) < 100 * layers
