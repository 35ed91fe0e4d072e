"""The public measurements: native against the truth, over dtypes, shapes, layouts and sizes."""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastfs import feature_stats, reference, update_stats
from fastfs._core import ops
from tests.helpers.cases import DTYPES, LARGE, LAYOUTS, SHAPES, inputs, layers, run_apart
from tests.helpers.compare import assert_close, assert_same, assert_same_kind, feature_truth, update_truth


def check_layer(f: Any, g: Any, b: Any, what: str = "") -> None:
    """Whole layer, rows and update sums of one layer against the truth."""
    what = f"{what} {tuple(f.shape)} {f.dtype} {b.dtype} strides {f.stride()} {g.stride()} {b.stride()}"
    assert_close(feature_stats(f, g, b).sums, feature_truth(f, g, b), what=what)
    rows = feature_stats(f, g, b, per_row=True)
    assert_close(rows.sums, feature_truth(f, g, b, per_row=True), what=f"rows {what}")
    assert_close(update_stats(f, b).sums, update_truth(f, b), what=f"update {what}")


def test_native_core_is_in_use() -> None:
    """Without the native core these tests would test the reference against itself."""
    assert ops.native_available(), ops.why_not_native()


def test_spacing_of_every_float16_number() -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    zero = torch.zeros(2**15 * 2, 1, dtype=torch.float16)
    for wide in (1, 40):  # a number on its own, and in whole vectors
        values = x[:, None].expand(-1, wide).contiguous()
        sums = feature_stats(values, zero.expand_as(values), zero.expand_as(values), per_row=True).sums
        expected = reference.spacing(x).square() / 12 * wide
        torch.testing.assert_close(sums[:, 6], expected, rtol=1e-14, atol=0, equal_nan=True)


