"""The variants on a GPU: checked against float64 and against the baseline's bits, then timed side by side."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import median_ratio, side_by_side
from benchmarks.ops.workloads import Workload
from benchmarks.tuning.catalogue import BASELINE, Variant
from benchmarks.tuning.library import NAMES, Call, Inputs, Library
from fastfs._bench.expected import sums_and_scale

CEILING = "streaming read"
ALLOWED = 2e-6  # of the sum of the absolute terms
CHUNK, ROW = 16384, 8192  # elements of a chunk of 16 bits, and of the longest row that a warp sums
RUNS = 3  # of a check, which have to give the same bits


@dataclass(frozen=True)
class Layers:
    """What one call measures: layers of these shapes, whole or row by row."""

    workload: Workload
    per_row: bool = False


def workloads(itemsize: int, quick: bool) -> list[Layers]:
    """Those of the table; sizes count the bytes of the three inputs."""

    def one(name: str, size: int) -> Layers:
        return Layers(Workload(name, [(size // (3 * itemsize) // 64 * 64,)]))

    if quick:
        return [one("3 MiB", 3 * 2**20), Layers(Workload("rows of 1024", [(64, 1024)]), per_row=True)]
    rows = [(w, 2**28 // (3 * itemsize * w)) for w in (1024, 4096, 16384)]
    return [
        one("32 MiB", 2**25),
        one("256 MiB", 2**28),
        one("1 GiB", 2**30),
        Layers(Workload("1000 x 64K elements", [(2**16,)] * 1000)),
        *(Layers(Workload(f"256 MiB in rows of {w}", [(n, w)]), per_row=True) for w, n in rows),
    ]


def check_layers(dtype: torch.dtype, device: torch.device) -> list[tuple[Inputs, bool]]:
    """Inputs that meet every path: chunks, tails, another alignment, short and long rows, NaN; on a GPU wide layers."""
    shapes = [[(9 * CHUNK + 11,)], [(3 * CHUNK,)], [(5,), (CHUNK + 1,), (2 * CHUNK,)], [(0,)]]
    if device.type == "cuda":
        shapes += [[(2**24,)], [(2**25 + 1,)], [(2**27 + 5,)]]
    cases: list[tuple[Inputs, bool]] = [(Workload("", list(s)).make(dtype, device), False) for s in shapes]
    by_row = ((300, 40), (40, 600), (40, 1000), (3, 4096), (2, 2 * CHUNK + 8))
    cases += [(Workload("", [s]).make(dtype, device), True) for s in by_row]
    before, after, backward = Workload("", [(CHUNK + 1,)]).make(dtype, device)
    cases.append((([before[0][1:]], [after[0][:-1]], [backward[0][1:]]), False))
    before, after, backward = Workload("", [(5 * CHUNK,)]).make(dtype, device)
    after[0][CHUNK + 3] = math.nan
    cases.append(((before, after, backward), False))
    return cases


def error(sums: Tensor, inputs: Inputs, per_row: bool) -> float:
    """Largest error, relative to the sum of the absolute terms; 0 where a result must not be finite and is not."""
    worst = 0.0
    row = 0
    for layer in zip(*inputs, strict=True):
        parts = zip(*(x.reshape(-1, x.shape[-1]) for x in layer), strict=True) if per_row else [layer]
        for part in parts:
            truth, scale = sums_and_scale(*part)
            found = sums[row, :8]
            good = truth.isfinite()
            if not torch.equal(good, found.isfinite()):
                return math.inf
            worst = max(worst, float((((found - truth).abs() / scale)[good]).max()))
            row += 1
    return worst


def keeps_bits(variant: Variant, dtype: torch.dtype, inputs: Inputs, per_row: bool) -> bool:
    """Must the variant's sums of these inputs be those of the baseline, bit for bit?"""
    if NAMES[dtype] not in variant.only:
        return True
    short = per_row and max(x.shape[-1] for x in inputs[0]) <= ROW
    return variant.same_bits in ("all", "rows" if short else "layers")


