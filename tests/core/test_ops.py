"""The dispatcher ops: opcheck, fake tensors, torch.compile, inference mode, the profiler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastfs import FeatureStats, feature_stats, update_stats
from tests.helpers.cases import SHAPES, inputs, layers
from tests.helpers.compare import assert_same

# torch's own, when its compiler is imported
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

OPS = ("feature_stats", "feature_stats_per_row", "update_stats")


def call(name: str, f: Any, g: Any, b: Any) -> Any:
    op = getattr(torch.ops.fastfs, name)
    return op(f, b) if name == "update_stats" else op(f, g, b)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: Any, requires_grad: bool, device: str) -> None:
    pytest.importorskip("expecttest")
    op = getattr(torch.ops.fastfs, name).default
    samples = [
        layers(((5, 3), (7,), (), (2, 3, 4)), device=device),
        tuple([x] for x in inputs((64, 33), torch.bfloat16, torch.float32, device=device)),
        tuple([x] for x in inputs((8, 9), layouts=("transposed", "contiguous", "padded_rows"), device=device)),
        tuple([x] for x in inputs((0, 3), device=device)),
    ]
    for f, g, b in samples:
        f, g, b = ([x.detach().requires_grad_(requires_grad) for x in part] for part in (f, g, b))
        torch.library.opcheck(op, (f, b) if name == "update_stats" else (f, g, b))


@pytest.mark.parametrize("name", OPS)
def test_fakes_tell_shape_dtype_and_device(name: Any, device: str) -> None:
    f, g, b = layers(device=device)
    real = call(name, f, g, b)
    with FakeTensorMode() as mode:
        fake = call(name, *([mode.from_tensor(x) for x in part] for part in (f, g, b)))
    assert (fake.shape, fake.dtype, fake.device.type, fake.stride()) == (
        real.shape,
        real.dtype,
        real.device.type,
        real.stride(),
    )
    meta = call(name, *([x.to("meta") for x in part] for part in (f, g, b)))
    assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")


def test_fakes_refuse_what_the_op_refuses() -> None:
    f, g, b = inputs((4, 3))
    with FakeTensorMode() as mode:
        f, g, b = (mode.from_tensor(x) for x in (f, g, b))
        with pytest.raises(ValueError, match=r"^layer 1: backward has shape \(3, 4\), expected \(4, 3\)"):
            torch.ops.fastfs.feature_stats([f, f], [g, g], [b, b.T])
        with pytest.raises(ValueError, match=r"after has shape \(2, 3\), expected \(4, 3\)"):
            feature_stats(f, g[:2], b)


def test_fake_tensors_through_the_public_functions() -> None:
    f, g, b = layers(SHAPES[4:])
    with FakeTensorMode() as mode:
        f, g, b = ([mode.from_tensor(x) for x in part] for part in (f, g, b))
        stats = feature_stats(f, g, b)
        assert stats.shape == (len(f),)
        assert stats.angle.shape == (len(f),)
        assert repr(stats).startswith("FeatureStats(shape=")
        assert feature_stats(f[0], g[0], b[0]).shape == ()
        assert len(feature_stats(f, g, b, per_row=True)) == len(f)
        assert update_stats(f, b).shape == (len(f),)


def measure(f: Any, g: Any, b: Any, per_row: Any) -> tuple[Any, ...]:
    """All that a compiled training step might do with the public functions."""
    stats = feature_stats(f, g, b, per_row=per_row)
    update = update_stats(f, b)
    return stats, update, update.angle


def resolved(tensors: Any) -> Any:
    """Inductor itself drops the negative bit of the inputs of a graph, in `x * 2` as well: not a matter of this op."""
    return [x.resolve_neg() for x in tensors]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_in_one_graph_with_the_same_bits(backend: str, device: str) -> None:
    compiled = torch.compile(measure, fullgraph=True, backend=backend)
    one = inputs((64, 33), torch.bfloat16, torch.float32, device=device)
    many = layers(((5, 3), (7,), (), (2, 8, 6, 7), (1, 8193)), device=device)
    if backend == "inductor":
        many = tuple(resolved(x) for x in many)
    for arguments in (one, many):
        for per_row in (False, True):
            stats, update, angle = compiled(*arguments, per_row)  # type: ignore[call-arg]
            expected, expected_update, _ = measure(*arguments, per_row)  # type: ignore[call-arg]
            if isinstance(stats, FeatureStats):
                stats, expected = [stats], [expected]
            for a, b in zip(stats, expected, strict=True):
                assert isinstance(a, FeatureStats)
                assert_same(a.sums, b.sums)
            assert_same(update.sums, expected_update.sums)
            torch.testing.assert_close(angle, expected_update.angle)


def test_compiled_with_changing_sizes() -> None:
    compiled = torch.compile(feature_stats, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (10, 33, 1000):
        one = inputs((n, 7))
        assert_same(compiled(*one).sums, feature_stats(*one).sums)
        many = tuple([x, x[:, 1:]] for x in one)
        for a, b in zip(compiled(*many, per_row=True), feature_stats(*many, per_row=True), strict=True):
            assert_same(a.sums, b.sums)


def test_compiled_with_the_reference() -> None:
    compiled = torch.compile(lambda *x: feature_stats(*x, backend="reference"), fullgraph=True, backend="aot_eager")
    one = inputs((10, 7))
    assert compiled(*one) == feature_stats(*one, backend="reference")


def test_compiled_inside_a_step_with_gradients() -> None:
    f, g, b = (x.requires_grad_() for x in inputs((10, 7)))

    def step(f: Any, g: Any, b: Any) -> tuple[Any, ...]:
        stats = feature_stats(f * 2, g * 2, b)
        return (f * b).sum(), stats

    loss, stats = torch.compile(step, fullgraph=True, backend="aot_eager")(f, g, b)
    assert_same(stats.sums, step(f, g, b)[1].sums)
    assert not stats.sums.requires_grad
    loss.backward()
    assert torch.equal(f.grad, b)


def test_wrong_input_while_compiling_names_the_layer() -> None:
    f, g, b = inputs((4, 3))
    with pytest.raises(Exception, match=r"layer 1: after has shape \(3, 3\), expected \(4, 3\)"):
        torch.compile(feature_stats, fullgraph=True, backend="eager")([f, f], [g, g[1:]], [b, b])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes(mode: Any, device: str) -> None:
    f, g, b = layers(device=device)
    expected = feature_stats(f, g, b)
    with mode():
        f, g, b = ([x.clone() if x.is_contiguous() else x for x in part] for part in (f, g, b))
        stats = feature_stats(f, g, b)
        assert stats.angle.shape == (len(f),)
        assert feature_stats(f, g, b, per_row=True)[3].shape == (1,)
        assert update_stats(f, b).count.sum() == expected.count.sum()
    assert_same(stats.sums, expected.sums)
    assert_same(feature_stats(f, g, b).sums, expected.sums)  # inference tensors, outside


def test_autocast_changes_nothing() -> None:
    f, g, b = inputs((20, 5))
    expected = feature_stats(f, g, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(feature_stats(f, g, b).sums, expected.sums)
        assert feature_stats(f, g, b, backend="reference").angle.dtype == torch.float64


def test_default_dtype_and_device_change_nothing() -> None:
    f, g, b = inputs((20, 5))
    expected = feature_stats(f, g, b), feature_stats([], [], []).sums.device
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(feature_stats(f, g, b).sums, expected[0].sums)
        with torch.device("meta"):
            assert_same(feature_stats(f, g, b).sums, expected[0].sums)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_profiler_shows_the_ops() -> None:
    f, g, b = layers()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        feature_stats(f, g, b)
        feature_stats(f, g, b, per_row=True)
        update_stats(f, b)
    names = {event.key for event in profiler.key_averages()}
    assert {f"fastfs::{name}" for name in OPS} <= names


def test_subclasses_of_tensor() -> None:
    f, g, b = inputs((10, 4))
    expected = feature_stats(f, g, b)

    class Tagged(torch.Tensor):
        pass

    stats = feature_stats(f.as_subclass(Tagged), torch.nn.Parameter(g), torch.nn.Buffer(b))
    assert_same(torch.Tensor(stats.sums) if type(stats.sums) is Tagged else stats.sums, expected.sums)


def test_vmap_is_refused() -> None:
    f, g, b = inputs((6, 10))
    with pytest.raises(RuntimeError, match=r"^Batching rule not implemented for fastfs::feature_stats\."):
        torch.vmap(lambda *x: feature_stats(*x).sums)(f, g, b)


def test_constant_to_the_grad_transforms() -> None:
    f, g, b = inputs((6, 10))
    expected = feature_stats(f, g, b).sums

    def loss(f: Any) -> tuple[Any, ...]:
        sums = feature_stats(f, g, b).sums
        return (f * b).sum() + sums.sum(), sums

    gradient, sums = torch.func.grad(loss, has_aux=True)(f)
    assert_same(sums, expected)
    assert torch.equal(gradient, b)
    sums, tangent = torch.func.jvp(lambda f: feature_stats(f, g, b).sums, (f,), (b,))  # type: ignore[misc]
    assert_same(sums, expected)
    assert not tangent.any()
