"""FeatureStats and UpdateStats: derived quantities, merging, parts, printing."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfs
from fastfs import FeatureStats, UpdateStats
from fastfs.reference import feature_stats, update_stats
from tests.helpers.cases import inputs


def feature_sums(**values: float) -> FeatureStats:
    return FeatureStats(torch.tensor([float(values.get(name, 0)) for name in FeatureStats.names], dtype=torch.float64))


def update_sums(**values: float) -> UpdateStats:
    return UpdateStats(torch.tensor([float(values.get(name, 0)) for name in UpdateStats.names], dtype=torch.float64))


def some_features(layers: int = 3) -> FeatureStats:
    parts = [inputs((10 + i, 4)) for i in range(layers)]
    found: Any = feature_stats(*(list(x) for x in zip(*parts, strict=True)))
    return found


# Derived quantities


def test_feature_quantities_follow_their_formulas() -> None:
    f, g, b = (x.double() for x in inputs((50, 7)))
    df = g - f
    stats = feature_stats(f, g, b)
    n = f.numel()
    expected = {
        "update_norm": df.norm(),
        "backward_norm": b.norm(),
        "feature_norm": f.norm(),
        "update_rms": df.norm() / n**0.5,
        "backward_rms": b.norm() / n**0.5,
        "feature_rms": f.norm() / n**0.5,
        "relative_update": df.norm() / f.norm(),
        "cos_angle": -(df * b).sum() / (df.norm() * b.norm()),
        "angle": torch.acos(-(df * b).sum() / (df.norm() * b.norm())),
        "radial_update": (f * df).sum() / f.square().sum(),
        "tangential_update": (df - (f * df).sum() / f.square().sum() * f).norm() / f.norm(),
        "dot_conditioning": (df * b).sum().abs() / (df * b).abs().sum(),
        "noise_floor": stats.rounding_sq.sqrt() / f.norm(),
    }
    for name, value in expected.items():
        assert getattr(stats, name) == pytest.approx(value.item(), rel=1e-12), name
    assert stats.valid
    assert {*expected, "valid"} == set(FeatureStats.derived)


def test_update_quantities_follow_their_formulas() -> None:
    g, _, dw = (x.double() for x in inputs((50, 7)))
    stats = update_stats(g, dw)
    cos = -(g * dw).sum() / (g.norm() * dw.norm())
    expected = {
        "aligned_decrease": -(g * dw).sum(),
        "update_norm": dw.norm(),
        "gradient_norm": g.norm(),
        "update_rms": dw.norm() / g.numel() ** 0.5,
        "gradient_rms": g.norm() / g.numel() ** 0.5,
        "cos_angle": cos,
        "angle": cos.acos(),
    }
    for name, value in expected.items():
        assert getattr(stats, name) == pytest.approx(value.item(), rel=1e-12), name
    assert set(expected) == set(UpdateStats.derived)


def test_angle_is_against_the_backward_vector() -> None:
    f, b = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    for update, angle in (([-2, 0], 0), ([2, 0], math.pi), ([0, 3], math.pi / 2), ([-1, 1], math.pi / 4)):
        stats = feature_stats(f, torch.tensor(update, dtype=torch.float64), b)
        assert stats.angle == pytest.approx(angle, abs=1e-7)
        assert stats.cos_angle == pytest.approx(math.cos(angle), abs=1e-15)
    gradient = torch.randn(100, dtype=torch.float64)
    assert update_stats(gradient, -0.1 * gradient).cos_angle == pytest.approx(1, abs=1e-15)


def test_identity_and_feature_speed_formula() -> None:
    """Section 2 at a cut: y = W x, so <b, dy> = <g, dW> = -D for any update, and |dy| = D / (cos |b|)."""
    x, w = torch.randn(20, 30, dtype=torch.float64), torch.randn(40, 30, dtype=torch.float64)
    b = torch.randn(20, 40, dtype=torch.float64)
    gradient = b.T @ x
    update = -0.01 * gradient.sign() - 1e-4 * w  # not plain gradient descent
    features = feature_stats(x @ w.T, x @ (w + update).T, b)
    parameters = update_stats(gradient, update)
    decrease = parameters.aligned_decrease
    assert features.update_dot_backward == pytest.approx(-decrease.item(), rel=1e-10)
    speed = decrease / (features.cos_angle * features.backward_norm)
    assert features.update_norm == pytest.approx(speed.item(), rel=1e-10)


def test_cosine_never_leaves_its_range() -> None:
    over = feature_sums(update_dot_backward=-(1 + 1e-12), update_sq=1, backward_sq=1, count=1)
    assert (over.cos_angle, over.angle) == (1, 0)
    under = update_sums(dot=1 + 1e-12, update_sq=1, gradient_sq=1, count=1)
    assert (under.cos_angle, under.angle) == (-1, math.pi)


@pytest.mark.parametrize("zero", ["update", "backward", "before", "all"])
def test_zero_vectors_give_nan_and_a_flag_and_no_warning(zero: str) -> None:
    f, g, b = inputs((10,))
    if zero in ("update", "all"):
        g = f.clone()
    if zero in ("backward", "all"):
        b = torch.zeros_like(b)
    if zero in ("before", "all"):
        f, g = torch.zeros_like(f), g - f
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = feature_stats(f, g, b)
        values = stats.to_dict()
        repr(stats)
    undefined = zero != "before"
    assert math.isnan(values["angle"]) is undefined
    assert math.isnan(values["cos_angle"]) is undefined
    assert values["valid"] is not undefined
    if zero == "before":
        assert values["relative_update"] == math.inf
    update = update_stats(b, g - f)
    assert update.angle.isnan() == undefined


def test_empty_layers_are_nan_and_invalid() -> None:
    empty = torch.zeros(0, 4)
    stats = feature_stats(empty, empty, empty)
    assert (stats.count, stats.valid) == (0, False)
    assert stats.update_rms.isnan()
    assert stats.angle.isnan()
    assert update_stats(empty, empty).angle.isnan()


def test_overflow_and_underflow_of_squares_give_nan_not_a_wrong_angle() -> None:
    f, b = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for size in (1e200, 1e-200):
        stats = feature_stats(f, -b * size, b)
        assert stats.angle.isnan()
        assert not stats.valid
        assert update_stats(b, -b * size).angle.isnan()


def test_nonfinite_inputs_are_invalid() -> None:
    f, g, b = inputs((10,))
    assert feature_stats(f, g, b).valid
    for x in (f, g, b):
        for bad in (torch.nan, torch.inf):
            keep = x[3].clone()
            x[3] = bad
            stats = feature_stats(f, g, b)
            assert not stats.valid
            assert stats.nonfinite == 1
            x[3] = keep


# The noise floor


FEATURES = {
    "normal": lambda n: torch.randn(n, dtype=torch.float64),
    "relu": lambda n: torch.randn(n, dtype=torch.float64).relu(),
    "log-normal": lambda n: torch.randn(n, dtype=torch.float64).exp(),
    "same size": lambda n: torch.full((n,), 1.9, dtype=torch.float64),
}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_valid_norms_are_right_and_wrong_ones_are_flagged(dtype: torch.dtype, features: Any) -> None:
    """Updates from a tenth down to a hundred thousandth of the features, stored in 16 bits."""
    n = 200_000
    f = FEATURES[features](n)
    direction = torch.randn(n, dtype=torch.float64) * (f != 0)
    b = -direction + torch.randn(n, dtype=torch.float64)
    true_cos = ((direction * -b).sum() / (direction.norm() * b.norm())).item()
    wrong, valid = [], []
    for relative in (1e-1, 3e-2, 1e-2, 5e-3, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5):
        df = direction * (relative * f.norm() / direction.norm())
        stats = fastfs.feature_stats(f.to(dtype), (f + df).to(dtype), b)
        error = abs(stats.update_norm.item() / df.norm().item() - 1)
        if stats.valid:
            valid.append(relative)
            assert error <= 0.02
            assert abs(stats.angle.item() - math.acos(true_cos)) <= 0.02
            assert stats.relative_update > 5 * stats.noise_floor * (1 - 1e-9)
        elif error > 0.02:
            wrong.append(relative)
        # The dot product stays unbiased: within four standard deviations of the noise in it.
        if features != "same size":  # whose roundings are all the same
            noise = 4 * (stats.rounding_sq * stats.backward_sq / n).sqrt() + 0.01 * df.norm() * b.norm()
            assert abs(stats.update_dot_backward - (df * b).sum()) < noise
    assert 1e-1 in valid
    assert 3e-2 in valid
    assert 1e-4 in wrong
    assert 1e-5 in wrong


def test_bfloat16_at_one_thousandth_reads_almost_twice_too_large() -> None:
    """Section 5 of the notes: the reason for the flag."""
    f = torch.randn(400_000, dtype=torch.float64)
    df = 1e-3 * torch.randn(400_000, dtype=torch.float64)
    stats = fastfs.feature_stats(f.bfloat16(), (f + df).bfloat16(), df)
    assert stats.update_norm / df.norm() == pytest.approx(1.9, abs=0.1)
    assert not stats.valid


# Merging


def test_adding_parts_gives_the_whole() -> None:
    f, g, b = inputs((60, 5), torch.float64)
    whole = feature_stats(f, g, b)
    parts = [feature_stats(*p) for p in zip(f.split(17), g.split(17), b.split(17), strict=True)]
    for merged in (sum(parts), parts[0] + parts[1] + parts[2] + parts[3], feature_stats(f, g, b, per_row=True).total()):
        assert isinstance(merged, FeatureStats)
        torch.testing.assert_close(merged.sums, whole.sums, rtol=1e-13, atol=1e-13)
        assert merged.count == 300
    assert sum(update_stats(*p) for p in zip(f.split(17), b.split(17), strict=True)).count == 300


def test_adding_makes_a_new_object() -> None:
    a, b = some_features(), some_features()
    old = a.sums.clone()
    merged = a + b
    merged.sums.zero_()
    assert torch.equal(a.sums, old)
    a += b
    assert torch.equal(a.sums, old + b.sums)


def test_adding_different_things_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"FeatureStats of shape \(2,\) to FeatureStats of shape \(3,\)"):
        some_features(3) + some_features(2)
    with pytest.raises(ValueError, match=r"shape \(3,\) to FeatureStats of shape \(\)"):
        some_features(3).total() + some_features(3)
    for other in (update_sums(dot=1), 1, 0.5, None, torch.zeros(9)):
        with pytest.raises(TypeError):
            feature_sums() + other


def test_total_is_the_sum_over_layers() -> None:
    stats = some_features(4)
    assert stats.total().shape == ()
    torch.testing.assert_close(stats.total().sums, stats.sums.sum(0))
    assert stats[0].total() == stats[0]


# Parts and comparison


def test_indexing_and_iteration() -> None:
    stats = some_features(4)
    assert (stats.shape, len(stats), stats[1].shape) == ((4,), 4, ())
    assert stats[1:3].shape == (2,)
    assert stats[-1] == stats[3]
    assert stats[torch.tensor([True, False, True, False])].shape == (2,)
    assert stats[[3, 0]][1] == stats[0]
    assert stats[...] == stats
    assert stats[None].shape == (1, 4)
    assert [one.shape for one in stats] == [()] * 4
    assert torch.equal(stats[2].update_sq, stats.update_sq[2])
    grid = FeatureStats(torch.stack([stats.sums, stats.sums]))
    assert grid.shape == (2, 4)
    assert grid[1, 2] == stats[2]
    assert grid[..., 2].shape == (2,)
    for bad in (4, (0, 0), (0, 0, 0)):
        with pytest.raises(IndexError):
            stats[bad]
    with pytest.raises(IndexError):
        stats[0][0]
    with pytest.raises(TypeError, match=r"shape \(\) has no len"):
        len(stats[0])
    with pytest.raises(TypeError):
        list(stats[0])


def test_equality() -> None:
    a = some_features()
    assert a == a.clone()
    assert a != a[:2]
    assert a != feature_sums()
    assert a != "a"
    assert feature_sums(update_sq=math.nan) == feature_sums(update_sq=math.nan)
    assert feature_sums(update_sq=1) != feature_sums(update_sq=1 + 1e-15)
    with pytest.raises(TypeError):
        hash(a)


def test_copies_share_no_memory() -> None:
    a = some_features()
    for other in (a.clone(), copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert a == other
        other.sums.zero_()
        assert a != other


def test_to_device(device: str) -> None:
    moved = some_features().to(device)
    assert moved.device.type == device
    assert moved.to("cpu").valid.tolist() == [True] * 3


def test_dtypes() -> None:
    stats = some_features()
    assert {stats.nonfinite.dtype, stats.count.dtype} == {torch.int64}
    assert stats.valid.dtype == torch.bool
    for name in (*FeatureStats.names[:-2], *FeatureStats.derived[:-1]):
        assert getattr(stats, name).dtype == torch.float64, name
        assert getattr(stats, name).shape == (3,), name


@pytest.mark.parametrize("sums", [torch.zeros(9), torch.zeros(8).double(), torch.tensor(1.0).double()], ids=repr)
def test_wrong_sums_are_refused(sums: Any) -> None:
    with pytest.raises(ValueError, match=r"FeatureStats: expected a float64 tensor of shape \(..., 9\)"):
        FeatureStats(sums)
    with pytest.raises(ValueError, match=r"UpdateStats: expected a float64 tensor of shape \(..., 5\)"):
        UpdateStats(sums)


# Reading


def test_to_dict_is_plain_and_complete() -> None:
    stats = some_features(2)
    values = stats.to_dict()
    assert list(values) == [*FeatureStats.names, *FeatureStats.derived]
    assert json.loads(json.dumps(values)) == values
    assert {type(v) for v in values["count"]} == {int}
    assert {type(v) for v in values["valid"]} == {bool}
    assert {type(v) for v in values["angle"]} == {float}
    one = stats[0].to_dict()
    assert all(isinstance(v, int | float | bool) for v in one.values())
    assert one["angle"] == values["angle"][0]
    assert set(update_sums(dot=1).to_dict()) == {*UpdateStats.names, *UpdateStats.derived}


def test_repr_is_a_table() -> None:
    stats = some_features(3)
    lines = repr(stats).splitlines()
    assert lines[0] == "FeatureStats(shape=(3,), device=cpu)"
    assert "angle" in lines[1]
    assert "valid" in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2"]
    assert f"{stats.angle[1].item():.4g}" in lines[3]
    assert " yes " in lines[3]
    assert len({len(line) for line in lines[1:]}) == 1
    assert len(repr(stats[0]).splitlines()) == 3
    assert len(repr(stats[:0]).splitlines()) == 2
    assert "1,2" in repr(FeatureStats(torch.stack([stats.sums, stats.sums])))
    assert "aligned_decrease" in repr(update_sums(dot=1, count=1))


def test_repr_of_many_layers_is_short() -> None:
    stats = FeatureStats(torch.zeros(10_000, 9, dtype=torch.float64))
    text = repr(stats)
    assert len(text.splitlines()) < 60
    assert "..." in text
    assert "9999" in text


def test_default_device_does_not_matter() -> None:
    stats = fastfs.feature_stats(torch.ones(3, 4), torch.zeros(3, 4), torch.ones(3, 4))
    text = repr(stats)
    with torch.device("meta"):
        assert repr(stats) == text
        assert fastfs.feature_stats([], [], []).device == torch.device("cpu")


def test_repr_without_data() -> None:
    assert repr(FeatureStats(torch.zeros(2, 9, dtype=torch.float64, device="meta"))) == (
        "FeatureStats(shape=(2,), device=meta)"
    )
    with FakeTensorMode():
        assert repr(FeatureStats(torch.zeros(2, 9, dtype=torch.float64))) == "FeatureStats(shape=(2,), device=cpu)"