def check(variant: Variant, library: Library, baseline: Library, device: torch.device) -> dict[str, Any]:
    """Errors and bits of one variant; raises AssertionError where it breaks a promise."""
    worst, compared = 0.0, 0
    for dtype in NAMES:
        for inputs, per_row in check_layers(dtype, device):
            what = f"{variant.name}, {dtype}, {[tuple(x.shape) for x in inputs[0]]}"
            call = library.prepare(inputs, per_row)
            sums = [call.sums().clone() for _ in range(RUNS)]
            assert int(call.tickets.count_nonzero()) == 0, f"{what}: tickets are not zero again"
            assert all(same(sums[0], other) for other in sums[1:]), f"{what}: other bits in another run"
            found = error(sums[0], inputs, per_row)
            assert found <= ALLOWED, f"{what}: off by {found:.1e}, allowed is {ALLOWED}"
            worst = max(worst, found)
            if keeps_bits(variant, dtype, inputs, per_row):
                assert same(sums[0], baseline.prepare(inputs, per_row).sums()), f"{what}: not the baseline's bits"
                compared += 1
    return {"error": worst, "runs": RUNS, "cases with the baseline's bits": compared}


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, and NaN as NaN."""
    return torch.equal(a.nan_to_num(nan=-12345.0), b.nan_to_num(nan=-12345.0))


def input_sets(layers: Layers, dtype: torch.dtype, device: torch.device, cache: int) -> list[Inputs]:
    """Inputs to take turns with, so that none is in the cache when it comes round: together over four caches."""
    first = layers.workload.make(dtype, device)
    size = sum(x.nbytes for part in first for x in part)
    count = max(2, math.ceil(4 * cache / size) + 1)
    copies = [tuple([x.clone() for x in part] for part in first) for _ in range(count - 1)]
    return [first, *copies]  # type: ignore[list-item]


def timed(
    layers: Layers,
    dtype: torch.dtype,
    variants: list[Variant],
    libraries: dict[str, Library],
    device: torch.device,
    multiprocessors: int,
    cache: int,
    rounds: int,
) -> dict[str, Any]:
    """Times the variants on one workload, beside the streaming read: a row each."""
    sets = input_sets(layers, dtype, device, cache)
    size = sum(x.nbytes for part in sets[0] for x in part)

    def turns(run: Callable[[Call], object], library: Library) -> Callable[[], object]:
        calls = itertools.cycle([library.prepare(inputs, layers.per_row) for inputs in sets])
        return lambda: run(next(calls))

    taking_part = [v for v in variants if v.name == BASELINE or NAMES[dtype] in v.only]
    implementations = {CEILING: turns(lambda call: call.read(multiprocessors), libraries[BASELINE])}
    for v in taking_part:
        implementations[v.name] = turns(lambda call: call.sums(), libraries[v.name])
    expected = libraries[BASELINE].prepare(sets[0], layers.per_row).sums()
    for v in taking_part:
        sums = libraries[v.name].prepare(sets[0], layers.per_row).sums()
        torch.testing.assert_close(sums[:, [1, 2, 3, 5, 8]], expected[:, [1, 2, 3, 5, 8]], rtol=1e-5, atol=0)

    repeat = 2 * len(sets)
    times = side_by_side(implementations, device, rounds, repeat)
    rows = []
    for name in times:
        seconds = statistics.median(times[name])
        rows.append(
            {
                "variant": name,
                "milliseconds": round(seconds * 1e3, 5),
                "GB/s": round(size / seconds / 1e9, 1),
                "of ceiling": round(median_ratio(times, CEILING, name), 4),
                "of baseline": round(median_ratio(times, BASELINE, name), 4),
            }
        )
    return {
        "workload": layers.workload.name,
        "dtype": NAMES[dtype],
        "bytes": size,
        "input sets": len(sets),
        "rounds": rounds,
        "calls per round": repeat,
        "rows": rows,
    }