# Dtypes, shapes, layouts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape(dtype: torch.dtype, device: str) -> None:
    for i, shape in enumerate(SHAPES):
        for backward_dtype in (dtype, DTYPES[i % 4]):
            check_layer(*inputs(shape, dtype, backward_dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_groups_of_chunks(dtype: torch.dtype, device: str) -> None:
    f, g, b = inputs(LARGE[0], dtype, device=device)
    assert_close(feature_stats(f, g, b).sums, feature_truth(f, g, b))
    assert_close(update_stats(f, b).sums, update_truth(f, b))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: Any, device: str) -> None:
    for i, shape in enumerate(SHAPES):
        check_layer(*inputs(shape, DTYPES[i % 4], DTYPES[(i + i // 4) % 4], (layout,) * 3, device=device), layout)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 33), (5, 8200), (2, 8, 6, 7)], ids=str)
def test_mixed_layouts(shape: tuple[Any, ...], device: str) -> None:
    every = 29 if torch.Size(shape).numel() < 10_000 else 151
    for i, names in enumerate(itertools.permutations(LAYOUTS, 3)):
        if i % every == 0:
            check_layer(*inputs(shape, DTYPES[i % 4], DTYPES[i // every % 4], names, device=device), str(names))


def test_all_kinds_of_layers_in_one_call(device: str) -> None:
    f, g, b = layers(device=device)
    stats, rows, update = feature_stats(f, g, b), feature_stats(f, g, b, per_row=True), update_stats(f, b)
    assert stats.shape == update.shape == (len(f),)
    for i, layer in enumerate(zip(f, g, b, strict=True)):
        assert_close(stats[i].sums, feature_truth(*layer), what=f"layer {i}")
        assert_close(rows[i].sums, feature_truth(*layer, per_row=True), what=f"layer {i}")
        assert_close(update[i].sums, update_truth(layer[0], layer[2]), what=f"layer {i}")


def test_many_dimensions(device: str) -> None:
    f, g, b = inputs((2,) * 16, device=device)
    check_layer(f, g.permute(*range(15, -1, -1)), b)
    f, g, b = inputs((2,) * 17, device=device)
    g = g.permute(*range(16, -1, -1))
    if device == "cpu":  # more than 16 dimensions that cannot be merged
        with pytest.raises(ValueError, match=r"^layer 0: expected at most 16 dimensions"):
            feature_stats(f, g, b)
    f, g = f.contiguous(), g.contiguous()
    assert_close(feature_stats(f, g, b).sums, feature_truth(f, g, b))
    g = g.transpose(0, 1).contiguous().transpose(0, 1)  # three dimensions after merging
    assert_close(feature_stats(f, g, b).sums, feature_truth(f, g, b))


@st.composite
def random_layers(draw: Any) -> Any:
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=4)))
    names = tuple(draw(st.sampled_from(list(LAYOUTS))) for _ in range(3))
    dtype, backward_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return inputs(shape, dtype, backward_dtype, names, step=draw(st.sampled_from([1e-3, 0.1, 10.0])))


@given(random_layers())
def test_random_layers(layer: Any) -> None:
    check_layer(*layer)


@st.composite
def random_strides(draw: Any) -> tuple[Any, ...]:
    """Any non-negative strides over a small buffer: permuted, overlapping, expanded."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 2**31)))

    def tensor() -> torch.Tensor:
        strides = tuple(draw(st.integers(0, 30)) for _ in shape)
        offset = draw(st.integers(0, 7))
        size = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        return torch.randn(size).to(dtype).as_strided(shape, strides, offset)

    return tensor(), tensor(), tensor()


@given(random_strides())
def test_random_strides(layer: Any) -> None:
    check_layer(*layer)


# Values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-20, 1e-18, 1e10, 1e18, 1e36])
def test_any_scale(dtype: torch.dtype, scale: float, device: str) -> None:
    """Squares far beyond the range of float."""
    for shape in ((3,), (1001,), (3, 8193)):
        check_layer(*inputs(shape, dtype, scale=scale, device=device), f"scale {scale}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_and_smallest_numbers(dtype: torch.dtype, device: str) -> None:
    info = torch.finfo(dtype)
    values = [info.max, info.max / 3, info.tiny, info.tiny * info.eps, info.tiny / 3, 1.0, 0.0, -0.0]
    if dtype == torch.float64:
        values[:2] = [1e150, 1e140]
    f = torch.tensor(values * 20, dtype=dtype, device=device)
    check_layer(f, f / 2, f.roll(1))
    check_layer(f, f, f)
    check_layer(f[f.abs() < 0.5], f[f.abs() < 0.5] * 0, f[f.abs() < 0.5])


def test_scales_mixed_within_a_chunk(device: str) -> None:
    exponents = torch.linspace(-40, 37, 20_011)
    f, g, b = inputs((20_011,), torch.float32)
    size = 10.0**exponents
    check_layer(*(x.to(device) for x in (f * size, g * size, b * size.flip(0))), "products of large and small")  # type: ignore[call-arg]
    check_layer(*(x.to(device) for x in (f * size, g * size, b * size)), "sorted by size")  # type: ignore[call-arg]


def test_large_layers_are_as_accurate_as_small_ones(device: str) -> None:
    """A mean far from zero, where a running sum in float loses digits."""
    n = 3_000_001
    f = torch.full((n,), 1.0, device=device)
    g = f + torch.linspace(0.1, 0.3, n, device=device)
    stats = feature_stats(f, g, f).to("cpu")
    df = g.double() - 1
    assert stats.before_sq == n
    assert stats.update_sq == pytest.approx(df.square().sum().item(), rel=2e-6)
    assert stats.update_dot_backward == pytest.approx(df.sum().item(), rel=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_entries_are_counted_and_propagate(dtype: torch.dtype, device: str) -> None:
    for shape in ((40,), (5, 8200), (3, 70)):
        for trial in range(8):
            f, g, b = inputs(shape, dtype, device=device)
            for x, bad in zip((f, g, b), (torch.nan, torch.inf, -torch.inf), strict=True):
                if trial & 4:  # one input only
                    x = (f, g, b)[trial % 3]
                at = torch.randint(0, x.numel(), (trial % 4 + (not trial & 4),))
                x.view(-1)[at.to(device)] = bad
            what = f"{shape} trial {trial}"
            count = sum((~x.isfinite()).sum() for x in (f, g, b))
            stats, expected = feature_stats(f, g, b), reference.feature_stats(f, g, b)
            assert stats.nonfinite == count, what
            assert_same_kind(stats.sums, expected.sums, what)
            rows = feature_stats(f, g, b, per_row=True)
            assert_same_kind(rows.sums, reference.feature_stats(f, g, b, per_row=True).sums, what)
            assert_same_kind(update_stats(f, b).sums, reference.update_stats(f, b).sums, what)


def test_nonfinite_entries_leave_the_other_sums_and_layers_alone(device: str) -> None:
    f, g, b = inputs((20_000,), device=device)
    clean = feature_stats(f, g, b)
    spoiled = b.clone()
    spoiled[11_111] = torch.nan
    stats = feature_stats([f, f], [g, g], [spoiled, b])
    for name in ("update_sq", "before_sq", "before_dot_update", "rounding_sq"):
        assert getattr(stats[0], name).item() == pytest.approx(getattr(clean, name).item(), rel=4e-6)
    assert stats[0].backward_sq.isnan()
    assert stats[0].update_dot_backward.isnan()
    assert_same(stats[1].sums, clean.sums)


def test_overflow_in_double_is_that_of_the_reference(device: str) -> None:
    f, g, b = inputs((100,), torch.float64, scale=1e200, device=device)
    stats, expected = feature_stats(f, g, b), reference.feature_stats(f, g, b)
    assert_same_kind(stats.sums, expected.sums)
    assert stats.update_sq == torch.inf
    assert not stats.valid
    assert stats.nonfinite == 0


# Invariances


def test_layers_may_come_in_any_order() -> None:
    f, g, b = layers()
    stats = feature_stats(f, g, b)
    order = torch.randperm(len(f)).tolist()
    shuffled = feature_stats(*([x[i] for i in order] for x in (f, g, b)))
    assert_same(shuffled.sums, stats.sums[order])


def test_scaling_by_a_power_of_two_is_exact() -> None:
    f, g, b = inputs((20_011,))
    stats, scaled = feature_stats(f, g, b), feature_stats(f * 4, g * 4, b / 8)
    factors = torch.tensor([0.5, 16, 1 / 64, 16, 16, 0.5, 16, 1, 1], dtype=torch.float64)
    assert_same(scaled.sums, stats.sums * factors)
    assert_same(feature_stats(-f, -g, b).sums[1:5], stats.sums[1:5])


def test_shifting_the_features_keeps_the_update() -> None:
    f, g = torch.randint(-50, 50, (2, 5000)).float()
    b = torch.randn(5000)
    stats, shifted = feature_stats(f, g, b), feature_stats(f + 64, g + 64, b)
    assert_same(shifted.sums[[0, 1, 2, 5]], stats.sums[[0, 1, 2, 5]])
    assert shifted.before_sq != stats.before_sq


def test_parts_add_up_to_the_whole() -> None:
    f, g, b = inputs((501, 33), torch.float32, torch.bfloat16)
    truth = feature_truth(f, g, b)
    parts = zip(f.split(100), g.split(100), b.split(100), strict=True)
    assert_close(sum(feature_stats(*part) for part in parts).sums, truth)
    assert_close(feature_stats(f, g, b, per_row=True).total().sums, truth)
    assert_close(feature_stats(f.split(100), g.split(100), b.split(100)).total().sums, truth)


# Size


def test_thousands_of_layers(device: str) -> None:
    f, g, b = inputs((5000, 7), device=device)
    stats = feature_stats(list(f), list(g), list(b))
    assert stats.shape == (5000,)
    assert_close(stats.sums, feature_truth(f, g, b, per_row=True))
    assert_close(update_stats(list(f), list(b))[4999].sums, update_truth(f[4999], b[4999]))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2**31 + 5,), (2**19 + 1, 4096)], ids=str)
def test_more_than_2_to_the_31_elements(shape: tuple[Any, ...]) -> None:
    """Stride 0 in every dimension, or in that of the rows: no memory behind it."""
    n = torch.Size(shape).numel()
    row = torch.ones(shape[1:], dtype=torch.bfloat16)
    f, g, b = ((row * value).expand(shape) for value in (1.0, 1.5, -2.0))
    start = time.perf_counter()
    stats = feature_stats(f, g, b)
    assert time.perf_counter() - start < 20
    assert stats.count == n
    assert stats.nonfinite == 0
    assert stats.sums[:6].tolist() == [-1.0 * n, 0.25 * n, 4.0 * n, n, 0.5 * n, n]
    assert stats.rounding_sq == pytest.approx(n * 2**-14 / 6, rel=1e-6)
    assert stats.angle == pytest.approx(0, abs=1e-7)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory the Linux way")
@pytest.mark.parametrize(
    "view",
    ["x[:, :2000]", "x[:, 1:]", "x[::2]", "x[:, ::2]", "x.T", "x[:, None, :].expand(-1, 3, -1)"],
)
def test_strided_tensors_are_read_in_place(view: str) -> None:
    """Three tensors of 64 MB; a copy of one would show in the peak memory. `x.T` lies beside contiguous ones."""
    output = run_apart(
        f"""
        import resource, torch, fastfs
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        def view(x):
            return {view}
        small = torch.ones(64, 2048)
        fastfs.feature_stats(view(small), view(small), view(small))
        tensors = [torch.full((8192, 2048), float(i)) for i in range(3)]
        f, g, b = map(view, tensors)
        if "{view}" == "x.T":
            g, b = g.reshape(-1)[: g.numel()].view(g.shape), b
        before = peak()
        stats = fastfs.feature_stats(f, g, b)
        assert stats.count == f.numel()
        assert stats.update_sq == f.numel() and stats.backward_sq == 4 * f.numel()
        print(peak() - before)
        """
    )
    assert float(output) < 16, f"{view}: {output} MB more"
