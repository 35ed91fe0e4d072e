"""The paper's figures at small sizes: published numbers and their comparison."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from benchmarks import reproduce as benchmark
from fastfs._reproduce.paper import transformer
from fastfs._reproduce.paper.chains import Chains, Network, Weights
from fastfs._reproduce.paper.drawing import png
from fastfs._reproduce.paper.kernel import dense_kernel, predict, wide_cos_angle
from fastfs._reproduce.paper.published import PUBLISHED, Published, check
from fastfs._reproduce.paper.sensitivity import mlp_sensitivity, resnet_sensitivity
from fastfs._reproduce.paper.spectral import loss_fn, resnet_of
from fastfs._reproduce.paper.studies import STUDIES
from fastfs._reproduce.paper.study import StudySettings, Value, slope
from fastfs.models import Transformer
from fastfs.spectrum import BFK

QUICK = StudySettings(quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_figure_at_small_size_has_the_published_numbers(name: str) -> None:
    study = STUDIES[name]
    done: list[float] = []
    outcome = study.compute(QUICK, done.append)
    checks = check({name: outcome.values}, quick=True)
    failed = [
        f"{c.published.what}: {c.value}, accepted {c.low:.3f} to {c.high:.3f}" for c in checks if c.passed is False
    ]
    assert not failed, "\n".join(failed)
    assert sum(done) == pytest.approx(1.0)
    assert all(math.isfinite(value.mean) for value in outcome.values.values())
    assert png(study.draw(outcome.table)).startswith(b"\x89PNG")


def test_every_published_number_is_compared() -> None:
    # Repeated here to detect errors in the table of published numbers.
    ranges = {(entry.figure, entry.key): (entry.low, entry.high) for entry in PUBLISHED}
    assert len(ranges) == len(PUBLISHED)
    for c, expected in (("0.1", (0.07, 0.08)), ("0.5", (0.34, 0.37)), ("1", (0.65, 0.70)), ("2", (1.04, 1.05))):
        for depth in (30, 100, 500):
            assert ranges["c", f"c={c},L={depth}"] == expected
    assert ranges["b", "mlp,L=100"] == (1.45, 1.45)
    for depth, sensitivity in ((5, 1.6), (10, 2.4), (20, 3.6), (40, 5.3)):
        assert ranges["e", f"mup,L={depth}"] == (sensitivity, sensitivity)
        assert ranges["e", f"ntk,L={depth}"] == (0.1, 0.3)
        assert ranges["e", f"fsc,L={depth}"] == (0.7, 0.9)
    assert ranges["f", "exponent"] == (-1.0, -1.0)
    assert ranges["g", "exponent"] == (-0.5, -0.5)


def test_sensitivity_grows_with_mup_and_nowhere_else() -> None:
    seeds = range(10)
    mlps = mlp_sensitivity((5, 10, 20, 40), 400, seeds, lambda part: None)
    mup, fsc = mlps[:, :, 1].mean(axis=0), mlps[:, :, 2].mean(axis=0)
    assert np.all(mup[1:] / mup[:-1] > 1.25)
    assert 3.0 < mup[-1] / mup[0] < 4.2  # published: 3.3
    assert np.ptp(fsc) < 0.35
    # The networks differ only in the output std: with a residual of 1, mup is sqrt(L) times fsc.
    np.testing.assert_allclose(np.median(mlps[:, :, 1] / mlps[:, :, 2], axis=0), np.sqrt([5, 10, 20, 40]), rtol=0.1)
    residual = resnet_sensitivity((20, 100), 400, seeds, lambda part: None).mean(axis=0)
    np.testing.assert_allclose(residual[1] / residual[0], 1.0, atol=0.15)


# Verdicts


def test_verdicts() -> None:
    entry = Published("a", "x", "a number", 1.0, 2.0, margin=0.1, quick_margin=0.3)

    def verdict(value: Value | None, quick: bool, **changes: float) -> bool | None:
        with pytest.MonkeyPatch.context() as patch:
            changed = dataclasses.replace(entry, **changes)
            patch.setattr("fastfs._reproduce.paper.published.PUBLISHED", (changed,))
            return check({"a": {} if value is None else {"x": value}}, quick=quick)[0].passed

    assert verdict(Value(2.1), False) is True
    assert verdict(Value(2.2), False) is False
    assert verdict(Value(0.85), False) is False
    assert verdict(Value(2.2), True) is True
    assert verdict(Value(2.2, 0.05), False) is True  # two standard errors
    assert verdict(Value(2.25, 0.05), False) is False
    assert verdict(Value(2.2, 0.05), False, errors=0.0) is False
    assert verdict(Value(math.nan), False) is False
    assert verdict(None, True) is None
    with pytest.raises(KeyError, match="figure a has no value 'x'"):
        verdict(None, False)


def test_slope_is_the_exponent_with_its_interval() -> None:
    x = np.geomspace(1, 30, 12)
    exact = slope(x, np.stack([2 * x**-0.5, 5 * x**-0.5]))
    assert exact.mean == pytest.approx(-0.5)
    assert exact.error == pytest.approx(0.0, abs=1e-12)
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        exponents = -1 + 0.1 * generator.standard_normal(6)
        found = slope(x, x[None] ** exponents[:, None])
        inside += abs(found.mean + 1) <= found.error
    assert 180 <= inside <= 198  # 190 expected; 4 standard deviations are 12
    with pytest.raises(ValueError, match="positive"):
        slope(x, -np.ones((2, 12)))


# The kernel


@pytest.mark.parametrize("scale", [0.2, 0.7])
def test_dense_kernel_is_that_of_the_operator(scale: float) -> None:
    weights = Weights.draw([3], 5, 24, 4, dtype=torch.float64)
    network = Network(5, scale)
    chains = Chains.run(weights, [Network(5, 0.5), network], step=1e-6)
    kernel = dense_kernel(weights, chains, network, 1)[0]
    model, x = resnet_of(dataclasses.replace(weights), 0, network)
    model, x = model.double(), x.double()
    with torch.no_grad():  # the model was made in float32
        for block, matrix in zip(model.blocks, weights.hidden[0], strict=True):
            block.linear.weight.copy_(matrix)
        model.stem.weight.copy_(weights.stem[0])
        model.head.weight.copy_(weights.head[0] / 24)
    rates = {rf"^blocks\.{i}\.linear\.weight$": float(chains.rates[i + 1, 0, 1]) for i in range(5)}
    operator = BFK(model, loss_fn, x, "blocks.4", lr=rates, parameters="^blocks").dense()
    torch.testing.assert_close(kernel, operator, rtol=1e-9, atol=1e-10 * float(kernel.abs().max()))
    # The update is -K b, to first order in a step of 1e-6.
    moved = -kernel @ chains.backward[5, 0, 1]
    torch.testing.assert_close(chains.updates[5, 0, 1], moved, rtol=1e-4, atol=1e-4 * float(moved.abs().max()))


def test_prediction_for_infinite_width_is_near_that_of_a_wide_network() -> None:
    networks = [Network(20, 1.0), Network(20, 1 / math.sqrt(20)), Network(20, 0.2 / math.sqrt(20))]
    weights = Weights.draw(range(3), 20, 512, 10)
    chains = Chains.run(weights, networks)
    for n, network in enumerate(networks):
        found = predict(weights, chains, network, n)
        assert float(found.predicted.mean()) == pytest.approx(wide_cos_angle(20, network.branch_scale), abs=0.04)
    assert wide_cos_angle(1000, 1 / math.sqrt(1000)) == pytest.approx(1 / math.sqrt(1 + 2 / 3), abs=1e-3)
    assert wide_cos_angle(1, 0.5) == 1.0


# The transformer


def test_transformer_angles_are_those_of_a_small_real_step() -> None:
    torch.manual_seed(0)
    model = Transformer(vocabulary=16, width=16, depth=3, heads=2, context=8, residual_scale=0.5).double()
    tokens = torch.randint(16, (3, 9))
    batch = tokens[:, :-1], tokens[:, 1:]
    angles = transformer.angles_at_start(model, batch)
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _module, _args, output: seen.append(output)) for block in model.blocks]
    loss = transformer.loss_fn(model, batch)
    parameters = list(model.blocks.parameters())
    found = torch.autograd.grad(loss, [*seen, *parameters])
    backward, gradients = found[:3], found[3:]
    before = [f.detach() for f in seen]
    seen.clear()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 1e-6 * gradient / (len(parameters) * gradient.square().sum())  # type: ignore[misc]
        model(batch[0])
    for hook in hooks:
        hook.remove()
    for angle, f, g, b in zip(angles, before, seen, backward, strict=True):
        df = g - f
        expected = torch.acos(-(df * b).sum() / df.norm() / b.norm())
        assert angle == pytest.approx(float(expected), abs=1e-4)


def test_residual_scale_is_the_size_of_what_the_branches_write() -> None:
    def written(scale: float | None) -> float:
        model = Transformer(
            width=64, depth=2, heads=2, residual_scale=scale, generator=torch.Generator().manual_seed(0)
        )
        return float(model.blocks[0].attention.out.weight.detach().std())

    assert written(1.0) == pytest.approx(1 / 8, rel=0.05)
    assert written(0.1) == pytest.approx(0.1 * written(1.0))
    assert written(None) == pytest.approx(written(0.5))  # 1/sqrt(2 * 2)
    with pytest.raises(ValueError, match="residual_scale must be positive, got -1"):
        Transformer(residual_scale=-1.0)


# The benchmark


def test_the_benchmark_compares_the_same_statistics() -> None:
    for figure in benchmark.figures(quick=True):
        result = benchmark.measured(figure, rounds=1)
        assert result["agreement"]["largest_in_errors"] <= benchmark.AGREE, result
    # Numbers of other networks do not pass.
    steps = benchmark.figures(quick=True)[1].ours(range(3))
    other = benchmark.by_numpy([Network(n.depth, n.branch_scale / 2) for n in steps.networks], 100, 3)
    assert benchmark.gap(steps, other, False)["largest_in_errors"] > benchmark.AGREE
