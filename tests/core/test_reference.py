"""The specification itself, against extended precision and hand-made values."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

import fastfs
from fastfs import reference
from tests.helpers.cases import DTYPES, LAYOUTS, SHAPES, inputs, layers
from tests.helpers.compare import REFERENCE, assert_close, feature_truth, update_truth


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_exact_for_every_dtype(dtype: torch.dtype, device: str) -> None:
    shapes = ((), (0,), (1,), (1000,), (64, 33), (2, 3, 4, 5))
    for shape, backward_dtype in itertools.product(shapes, DTYPES):
        f, g, b = inputs(shape, dtype, backward_dtype, device=device)
        assert_close(reference.feature_stats(f, g, b).sums, feature_truth(f, g, b), relative=REFERENCE, what=str(shape))
        assert_close(reference.update_stats(f, b).sums, update_truth(f, b), relative=REFERENCE, what=str(shape))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_exact_for_every_layout_and_shape(layout: Any) -> None:
    for i, shape in enumerate(SHAPES):
        f, g, b = inputs(shape, DTYPES[i % 4], torch.float32, (layout,) * 3)
        assert_close(reference.feature_stats(f, g, b).sums, feature_truth(f, g, b), relative=REFERENCE, what=str(shape))
        rows = reference.feature_stats(f, g, b, per_row=True)
        assert_close(rows.sums, feature_truth(f, g, b, per_row=True), relative=REFERENCE, what=str(shape))


def test_a_layer_larger_than_a_slice() -> None:
    f, g, b = inputs((3, reference.SLICE // 2 + 1), torch.float32, torch.bfloat16)
    assert_close(reference.feature_stats(f, g, b).sums, feature_truth(f, g, b), relative=REFERENCE)


def test_layers_of_all_kinds_in_one_call() -> None:
    f, g, b = layers()
    stats = reference.feature_stats(f, g, b)
    rows = reference.feature_stats(f, g, b, per_row=True)
    for i, layer in enumerate(zip(f, g, b, strict=True)):
        assert stats[i] == reference.feature_stats(*layer)
        assert rows[i] == reference.feature_stats(*layer, per_row=True)


def test_hand_made_values() -> None:
    f = torch.tensor([1.0, -2.0, 0.0])
    g = torch.tensor([1.5, -2.0, -1.0])
    b = torch.tensor([2.0, 3.0, 4.0])
    stats = reference.feature_stats(f, g, b)
    assert stats.update_dot_backward == 0.5 * 2 - 1.0 * 4
    assert stats.update_sq == 0.5**2 + 1.0
    assert stats.backward_sq == 4 + 9 + 16
    assert stats.before_sq == 1 + 4
    assert stats.before_dot_update == 0.5
    assert stats.abs_update_dot_backward == 1 + 4
    eps = 2.0**-23
    assert stats.rounding_sq == pytest.approx((1 + 1 + 4 + 4 + 0 + 1) * eps**2 / 12, rel=1e-14)
    assert (stats.nonfinite, stats.count) == (0, 3)
    update = reference.update_stats(f, b)
    assert (update.dot, update.update_sq, update.gradient_sq, update.count) == (-4, 29, 5, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spacing_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    exponents = range(math.frexp(info.tiny)[1], math.frexp(info.max)[1])
    for e in list(exponents)[:: max(1, len(exponents) // 50)]:
        low = torch.tensor(math.ldexp(1.0, e - 1), dtype=dtype)
        above = torch.nextafter(low, torch.tensor(torch.inf, dtype=dtype)) if dtype != torch.float16 else None
        expected = above.double() - low.double() if above is not None else np.spacing(low.numpy()).astype(float)
        top = torch.tensor(math.ldexp(2 - info.eps, e - 1), dtype=dtype)  # the largest number of the same exponent
        assert reference.spacing(low) == expected
        assert reference.spacing(-top) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spacing_at_the_edges(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    spacing = reference.spacing(special)
    assert torch.equal(spacing[:2], torch.zeros(2, dtype=torch.float64))
    assert spacing[2:].isnan().all()
    subnormal = torch.tensor([info.tiny / 2, info.smallest_normal * info.eps], dtype=dtype)
    assert (subnormal > 0).all()
    expected = 2.0**-24 if dtype == torch.float16 else 0.0
    assert (reference.spacing(subnormal) == expected).all()
    assert reference.spacing(torch.tensor(info.tiny, dtype=dtype)) == info.tiny * info.eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_sq_is_what_rounding_adds(dtype: torch.dtype) -> None:
    """f and f' unrelated: their roundings are independent, and |f' - f|^2 grows by rounding_sq on average."""
    f, g = torch.randn(2, 400_000, dtype=torch.float64) * 3
    exact = (g - f).square().sum()
    stats = reference.feature_stats(f.to(dtype), g.to(dtype), f)
    rounding = (f.to(dtype).double() - f).square().sum() + (g.to(dtype).double() - g).square().sum()
    assert stats.rounding_sq == pytest.approx(rounding.item(), rel=0.01)
    # The cross term 2 <g - f, error> has mean 0 and this standard deviation.
    spread = 2 * (exact * rounding / f.numel()).sqrt()
    assert abs(stats.update_sq - exact - rounding) < 4 * spread


def test_nan_and_inf_are_counted_and_propagate(device: str) -> None:
    f, g, b = (x.to(device) for x in inputs((100,)))
    f[3], g[3], g[7], b[9] = torch.nan, torch.inf, -torch.inf, torch.nan
    stats = reference.feature_stats(f, g, b)
    assert stats.nonfinite == 4
    assert stats.count == 100
    for name in ("update_dot_backward", "update_sq", "backward_sq", "before_sq", "before_dot_update", "rounding_sq"):
        assert getattr(stats, name).isnan(), name
    assert reference.update_stats(g, b).nonfinite == 3
    b = torch.ones(100, device=device)
    f, g = torch.zeros(2, 100, device=device)
    g[1] = torch.inf
    stats = reference.feature_stats(f, g, b)
    assert (stats.update_sq, stats.update_dot_backward) == (torch.inf, torch.inf)
    assert stats.before_sq == 0
    assert stats.before_dot_update.isnan()
    assert not stats.rounding_sq.isfinite()


def test_results_are_detached() -> None:
    f, g, b = (x.requires_grad_() for x in inputs((5, 3)))
    for stats in (reference.feature_stats(f, g, b), reference.feature_stats(f, g, b, per_row=True)):
        assert not stats.sums.requires_grad
    assert not reference.update_stats(f, b).sums.requires_grad


@pytest.mark.parametrize("name", ["feature_stats", "update_stats"])
def test_same_signature_as_the_public_function(name: str) -> None:
    public = dict(inspect.signature(getattr(fastfs, name)).parameters)
    del public["backend"]
    twin = inspect.signature(getattr(reference, name)).parameters
    assert [(p.name, p.kind, p.default) for p in public.values()] == [
        (p.name, p.kind, p.default) for p in twin.values()
    ]
