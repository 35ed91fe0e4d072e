"""Moments, quadrature and extreme eigenvalues of operators with known spectra."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

from fastfs.spectrum import BFK, Moments, extremes, moments, quadrature
from tests.helpers.compare import assert_estimate, assert_matrix
from tests.helpers.spectrum_cases import CASES, kernel, mlp, spectrum_of

DECAYING = torch.arange(1, 61, dtype=torch.float64).pow(-1.5)
FLAT = torch.linspace(1.0, 2.0, 60, dtype=torch.float64)
SPECTRA = {"decaying": DECAYING, "flat": FLAT}


def exact_moments(values: Tensor, order: int) -> Tensor:
    return torch.stack([values.pow(p).mean() for p in range(1, order + 1)])


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("sketch", [0, 6])
@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_moments_within_their_standard_errors(spectrum: str, sketch: int, distribution: str) -> None:
    values = SPECTRA[spectrum]
    matrix = spectrum_of(values)
    options: dict[str, Any] = {
        "order": 4,
        "rtol": 0.0,
        "max_probes": 400,
        "sketch": sketch,
        "distribution": distribution,
    }
    found = moments(matrix, seed=5, **options)
    assert found.probes == 400
    assert found.products == 2 * 400 + 3 * sketch
    assert found.samples.shape == (400, 4)
    assert_matrix(found.samples.mean(dim=0), found.values, 1e-14)
    # Four correlated numbers: four standard errors are exceeded with probability below 1e-3, and the seed is fixed.
    assert_estimate(found.values, found.errors, exact_moments(values, 4), sigmas=4.0)
    assert_matrix(found.traces, found.values * 60, 1e-14)


@pytest.mark.parametrize("sketch", [0, 4])
def test_standard_errors_cover_the_truth(sketch: int) -> None:
    """About 95 % of 200 repetitions of M_1, M_2 and the cosine lie within 1.96 standard errors."""
    matrix = spectrum_of(DECAYING[:30] + 0.1)
    values = DECAYING[:30] + 0.1
    truth = exact_moments(values, 2)
    cos = truth[0] / truth[1].sqrt()
    inside = torch.zeros(3)
    off = torch.zeros(200, 3, dtype=torch.float64)
    for seed in range(200):
        found = moments(matrix, rtol=0.0, min_probes=60, max_probes=60, sketch=sketch, seed=seed)
        got = torch.cat([found.values, found.predicted_cos_angle[None]])
        errors = torch.cat([found.errors, found.predicted_cos_angle_error[None]])
        off[seed] = (got - torch.cat([truth, cos[None]])) / errors
    inside = (off.abs() <= 1.96).double().mean(dim=0)
    # Binomial: 0.95 +- 0.015, with a margin for the finite number of 60 probes.
    assert bool(((inside >= 0.90) & (inside <= 0.99)).all()), inside
    assert bool((off.mean(dim=0).abs() <= 0.3).all()), off.mean(dim=0)  # unbiased: 0 +- 0.07


def test_the_joint_covariance_counts() -> None:
    """M_1 and M_2 are correlated: assuming independence would overestimate the error of their ratio."""
    found = moments(spectrum_of(DECAYING), rtol=0.0, max_probes=400)
    first, second = found.values
    slope = torch.stack([second.rsqrt(), -0.5 * first * second.pow(-1.5)])
    independent = (slope.square() @ found.covariance.diagonal()).sqrt()
    assert found.predicted_cos_angle_error < 0.6 * independent
    # The delta method against the jackknife.
    samples, n = found.samples, found.probes
    left = (samples.sum(dim=0) - samples) / (n - 1)
    ratio = left[:, 0] / left[:, 1].sqrt()
    jackknife = ((n - 1) / n * (ratio - ratio.mean()).square().sum()).sqrt()
    assert_matrix(found.predicted_cos_angle_error[None], jackknife[None], 0.05)


def test_sketch_pays_where_few_eigenvalues_carry_the_trace() -> None:
    matrix = spectrum_of(DECAYING)
    plain = moments(matrix, rtol=0.0, max_probes=60)
    with_sketch = moments(matrix, rtol=0.0, min_probes=24, max_probes=24, sketch=18)
    assert with_sketch.products == plain.products
    assert bool((with_sketch.errors < 0.3 * plain.errors).all())
    low_rank = spectrum_of(torch.cat([torch.ones(5), torch.zeros(40)]).double())
    exact = moments(low_rank, sketch=8)
    assert exact.converged
    assert_matrix(exact.values, torch.full((2,), 5 / 45, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize(("size", "rank", "sketch"), [(15, 15, 15), (8, 8, 8), (3, 3, 3), (15, 5, 5), (45, 5, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sketch_of_the_rank_is_exact_for_every_seed(size: int, rank: int, sketch: int, dtype: torch.dtype) -> None:
    values = torch.zeros(size, dtype=torch.float64)
    values[:rank] = torch.arange(1, rank + 1).double().pow(-1.5)
    matrix, truth = spectrum_of(values).to(dtype), exact_moments(values, 2)
    for seed in range(200):
        found = moments(matrix, sketch=sketch, seed=seed)
        assert_matrix(found.values, truth, 1e-11 if dtype == torch.float64 else 1e-5, f"seed {seed}")


def test_stops_early_when_it_is_good_enough_and_late_when_it_is_not() -> None:
    easy = moments(spectrum_of(FLAT), rtol=0.05, max_probes=1000)
    assert easy.converged
    assert easy.probes == 16
    hard = moments(spectrum_of(DECAYING), rtol=0.05, max_probes=4000)
    assert hard.converged
    assert 16 < hard.probes < 4000
    assert bool((hard.errors <= 0.05 * hard.values).all())
    harder = moments(spectrum_of(DECAYING), rtol=0.025, max_probes=4000)
    assert 2.5 < harder.probes / hard.probes < 6.0  # four times as many probes halve the error
    enough = moments(spectrum_of(DECAYING), rtol=0.05, max_probes=20)
    assert not enough.converged
    assert enough.probes == 20
    assert "not reached" in str(enough)
    many = moments(spectrum_of(FLAT), rtol=0.05, min_probes=70)
    assert many.probes == 70
    # All probes agree for the identity, but rtol=0 does not stop early.
    same = moments(torch.eye(30), rtol=0.0, max_probes=40)
    assert same.probes == 40
    assert not same.errors.any()


def test_seeds_and_generators() -> None:
    matrix = spectrum_of(FLAT)
    a, b, c = (moments(matrix, seed=s).values for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(moments(matrix, seed=torch.Generator().manual_seed(1)).values, a)
    random = torch.get_rng_state()
    moments(matrix)
    quadrature(matrix, probes=1, steps=3)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_of_kernels_of_networks(name: str) -> None:
    case = CASES[name]()
    operator = BFK(case.model, case.loss_fn, case.batch, case.layer, dtype=torch.float64)
    values = torch.linalg.eigvalsh(kernel(case))
    truth = exact_moments(values, 2)
    found = moments(operator, rtol=0.0, max_probes=128)
    assert_estimate(found.values, found.errors, truth, sigmas=4.0)
    cos = truth[0] / truth[1].sqrt()
    error = found.predicted_cos_angle_error
    assert_estimate(found.predicted_cos_angle[None], error[None], cos[None], sigmas=4.0)
    assert_matrix(moments(operator, sketch=len(values)).values, truth, 1e-10)
    rule = quadrature(operator, probes=64, steps=12)
    mean, error = rule.moment(2)
    assert_estimate(mean[None], error[None], truth[1:], sigmas=4.0)


@pytest.mark.parametrize("kind", ["torch", "numpy", "scipy"])
def test_operators_of_other_libraries(kind: str) -> None:
    matrix = spectrum_of(DECAYING)
    operator = {"torch": matrix, "numpy": matrix.numpy(), "scipy": aslinearoperator(matrix.numpy())}[kind]
    assert_matrix(moments(operator, sketch=60).values, exact_moments(DECAYING, 2), 1e-12)
    found = extremes(operator)
    assert_matrix(torch.tensor([found.largest, found.smallest]), torch.tensor([1.0, 60**-1.5]), 1e-9)
    assert quadrature(operator, probes=2, steps=4).probes == 2


# Quadrature


def test_quadrature_has_the_moments_of_its_probe() -> None:
    """Quadrature is exact up to power 2 s - 1 and not beyond."""
    matrix, steps = spectrum_of(FLAT), 5
    rule = quadrature(matrix, probes=3, steps=steps, seed=7)
    generator = torch.Generator().manual_seed(7)
    probes = 2.0 * torch.randint(0, 2, (3, 60), generator=generator).double() - 1.0
    assert [len(x) for x in rule.nodes] == [steps] * 3
    assert rule.exhausted == [False] * 3
    assert rule.products == 3 * steps
    for v, nodes, weights in zip(probes, rule.nodes, rule.weights, strict=True):
        assert_matrix(weights.sum()[None], torch.ones(1), 1e-13)
        assert bool((weights >= 0).all())
        image = v / v.norm()
        for power in range(1, 2 * steps + 3):
            image = matrix @ image
            exact = image @ v / v.norm()
            found = (weights * nodes**power).sum()
            assert (abs(found - exact) <= 1e-12 * exact) == (power <= 2 * steps - 1), power


def test_quadrature_with_all_steps_has_the_eigenvalues() -> None:
    """With full reorthogonalization, no eigenvalue is repeated or lost over ten orders of magnitude."""
    values = torch.logspace(-10, 0, 40, dtype=torch.float64)
    rule = quadrature(spectrum_of(values), probes=2, steps=100)
    for nodes in rule.nodes:
        assert len(nodes) == 40
        assert bool(((nodes - values).abs() <= 1e-12).all())
    repeated = torch.cat([torch.zeros(20), torch.full((10,), 1.0), torch.full((10,), 3.0)]).double()
    rule = quadrature(spectrum_of(repeated), probes=400, steps=10)
    assert all(rule.exhausted)
    assert all(len(nodes) == 3 for nodes in rule.nodes)
    # Shares of 1/2, 1/4, 1/4; the share of an eigenspace varies by about 0.1 for one probe, by 0.005 for 400.
    shares = torch.stack(rule.weights).mean(dim=0)
    assert bool(((shares - torch.tensor([0.5, 0.25, 0.25])).abs() < 0.02).all())
    assert rule.quantile(0.4) == pytest.approx(0.0, abs=1e-12)
    assert rule.quantile(0.6) == pytest.approx(1.0)
    assert rule.quantile(0.9) == pytest.approx(3.0)
    assert rule.quantile(1.0) == pytest.approx(3.0)
    grid = torch.tensor([-1.0, 0.5, 2.0, 4.0])
    cumulative = rule.cumulative(grid)
    assert bool(((cumulative - torch.tensor([0.0, 0.5, 0.75, 1.0])).abs() < 0.02).all())


def test_density_is_that_of_the_eigenvalues() -> None:
    values = torch.cat([torch.linspace(0, 1, 150), torch.linspace(3, 3.5, 50)]).double()
    rule = quadrature(spectrum_of(values), probes=24, steps=40)
    grid = torch.linspace(-1.5, 5, 400, dtype=torch.float64)
    sigma = 0.15
    found = rule.density(grid, sigma)
    bumps = torch.exp(-0.5 * ((grid[:, None] - values) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    exact = bumps.mean(dim=1)
    step = float(grid[1] - grid[0])
    assert float(found.sum()) * step == pytest.approx(1.0, abs=1e-6)
    assert float((found - exact).abs().sum()) * step < 0.05  # total variation, of at most 2
    mean, error = rule.moment(1)
    assert_estimate(mean[None], error[None], values.mean()[None], sigmas=4.0)


def test_quadrature_in_single_precision_stops_at_its_rounding() -> None:
    case = mlp()
    single = quadrature(BFK(case.model, case.loss_fn, case.batch, case.layer), probes=2, steps=100)
    double = quadrature(BFK(case.model, case.loss_fn, case.batch, case.layer, dtype=torch.float64), probes=2, steps=100)
    for a, b in zip(single.nodes, double.nodes, strict=True):
        assert len(a) <= 24
        assert float(a[-1]) == pytest.approx(float(b[-1]), rel=1e-5)
        assert float(a[0]) >= -1e-4 * float(a[-1])


# Extreme eigenvalues


@pytest.mark.parametrize("dense_below", [0, 512])
@pytest.mark.parametrize("zeros", [0, 1, 17])
def test_extremes(zeros: int, dense_below: int) -> None:
    values = torch.cat([torch.zeros(zeros), torch.logspace(-2, 1, 60, dtype=torch.float64)])
    found = extremes(spectrum_of(values), dense_below=dense_below)
    assert found.method == ("dense" if dense_below else "lanczos")
    assert found.largest == pytest.approx(10.0, rel=1e-10)
    if zeros:
        assert found.smallest == 0.0
        assert found.condition == math.inf
        assert found.reason is not None
        assert "below the rounding" in found.reason
    else:
        assert found.smallest == pytest.approx(0.01, rel=1e-9)
        assert found.condition == pytest.approx(1000.0, rel=1e-9)
        assert found.reason is None


@pytest.mark.parametrize("dense_below", [0, 512])
def test_extremes_of_a_kernel_of_few_parameters(dense_below: int) -> None:
    case = mlp()
    operator = BFK(
        case.model, case.loss_fn, case.batch, case.layer, parameters=r"blocks\.1$|blocks\.2", dtype=torch.float64
    )
    exact = torch.linalg.eigvalsh(operator.dense())
    found = extremes(operator, dense_below=dense_below)
    assert found.largest == pytest.approx(float(exact[-1]), rel=1e-10)
    few = BFK(
        case.model,
        case.loss_fn,
        case.batch,
        case.layer,
        lr={"0": torch.zeros(8, 5).index_fill(0, torch.tensor([1]), 1.0), "[12]|head": 0.0},
        dtype=torch.float64,
    )
    assert few.rank_bound == 5
    found = extremes(few, dense_below=dense_below)
    assert (found.smallest, found.condition) == (0.0, math.inf)
    assert found.reason == "rank at most 5, the number of parameters, below 24"


def test_extremes_says_what_it_did_not_find() -> None:
    values = torch.linspace(1e-6, 1, 300).double() ** 8 + 1e-9
    found = extremes(spectrum_of(values), dense_below=0, max_iterations=60)
    assert found.largest == pytest.approx(1.0, rel=1e-8)
    hopeless = spectrum_of(torch.cat([torch.linspace(1, 1.001, 300), torch.tensor([2.0])]).double())
    found = extremes(hopeless, dense_below=0, max_iterations=1)
    assert math.isnan(found.smallest)
    assert math.isnan(found.condition)
    assert found.reason is not None
    assert "not found" in found.reason
    zero = extremes(torch.zeros(40, 40), dense_below=0)
    assert (zero.largest, zero.smallest) == (0.0, 0.0)
    assert math.isnan(zero.condition)
    with pytest.raises(ValueError, match="positive semi-definite one, got the eigenvalue -1"):
        extremes(spectrum_of(torch.tensor([-1.0, 1.0, 2.0]).double()))


# Arguments


def test_bad_arguments() -> None:
    matrix = spectrum_of(FLAT)
    for options, message in (
        ({"max_probes": 0}, "max_probes: expected a whole number >= 16, got 0"),
        ({"min_probes": 1}, "min_probes: expected a whole number >= 2"),
        ({"order": 0}, "order: expected a whole number >= 1"),
        ({"order": 5}, "order: expected at most 4, got 5"),
        ({"rtol": -0.1}, "rtol: expected a number >= 0"),
        ({"rtol": float("nan")}, "rtol: expected a number >= 0"),
        ({"sketch": 61}, "sketch: expected at most 60 columns"),
        ({"sketch": -1}, "sketch: expected a whole number >= 0"),
        ({"distribution": "uniform"}, 'expected "rademacher" or "gaussian", got \'uniform\''),
    ):
        with pytest.raises(ValueError, match=message):
            moments(matrix, **options)
    with pytest.raises(TypeError, match="seed: expected a whole number"):
        moments(matrix, seed=0.5)
    for options in ({"probes": 0}, {"steps": 0}, {"steps": 1.5}):
        with pytest.raises(ValueError, match="expected a whole number >= 1"):
            quadrature(matrix, **options)
    rule = quadrature(matrix, probes=1, steps=2)
    for sigma in (0.0, -1.0, float("inf"), "wide"):
        with pytest.raises(ValueError, match="sigma: expected a positive number"):
            rule.density(torch.zeros(2), sigma)
    with pytest.raises(ValueError, match="grid: expected a tensor of one dimension"):
        rule.density(torch.zeros(2, 2), 1.0)
    with pytest.raises(ValueError, match="q: expected a share"):
        rule.quantile(1.5)
    with pytest.raises(ValueError, match="expected moments of order 2 at least, got order 1"):
        _ = moments(matrix, order=1).predicted_cos_angle


def test_bad_operators() -> None:
    for estimator in (moments, quadrature, extremes):
        with pytest.raises(ValueError, match="expected a square operator"):
            estimator(torch.zeros(3, 4))
        with pytest.raises(ValueError, match="expected a square operator"):
            estimator(torch.zeros(0, 0))
        with pytest.raises(ValueError, match="symmetric"):
            estimator(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        with pytest.raises(TypeError, match="got list"):
            estimator([[1.0]])
        with pytest.raises(TypeError, match="expected a real operator, got complex128"):
            estimator(aslinearoperator(np.eye(3, dtype=np.complex128)))
        broken = LinearOperator((4, 4), matvec=lambda x: np.full(4, np.nan), dtype=np.float64)
        with pytest.raises(ValueError, match="expected finite products, got"):
            estimator(broken)


def test_of_the_zero_operator() -> None:
    found = moments(torch.zeros(5, 5))
    assert found.converged
    assert not found.values.any()
    assert bool(found.predicted_cos_angle.isnan())
    rule = quadrature(torch.zeros(5, 5), probes=2)
    assert all(len(nodes) == 1 for nodes in rule.nodes)


def test_tables() -> None:
    found = moments(spectrum_of(FLAT), order=3)
    assert isinstance(found, Moments)
    frame = found.to_frame()
    assert list(frame.columns) == ["order", "value", "error", "trace"]
    assert frame["value"].tolist() == found.values.tolist()
    assert str(found).startswith("M_1 = ")
    rule = quadrature(spectrum_of(FLAT), probes=3, steps=4)
    assert len(rule.to_frame()) == 12
    assert "12 nodes" in str(rule)
    assert "condition number" in str(extremes(spectrum_of(FLAT)))
    assert math.isnan(float(quadrature(spectrum_of(FLAT), probes=1, steps=2).moment(1)[1]))
