"""The native core on a real GPU. What runs on CPU and GPU alike is in the other tests; here is what only CUDA has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastfs
from benchmarks.ops.graphs import nothing_waits
from fastfs import feature_stats, update_stats
from fastfs._core import ops
from tests.helpers.busy_device import occupied
from tests.helpers.cases import DTYPES, LAYOUTS, SHAPES, inputs, layers
from tests.helpers.compare import assert_close, assert_same, assert_same_kind, feature_truth, update_truth

pytestmark = [
    pytest.mark.gpu,
    # torch's own, when its compiler is imported
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]
BF16 = torch.bfloat16
CHUNK = 8192


def on_gpu(shape: tuple[int, ...], *arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    return inputs(shape, *arguments, device="cuda", **options)


def test_built_for_this_gpu() -> None:
    built = ops.build_info()["cuda"]
    assert built is not None, "the core was built without CUDA"
    assert built["driver"] >= 12000, built
    assert feature_stats(*on_gpu((4,))).sums.is_cuda, f"{torch.cuda.get_device_capability()} with {built}"


@pytest.mark.parametrize("last", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(dtype: torch.dtype, last: torch.dtype) -> None:
    for shape in [*SHAPES, (64 * CHUNK + 4099,), (2 * 64 * CHUNK,)]:
        f, g, b = on_gpu(shape, dtype, last)
        what = f"{shape} {dtype} {last}"
        assert_close(feature_stats(f, g, b).sums, feature_truth(f, g, b), what=what)
        assert_close(feature_stats(f, g, b, per_row=True).sums, feature_truth(f, g, b, per_row=True), what=what)
        assert_close(update_stats(f, b).sums, update_truth(f, b), what=what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_in_place(layout: str, dtype: torch.dtype) -> None:
    for shape in [(3, 1), (5, 8200), (2, 8, 6, 7), (300, 768)]:
        f, g, b = on_gpu(shape, dtype, None, (layout, "contiguous", layout))
        dense = (f.contiguous(), g, b.contiguous())
        for per_row in (False, True):
            got = feature_stats(f, g, b, per_row=per_row).sums
            # Whole layers are read in the order of their memory: one laid out in another order is summed in it.
            if per_row or layout not in ("channels_last", "reversed_dims"):
                assert_same(got, feature_stats(*dense, per_row=per_row).sums, what=f"{layout} {shape} {per_row}")
            assert_close(got, feature_truth(f, g, b, per_row=per_row), what=f"{layout} {shape} {per_row}")


def test_a_large_strided_tensor_is_not_copied() -> None:
    wide = torch.randn(4096, 8192, device="cuda", dtype=BF16)[:, :4096]
    feature_stats(wide, wide, wide)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    feature_stats(wide, wide, wide)
    assert torch.cuda.max_memory_allocated() - before < wide.numel() * wide.element_size() // 8


def test_many_mixed_layers() -> None:
    before, after, backward = layers(SHAPES * 60, device="cuda")
    sums = feature_stats(before, after, backward).sums
    expected = fastfs.reference.feature_stats(before, after, backward).sums
    for i in range(len(before)):
        assert_close(sums[i], feature_truth(before[i], after[i], backward[i]), what=f"layer {i}")
        alone = feature_stats(before[i], after[i], backward[i]).sums
        assert_same(sums[i], alone, what=f"layer {i} alone")
    assert_same_kind(sums, expected)


def test_non_finite_entries() -> None:
    for dtype in DTYPES:
        f, g, b = on_gpu((3, CHUNK + 5), dtype)
        f[0, 0], g[1, 5], b[2, -1] = torch.nan, torch.inf, -torch.inf
        stats = feature_stats(f, g, b)
        assert stats.nonfinite.item() == 3
        assert_same_kind(stats.sums, fastfs.reference.feature_stats(f, g, b).sums, what=str(dtype))
        assert feature_stats(f, g, b, per_row=True).nonfinite.tolist() == [1, 1, 1]


def test_same_bits_run_after_run() -> None:
    layer = on_gpu((3_000_017,), BF16)
    expected = feature_stats(*layer).sums
    neighbour = on_gpu((1000,), torch.float32)
    for _ in range(50):
        assert_same(feature_stats(*layer).sums, expected)
        both = feature_stats(*([x, y] for x, y in zip(neighbour, layer, strict=True))).sums
        assert_same(both[1], expected)


def test_close_to_the_cpu() -> None:
    f, g, b = inputs((100_003,), BF16)
    cpu, gpu = feature_stats(f, g, b).sums, feature_stats(f.cuda(), g.cuda(), b.cuda()).sums
    truth = feature_truth(f, g, b)
    assert_close(cpu, truth)
    assert_close(gpu, truth)


def test_current_stream() -> None:
    f, g, b = on_gpu((1 << 22,), BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        occupied(0.1)
        x, y, z = f * 2, g * 2, b * 2
        got = feature_stats(x, y, z).sums
    # On another stream it would not have waited, and have read x, y, z before they were written.
    stream.synchronize()
    assert_close(got, feature_truth(x, y, z))


def test_two_streams_at_once() -> None:
    first, second = on_gpu((5_000_001,), BF16), on_gpu((5_000_003,), BF16)
    expected = feature_stats(*first).sums, feature_stats(*second).sums
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(40):
        for i, layer in enumerate((first, second)):
            with torch.cuda.stream(streams[i]):
                results[i].append(feature_stats(*layer).sums)
    torch.cuda.synchronize()
    for found, truth in zip(results, expected, strict=True):
        for sums in found:
            assert_same(sums, truth)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_of_the_tensors_not_the_current_one() -> None:
    layer = inputs((100_000,), BF16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    stats = feature_stats(*layer)
    assert stats.sums.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_close(stats.sums, feature_truth(*layer))


def test_no_synchronisation() -> None:
    before, after, backward = layers(SHAPES * 10, device="cuda")
    contiguous = [[x.contiguous() for x in xs] for xs in (before, after, backward)]
    feature_stats(*contiguous)
    with nothing_waits():
        feature_stats(*contiguous)
        feature_stats(*contiguous, per_row=True)
        update_stats(contiguous[0], contiguous[2])
        feature_stats(before, after, backward)


def test_graph_capture_and_replay() -> None:
    layer = on_gpu((64 * CHUNK + 12345,), BF16)
    fresh = on_gpu((64 * CHUNK + 12345,), BF16)
    many = [[x[: 1 + 17 * i] for i in range(120)] for x in layer]
    feature_stats(*layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums, some = feature_stats(*layer).sums, feature_stats(*many).sums
    for _ in range(3):
        for old, new in zip(layer, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        assert_same(sums, feature_stats(*layer).sums)
        assert_same(some, feature_stats(*many).sums)
        fresh = tuple(x.flip(0) for x in fresh)


def test_opcheck() -> None:
    pytest.importorskip("expecttest")
    lists = [[x, y] for x, y in zip(on_gpu((5, 33), BF16), on_gpu((70,)), strict=True)]
    torch.library.opcheck(torch.ops.fastfs.feature_stats.default, tuple(lists))
    torch.library.opcheck(torch.ops.fastfs.feature_stats_per_row.default, tuple(lists))
    torch.library.opcheck(torch.ops.fastfs.update_stats.default, tuple(lists[:2]))


def test_compile() -> None:
    layer = on_gpu((33, 1000), BF16)

    def measure(f: torch.Tensor, g: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return feature_stats(f, g, b).sums

    assert_same(torch.compile(measure, fullgraph=True)(*layer), measure(*layer))


def test_profiler_shows_one_kernel() -> None:
    before, after, backward = ([x[: 1000 * (i + 1)] for i in range(60)] for x in on_gpu((64 * CHUNK,), BF16))
    feature_stats(before, after, backward)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        feature_stats(before, after, backward)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if "segment_sums" in event.name]
    assert len(kernels) == 1, [event.name for event in profile.events()]


def test_more_than_2_to_the_31_elements() -> None:
    count = 2**31 + 12345
    if torch.cuda.mem_get_info()[0] < 3 * 2 * count + 2**30:
        pytest.skip("needs 14 GB of free GPU memory")
    f, g, b = (torch.full((count,), value, device="cuda", dtype=BF16) for value in (1.0, 1.5, 2.0))
    f[-1], g[-1], b[-1] = 3.0, 7.0, 0.5
    n = count - 1
    # update 0.5, backward 2; the spacing of bfloat16 at 1 and 1.5 is 2^-7, at 3 it is 2^-6, at 7 it is 2^-5
    rounding = n * 2 * 2.0**-14 / 12 + (2.0**-12 + 2.0**-10) / 12
    expected = [n + 2.0, n / 4 + 16, 4 * n + 0.25, n + 9.0, n / 2 + 12, n + 2.0, rounding, 0, count]
    got = feature_stats(f, g, b).sums.tolist()
    assert got == pytest.approx(expected, rel=2e-6)
    assert got[-1] == count
    expanded = torch.ones(1, device="cuda", dtype=BF16).expand(count)
    assert feature_stats(expanded, g, b).count.item() == count


def test_stream_read_reads() -> None:
    sink = torch.zeros(1, 1, dtype=torch.float64, device="cuda")
    before, after, backward = ([x] for x in on_gpu((1_000_003,), BF16))
    ops._C.stream_read_cuda((before, after, backward), sink)
    torch.cuda.synchronize()
