"""Assessed updates: exact where they can be, refused where they must be, and never waiting for the device."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.monitor import accuracy, accuracy_networks
from fastfs import feature_stats
from fastfs._monitor.measure.kappa import KAPPA_MAX, TARGET, choose_kappa, first_kappa, largest_kappa, target_for
from fastfs._monitor.measure.trust import assess
from fastfs._monitor.measure.update_estimates import CentralProbe
from fastfs._record.row_reasons import REASONS
from fastfs._stats import FeatureStats

BF16, TF32, SINGLE = 2.0**-7, 2.0**-10, 2.0**-23


def eps_of(value: float, layers: int = 1) -> Tensor:
    return torch.full((layers,), value, dtype=torch.float64)


class Toy:
    """Features f + k d + k^2 c / 2 with noise, of one layer, and their backward vector."""

    def __init__(self, step: float, curvature: float = 0.0, noise: float = 0.0, size: int = 20_000) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.noise = noise
        self.f, d, c, rest = (self.normal(size) for _ in range(4))
        self.d, self.c = step * d, step**2 * curvature * c
        self.b = rest - 0.7 * d
        self.before = self.at(0.0)

    def normal(self, size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def at(self, kappa: float) -> Tensor:
        exact = self.f + kappa * self.d + kappa**2 * self.c / 2
        return exact + self.noise * self.normal(len(exact))

    def stats(self, before: Tensor, after: Tensor) -> FeatureStats:
        return feature_stats([before], [after], [self.b])

    def plain(self) -> FeatureStats:
        return self.stats(self.before, self.at(1.0))

    def probe(self, kappa: float) -> CentralProbe:
        minus, plus = self.at(-kappa), self.at(kappa)
        stats = self.stats(self.before, minus), self.stats(self.before, plus), self.stats(minus, plus)
        return CentralProbe(*stats, torch.tensor(kappa, dtype=torch.float64))

    def truth(self) -> FeatureStats:
        return self.stats(self.f, self.f + self.d + self.c / 2)

    def decrease(self) -> Tensor:
        return -(self.d * self.b).sum().reshape(1)


def off(found: FeatureStats, truth: FeatureStats) -> float:
    """The larger of the relative errors of norm and angle."""
    norm, angle = found.update_norm / truth.update_norm - 1, found.angle / truth.angle - 1
    return float(torch.maximum(norm.abs(), angle.abs()).max())


@pytest.mark.parametrize("kappa", [1.0, 2.0, 8.0])
def test_curvature_of_the_real_step_comes_out(kappa: float) -> None:
    toy = Toy(step=0.02, curvature=3.0)
    found = assess(toy.stats(toy.f, toy.at(1.0)), toy.probe(kappa), eps=eps_of(BF16))
    truth = toy.truth()
    assert found.amplified.all() or kappa == 1.0
    assert float(found.stats.update_dot_backward) == pytest.approx(float(truth.update_dot_backward), rel=1e-9)
    assert float(found.stats.before_dot_update) == pytest.approx(float(truth.before_dot_update), rel=1e-9)
    assert off(found.stats, truth) < 0.005  # the noise that might be there is taken off by half


@pytest.mark.parametrize(("rows", "width", "valid"), [(50.0, 400.0, True), (8.0, 6.0, False), (20_000.0, 1.0, False)])
def test_noise_of_few_entries_does_not_average_out(rows: float, width: float, valid: bool) -> None:
    """All rows share the rounding of the weights, so many rows of a narrow layer are few entries, too."""
    toy = Toy(step=0.1, noise=1e-3)
    shape: dict[str, Any] = {"rows": torch.tensor([rows]).double(), "width": torch.tensor([width]).double()}
    found = assess(toy.plain(), eps=eps_of(BF16), **shape)
    assert bool(found.valid) is valid
    assert bool(found.angle_error > assess(toy.plain(), eps=eps_of(BF16)).angle_error) is not valid


@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4, 1e-5])
def test_noise_is_seen_through(step: float) -> None:
    toy = Toy(step, noise=5e-3)
    kappa = 2.0 ** round(math.log2(TARGET / step))
    plain = assess(toy.plain(), eps=eps_of(BF16))
    found = assess(toy.plain(), toy.probe(kappa), eps=eps_of(BF16), aligned_decrease=toy.decrease())
    assert not plain.valid.any()
    assert REASONS[int(plain.reason)] == "rounding noise"
    assert found.valid.all()
    assert found.amplified.all()
    assert off(found.stats, toy.truth()) < 0.01
    assert off(toy.plain(), toy.truth()) > 0.1
    assert float(found.stats.noise_floor) < 0.2 * step


def test_noise_beyond_the_probe_is_flagged() -> None:
    toy = Toy(1e-4, noise=2e-2)
    found = assess(toy.plain(), toy.probe(512.0), eps=eps_of(BF16), depth=torch.tensor([100.0]).double())
    assert not found.valid.any()
    assert REASONS[int(found.reason)] == "rounding noise"


def test_amplified_too_far_is_flagged() -> None:
    toy = Toy(0.01, noise=1e-2)
    found = assess(toy.plain(), toy.probe(32.0), eps=eps_of(BF16), depth=torch.tensor([100.0]).double())
    assert REASONS[int(found.reason)] == "amplified beyond the linear range"


def test_the_better_of_both_is_taken() -> None:
    toy = Toy(0.2, noise=1e-3)
    found = assess(toy.plain(), toy.probe(2.0), eps=eps_of(BF16))
    assert not found.amplified.any()
    assert found.valid.all()
    assert off(found.stats, toy.truth()) < 0.005


@pytest.mark.parametrize(
    ("eps", "step", "valid"),
    [
        (SINGLE, 1e-5, True),
        (SINGLE, 1e-7, False),
        (TF32, 3e-2, True),
        (TF32, 1e-3, False),
        (BF16, 1e-1, True),
        (BF16, 1e-2, False),
        (2.0**-52, 1e-9, True),
    ],
)
def test_a_plain_replay_is_assessed_by_precision(eps: Any, step: float, valid: bool) -> None:
    toy = Toy(step)
    assert bool(assess(toy.plain(), eps=eps_of(eps)).valid) is valid


@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3, 1e-5])
def test_single_precision_stays_valid_with_a_probe(step: float) -> None:
    toy = Toy(step, curvature=1.0, noise=1e-7)
    kappa = max(1.0, 2.0 ** round(math.log2(TARGET / step)))
    found = assess(toy.plain(), toy.probe(kappa), eps=eps_of(SINGLE), aligned_decrease=toy.decrease())
    assert found.valid.all()
    assert off(found.stats, toy.truth()) < 1e-3


def test_what_cannot_be_assessed() -> None:
    f = torch.randn(4, 100, dtype=torch.float64)
    after = f + torch.randn_like(f)
    after[0, 0] = torch.inf
    after[1] = f[1]
    b = torch.randn_like(f)
    b[2] = 0
    plain = feature_stats(list(f), list(after), list(b))
    found = assess(plain, eps=eps_of(SINGLE, 4))
    expected = ["values that are not finite", "no update of the features", "no backward vector", None]
    assert [REASONS[code] for code in found.reason.tolist()] == expected
    assert found.valid.tolist() == [False, False, False, True]


def test_noise_in_a_layer_below_spoils_those_above() -> None:
    small, large = Toy(1e-3), Toy(0.5)
    layers = FeatureStats(torch.cat([large.plain().sums, small.plain().sums, large.plain().sums]))
    found = assess(layers, eps=eps_of(BF16, 3))
    reasons = [None, "rounding noise", "rounding noise in a layer below"]
    assert [REASONS[code] for code in found.reason.tolist()] == reasons


def test_formula_residual() -> None:
    toy = Toy(1e-3)
    probe, decrease = toy.probe(64.0), toy.decrease()
    assert assess(toy.plain(), probe, eps=eps_of(BF16), aligned_decrease=decrease).valid.all()
    assert assess(toy.plain(), probe, eps=eps_of(BF16), aligned_decrease=decrease * torch.nan).valid.all()
    found = assess(toy.plain(), probe, eps=eps_of(BF16), aligned_decrease=decrease * 1.03)
    assert "Jacobian" in (REASONS[int(found.reason)] or "")


def test_biased_rounding() -> None:
    toy = Toy(1e-3)
    exact = toy.plain().before_sq
    assert assess(toy.plain(), toy.probe(64.0), eps=eps_of(BF16), exact_before_sq=exact).valid.all()
    found = assess(toy.plain(), toy.probe(64.0), eps=eps_of(BF16), exact_before_sq=exact * 1.05)
    assert "biased" in (REASONS[int(found.reason)] or "")


def test_a_frozen_layer_does_not_spoil_those_above() -> None:
    frozen, moving = Toy(0.0), Toy(1e-3, noise=1e-3)

    def both(a: FeatureStats, b: FeatureStats) -> FeatureStats:
        return FeatureStats(torch.cat([a.sums, b.sums]))

    a, b = frozen.probe(64.0), moving.probe(64.0)
    probe = CentralProbe(both(a.minus, b.minus), both(a.plus, b.plus), both(a.central, b.central), a.kappa)
    found = assess(both(frozen.plain(), moving.plain()), probe, eps=eps_of(BF16, 2))
    assert [REASONS[code] for code in found.reason.tolist()] == ["no update of the features", None]


def test_small_angles_need_better_vectors() -> None:
    toy = Toy(1e-3, noise=2e-3)
    toy.b = -toy.d * 1e3 + 0.05 * toy.b
    found = assess(toy.plain(), toy.probe(64.0), eps=eps_of(BF16))
    assert float(found.stats.angle) < 0.1
    assert "angle is too small" in (REASONS[int(found.reason)] or "")


def test_kappa() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    moves = torch.tensor([1e-3, 2e-3, 4e-3], dtype=torch.float64)
    assert float(choose_kappa(one * 16, moves)) == 16.0  # the largest would move by more than 0.12 with 32
    assert float(choose_kappa(one, moves[:1])) == 64.0
    assert float(choose_kappa(one, moves * 100)) == 1.0
    assert float(choose_kappa(one, moves * 1e-6)) == 64.0  # grows by no more at a time
    assert float(choose_kappa(one * 1e4, moves * 1e-9)) == KAPPA_MAX
    odd = torch.tensor([0.0, torch.nan, torch.inf], dtype=torch.float64)
    assert float(choose_kappa(one * 32, odd)) == 32.0
    assert float(choose_kappa(one, torch.cat([odd, moves[:1]]))) == 64.0
    norms = torch.tensor([1.0, 10.0, 0.0])
    assert float(first_kappa(norms * 1e-5, norms)) == 256.0
    assert float(first_kappa(norms * 0, norms)) == 1.0
    assert float(first_kappa(norms, norms)) == 1.0
    assert largest_kappa(BF16) == 2.0**10
    assert largest_kappa(SINGLE) == KAPPA_MAX
    assert float(choose_kappa(one * 512, moves * 1e-6, largest=1024.0)) == 1024.0
    assert target_for(BF16) == TARGET
    assert target_for(2.0**-9) == pytest.approx(TARGET / 2)


def test_nothing_waits_for_the_device() -> None:
    """On the meta device there are no values to wait for: a host branch on one would raise."""
    stats = FeatureStats(torch.empty(3, 9, dtype=torch.float64, device="meta"))
    vector = torch.empty(3, dtype=torch.float64, device="meta")
    kappa = choose_kappa(first_kappa(vector, vector), vector)
    found = assess(stats, CentralProbe(stats, stats, stats, kappa), eps=vector, aligned_decrease=vector)
    assert found.valid.shape == found.reason.shape == found.norm_error.shape == (3,)
    assert assess(stats, eps=vector, depth=vector).valid.is_meta


def test_wrong_shapes() -> None:
    stats = FeatureStats(torch.zeros(3, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"eps: expected shape \(3,\), got \(2,\)"):
        assess(stats, eps=eps_of(BF16, 2))
    with pytest.raises(ValueError, match=r"plus: expected shape \(3,\), got \(1,\)"):
        assess(stats, CentralProbe(stats, stats[:1], stats, torch.tensor(1.0)), eps=eps_of(BF16, 3))
    with pytest.raises(ValueError, match="0-d tensor"):
        assess(stats, CentralProbe(stats, stats, stats, torch.ones(1)), eps=eps_of(BF16, 3))
    with pytest.raises(ValueError, match=r"expected statistics of shape \(L,\)"):
        assess(stats[0], eps=eps_of(BF16, 3))


def test_committed_study() -> None:
    written = json.loads((Path(__file__).parents[2] / "benchmarks/results/accuracy-cpu.json").read_text())
    cells = [dict(zip(written["columns"], values, strict=True)) for values in written["results"]]
    claimed = [cell for cell in cells if cell["method"] in accuracy.CLAIMED]
    assert {cell["setting"] for cell in claimed} == set(accuracy_networks.SETTINGS)
    assert {cell["model"] for cell in claimed} == set(accuracy.NAMES)
    assert {cell["ratio"] for cell in claimed} == set(accuracy.RATIOS)
    assert not any(cell["wrong"] for cell in claimed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", ["autocast bf16", "bf16", "autocast fp16", "autocast bf16 inside", "casts to bf16", "fp8 products"]
)
def test_never_wrong_and_unflagged(setting: str, threads: Any) -> None:
    """A small part of benchmarks/monitor/accuracy.py."""
    threads(1)
    for case in accuracy.cases(quick=True, seed=0):
        for optimizer in ("Adam", "SGD"):
            ratios = (1e-1, 1e-2, 1e-3, 1e-4)
            for cell in accuracy.measure(case, accuracy_networks.SETTINGS[setting], optimizer, ratios):
                if cell["method"] in accuracy.CLAIMED:
                    assert not cell["wrong"], cell
                if cell["method"] == "amplified" and cell["ratio"] >= 1e-3 and setting != "fp8 products":
                    assert cell["valid"] == cell["layers"], cell
