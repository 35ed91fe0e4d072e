"""The same inputs give the same bits: runs, threads, neighbours, instruction sets, floating-point modes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fastfs import feature_stats, update_stats
from fastfs._core import ops
from tests.helpers.cases import DTYPES, LAYOUTS, inputs, layers, run_apart
from tests.helpers.compare import assert_same

# From tiny to several groups of chunks.
BIG = ((70 * 8192 + 11,), (3, 8193), (1000, 33), (65, 8192), (100,), (), (0, 3), (20_000,))


def everything(f: Any, g: Any, b: Any) -> list[torch.Tensor]:
    rows = feature_stats(f, g, b, per_row=True)
    return [feature_stats(f, g, b).sums, update_stats(f, b).sums, *(r.sums for r in rows)]


def assert_all_same(a: Any, b: Any, what: str = "") -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert_same(x, y, f"{what} result {i}")


def special() -> tuple[list[torch.Tensor], ...]:
    """Tiny, huge, subnormal and non-finite values, spread over chunks."""
    result: tuple[list[Any], ...] = ([], [], [])
    for dtype in DTYPES:
        f, g, b = inputs((3, 20_003), dtype)
        f[0, ::3] = torch.finfo(dtype).tiny / 4
        g[0, ::5] = torch.finfo(dtype).tiny / 8
        b[0, 1::7] = torch.finfo(dtype).tiny / 2
        f[1], g[1], b[1] = (x * 0 + torch.finfo(dtype).tiny / 2 for x in (f[0], g[0], b[0]))
        f[2, 5000], b[2, 17_000] = torch.finfo(dtype).max / 2, torch.nan
        for into, x in zip(result, (f, g, b), strict=True):
            into.append(x)
    return result


def test_run_after_run(device: str) -> None:
    f, g, b = layers(BIG, device=device)
    first = everything(f, g, b)
    for _ in range(5):
        assert_all_same(first, everything(f, g, b))


def test_number_of_threads(threads: Any) -> None:
    f, g, b = (x + y for x, y in zip(layers(BIG), special(), strict=True))
    threads(1)
    one = everything(f, g, b)
    for n in (2, 3, 4, 7):
        threads(n)
        assert_all_same(one, everything(f, g, b), f"{n} threads")


def test_calls_from_several_python_threads() -> None:
    f, g, b = layers(BIG)
    expected = everything(f, g, b)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: everything(f, g, b), range(12)):
            assert_all_same(expected, result)


def test_neighbouring_layers(device: str) -> None:
    f, g, b = layers(BIG, device=device)
    stats, update = feature_stats(f, g, b), update_stats(f, b)
    rows = feature_stats(f, g, b, per_row=True)
    for i, layer in enumerate(zip(f, g, b, strict=True)):
        assert_same(feature_stats(*layer).sums, stats.sums[i], f"layer {i}")
        assert_same(update_stats(layer[0], layer[2]).sums, update.sums[i], f"layer {i}")
        assert_same(feature_stats(*layer, per_row=True).sums, rows[i].sums, f"layer {i}")
        shifted = feature_stats([f[4], *f[i:]], [g[4], *g[i:]], [b[4], *b[i:]])
        assert_same(shifted.sums[1], stats.sums[i], f"layer {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment(dtype: torch.dtype, device: str) -> None:
    for shape in ((1003,), (33, 8200)):
        f, g, b = inputs(shape, dtype, device=device)
        expected = feature_stats(f, g, b)
        for layouts in (("misaligned_by_1",) * 3, ("misaligned_by_3", "contiguous", "misaligned_by_1")):
            moved = (LAYOUTS[layout](x) for x, layout in zip((f, g, b), layouts, strict=True))
            assert_same(feature_stats(*moved).sums, expected.sums, str(layouts))


def test_rows_are_layers(device: str) -> None:
    """A row of a matrix and the same row as a layer of its own, read in place or packed."""
    f, g, b = inputs((20, 20_000), device=device)
    rows = feature_stats(f, g, b, per_row=True)
    alone = feature_stats(list(f), list(g), list(b))
    assert_same(rows.sums, alone.sums)
    wide = (torch.cat([x, x], dim=1)[:, :20_000] for x in (f, g, b))
    assert_same(feature_stats(*wide, per_row=True).sums, rows.sums)


def test_flushing_of_subnormal_numbers(threads: Any) -> None:
    """torch.set_flush_denormal changes the calling thread only: it must not make results depend on threads."""
    f, g, b = (x + y for x, y in zip(special(), layers(BIG), strict=True))
    expected = everything(f, g, b)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        for n in (1, 2):
            threads(n)
            assert_all_same(expected, everything(f, g, b), f"{n} threads")
        assert torch.tensor([1e-310], dtype=torch.float64).mul(1).item() == 0, "flushing was switched off"
    finally:
        torch.set_flush_denormal(False)


FINGERPRINT = """
import hashlib
import torch
from fastfs._core import ops
from tests.core.test_determinism import BIG, everything, special
from tests.helpers.cases import layers
torch.manual_seed(0)
torch.set_num_threads(2)
shapes = BIG + ((1,), (7,), (15,), (17,), (31,), (33,), (8191,), (8193,)) * 4
f, g, b = (x + y for x, y in zip(layers(shapes), special(), strict=True))
data = [x.contiguous().view(torch.int64).flatten().tolist() for x in everything(f, g, b)]
print(ops.build_info()["instruction_set"], *(hashlib.sha256(repr(x).encode()).hexdigest()[:16] for x in data))
"""


def fingerprint(instruction_set: str) -> list[str]:
    return run_apart(FINGERPRINT, FASTFS_CPU=instruction_set).split()


@pytest.mark.slow
def test_instruction_sets() -> None:
    names = ops.build_info()["usable_instruction_sets"]
    expected = None
    for name in names:
        used, *sums = fingerprint(name)
        assert used == name
        expected = expected or sums
        differ = [i for i, (a, b) in enumerate(zip(sums, expected, strict=True)) if a != b]
        assert not differ, f"{name} and {names[0]} differ in results {differ} of {len(sums)}"


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(AssertionError, match="FASTFS_CPU=mmx: expected one of the instruction sets usable here"):
        fingerprint("mmx")
