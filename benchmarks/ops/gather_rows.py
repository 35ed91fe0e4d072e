"""Benchmark the monitor's row gather (copy, cast and squared norms of some rows) against eager torch.

    python -m benchmarks.ops.gather_rows [--device cuda] [--json FILE] [--quick]

Bandwidth counts the bytes of the kept rows, read once, and those of the copy, written once. The ceiling is torch's copy
(with the cast) of as many contiguous rows, without index or norms. Copies are checked for equality and norms against
float64 before anything is timed. Rows come from memory rather than the cache: calls use different sets of rows (and
copies of small features) round-robin that together exceed the cache.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import command_line, median_ratio, print_table, side_by_side, thread_counts, write_json
from fastfs._bench.comparison import OURS
from fastfs._bench.inputs import RoundRobin, copies_for
from fastfs._bench.machine import cache_bytes

CEILING = "copy of contiguous rows"
SQUARES = "fastfs, squares alone"
EAGER = "eager"


@dataclass(frozen=True)
class Workload:
    """Features of shape (batch, tokens, width), of which `kept` rows are gathered and cast from `dtype` to `to`."""

    shape: tuple[int, ...]
    kept: int
    dtype: torch.dtype
    to: torch.dtype
    transposed: bool = False

    @property
    def name(self) -> str:
        """Description of the workload."""
        cast = f"{self.dtype} to {self.to}".replace("torch.", "")
        layout = ", (batch, width, tokens) in memory" if self.transposed else ""
        return f"{self.kept} rows of {' x '.join(map(str, self.shape))}{layout}, {cast}"

    def make(self, device: torch.device, cache: int) -> list[tuple[Tensor, Tensor]]:
        """Create features and sorted random row indices, in so many sets that the rows exceed the cache."""
        generator = torch.Generator(device).manual_seed(0)
        count = self.shape[0] * self.shape[1]
        sets = copies_for(self.kept * self.shape[2] * self.dtype.itemsize, cache)
        apart = max(1, count // self.kept)  # disjoint sets of rows per tensor
        made: list[tuple[Tensor, Tensor]] = []
        while len(made) < sets:
            x = torch.empty(self.shape, device=device).normal_(generator=generator).to(self.dtype)
            if self.transposed:
                x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
            rows = torch.randperm(count, generator=generator, device=device)
            made += [(x, part.sort().values) for part in rows.split(self.kept)[:apart]]
        return made[:sets]


def workloads(quick: bool) -> list[Workload]:
    """Return all workloads, or two tiny ones."""
    f32, bf16 = torch.float32, torch.bfloat16
    if quick:
        return [Workload((2, 64, 64), 16, bf16, f32), Workload((2, 64, 64), 16, f32, f32, transposed=True)]
    features = (16, 1024, 768)
    wide = (4, 2048, 8192)
    return [
        Workload(features, 256, bf16, bf16),
        Workload(features, 256, bf16, f32),
        Workload(features, 4096, bf16, bf16),
        Workload(features, 4096, bf16, f32),
        Workload(features, 4096, f32, f32),
        Workload(features, 4096, f32, bf16),
        Workload(wide, 1024, bf16, bf16),
        Workload(features, 256, bf16, bf16, transposed=True),
    ]


def eager(x: Tensor, rows: Tensor, to: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gather rows in eager torch."""
    kept = x.flatten(0, -2)[rows]
    return kept.to(to), kept.to(torch.float64).square().sum(dim=1)


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], what: str) -> float:
    """Check a result and return the largest relative error of the norms.

    Raises:
        AssertionError: the copies differ, or a norm is off by more than 2e-6.
    """
    if not torch.equal(found[0], expected[0]):
        raise AssertionError(f"{what}: the copies differ")
    error = float(((found[1] - expected[1]).abs() / expected[1]).max())
    if not error <= 2e-6:
        raise AssertionError(f"{what}: a norm is off by {error:.1e}, allowed is 2e-6")
    return error


def measure(workload: Workload, device: torch.device, rounds: int) -> dict[str, Any]:
    """Time one workload: microseconds, GB/s, fraction of the ceiling and speedup of fastfs per implementation."""
    sets = workload.make(device, cache_bytes(device))
    rotation = RoundRobin(len(sets))
    dims = len(workload.shape) - 1
    ours, squares, to = torch.ops.fastfs.gather_rows, torch.ops.fastfs.row_squares, workload.to
    error = check(ours(*sets[0], dims, to), eager(*sets[0], to), workload.name)
    block = sets[0][0].flatten(0, -2)[: workload.kept]
    blocks = [block.contiguous().clone() for _ in sets]

    def each(call: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
        return rotation.over([functools.partial(call, x, rows) for x, rows in sets])

    calls: dict[str, Callable[[], object]] = {
        CEILING: rotation.over([functools.partial(block.to, to, copy=True) for block in blocks]),
        OURS: each(lambda x, rows: ours(x, rows, dims, to)),
        SQUARES: each(lambda x, rows: squares(x, rows, dims)),
        EAGER: each(lambda x, rows: eager(x, rows, to)),
    }
    repeat = 20
    times = side_by_side(calls, device, rounds, repeat)
    elements = workload.kept * workload.shape[2]
    read, written = elements * workload.dtype.itemsize, elements * to.itemsize
    results = []
    for name in times:
        seconds = statistics.median(times[name])
        size = read if name == SQUARES else read + written
        results.append(
            {
                "implementation": name,
                "microseconds": round(seconds * 1e6, 2),
                "GB/s": round(size / seconds / 1e9, 2),
                "of ceiling": round(median_ratio(times, CEILING, name), 3),
                "fastfs is faster by": round(median_ratio(times, name, OURS), 2),
            }
        )
    return {
        "workload": workload.name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "bytes": read + written,
        "sets of rows": len(sets),
        "error": error,
        "rounds": rounds,
        "calls per round": repeat,
        "rows": results,
    }


def show(result: dict[str, Any]) -> None:
    """Print one table."""
    threads = f", {result['threads']} thread{'s' * (result['threads'] > 1)}" if result["threads"] else ""
    rows = [
        [
            row["implementation"],
            f"{row['microseconds']:.1f}",
            f"{row['GB/s']:.1f}",
            f"{row['of ceiling']:.2f}",
            f"{row['fastfs is faster by']:.1f}x",
        ]
        for row in result["rows"]
    ]
    print_table(f"{result['workload']}{threads}", ["", "us", "GB/s", "of ceiling", "fastfs is faster by"], rows)


def main() -> None:
    """Run the workloads that the command line requests."""
    arguments = command_line(__doc__, quick="tiny workloads, to test the benchmark itself")
    device = arguments.device

    results = []
    for workload in workloads(arguments.quick):
        for _ in thread_counts(device):
            results.append(measure(workload, device, arguments.rounds))
            write_json(arguments.json, device, results)
            show(results[-1])


if __name__ == "__main__":
    main()
