"""How fast is `fastfs.feature_stats`: against reading the same bytes, eager torch and torch.compile.

    python -m benchmarks.feature_stats [--device cuda] [--json FILE] [--quick]

Bandwidth counts the bytes of the three inputs, read once. The ceiling is a streaming read of the same tensors in the
same run. Every contestant's sums are checked against float64 before it is timed; the error is relative to the sum of
the absolute terms.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastfs
from benchmarks import contestants
from benchmarks.harness import command_line, median_ratio, print_table, side_by_side, thread_counts, write_json
from fastfs import ops

CEILING = "streaming read"
OURS = "fastfs"


@dataclass(frozen=True)
class Workload:
    """Layers of one call: their shapes."""

    name: str
    shapes: list[tuple[int, ...]]

    def make(self, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Features, features after a relative update of 0.1, backward vectors."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.empty(shape, device=device).normal_(generator=generator)

        before, after, backward = [], [], []
        for shape in self.shapes:
            f = normal(shape)
            before.append(f.to(dtype))
            after.append((f + 0.1 * normal(shape)).to(dtype))
            backward.append((1e-3 * normal(shape)).to(dtype))
        return before, after, backward


def transformer_shapes(blocks: int, batch: int, tokens: int, width: int) -> list[tuple[int, ...]]:
    """Outputs of a transformer's attention, MLP hidden layer, MLP and block, for every block."""
    block = [(batch, tokens, width), (batch, tokens, 4 * width), (batch, tokens, width), (batch, tokens, width)]
    return block * blocks


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [Workload("1 x 64K", [(2**16,)]), Workload("transformer, tiny", transformer_shapes(2, 1, 32, 64))]
    return [
        Workload("1 x 64M", [(64 * 2**20,)]),
        Workload("100 x 1M", [(1024, 1024)] * 100),
        Workload("1000 x 16K", [(16, 1024)] * 1000),
        Workload("transformer 12 x 768, 4 x 256 tokens", transformer_shapes(12, 4, 256, 768)),
    ]


def truth_and_scale(before: Tensor, after: Tensor, backward: Tensor) -> tuple[Tensor, Tensor]:
    """The sums in float64 from the reference, and the sums of the absolute terms."""
    stats = fastfs.reference.feature_stats(before, after, backward)
    sums = stats.sums[:8].clone()
    scale = sums.abs()
    scale[0] = sums[5]
    f, g = before.double(), after.double()
    scale[4] = (f * (g - f)).abs().sum()
    return sums, scale.clamp_min(torch.finfo(torch.float64).tiny)


def worst_error(sums: Tensor, inputs: tuple[list[Tensor], list[Tensor], list[Tensor]]) -> float:
    """Largest error over (at most 20 of) the layers and all sums; of seven columns, rounding_sq is the one left out."""
    columns = [0, 1, 2, 3, 4, 5, 7] if sums.shape[1] == 7 else list(range(8))
    worst = 0.0
    for i in range(0, len(inputs[0]), max(1, len(inputs[0]) // 20)):
        truth, scale = truth_and_scale(*(x[i] for x in inputs))
        found = sums[i, : len(columns)].double()
        worst = max(worst, float(((found - truth[columns]).abs() / scale[columns]).max()))
    return worst


def bandwidth(workload: Workload, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    """Times one workload: milliseconds, GB/s, ratio to the ceiling and fastfs' gain for every contestant."""
    inputs = workload.make(dtype, device)
    size = sum(x.numel() * x.element_size() for layers in inputs for x in layers)
    threads = torch.get_num_threads()
    torch._dynamo.reset()
    compiled, compiled_less = contestants.compiled(), contestants.compiled(rounding=False)
    if device.type == "cuda":
        sink = torch.empty((1, 1), dtype=torch.float64, device=device)
        ceiling: Callable[[], object] = lambda: ops._C.stream_read_cuda(inputs, sink)  # noqa: E731
    else:
        ceiling = lambda: ops._C.stream_read_cpu(inputs, threads)  # noqa: E731
    measured: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: fastfs.feature_stats(*inputs).sums,
        "torch.compile": lambda: compiled(*inputs),
        "torch.compile, no rounding_sq": lambda: compiled_less(*inputs),
        "eager by hand": lambda: contestants.by_hand(*inputs),
        "eager (reference)": lambda: fastfs.feature_stats(*inputs, backend="reference").sums,
    }
    if device.type == "cuda":
        measured["eager by hand, foreach"] = lambda: contestants.by_hand_foreach(*inputs)
    errors = {name: worst_error(call(), inputs) for name, call in measured.items()}
    if not errors[OURS] <= 2e-6:
        raise AssertionError(f"{workload.name}, {dtype}: fastfs is off by {errors[OURS]:.1e}, allowed is 2e-6")

    repeat = 5 if device.type == "cuda" else 1
    times = side_by_side({CEILING: ceiling, **measured}, device, rounds, repeat)
    rows = []
    for name in times:
        seconds = statistics.median(times[name])
        rows.append(
            {
                "contestant": name,
                "milliseconds": round(seconds * 1e3, 4),
                "GB/s": round(size / seconds / 1e9, 2),
                "of ceiling": round(median_ratio(times, CEILING, name), 3),
                "fastfs is faster by": round(median_ratio(times, name, OURS), 2),
                "error": errors.get(name),
            }
        )
    return {
        "workload": workload.name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads if device.type == "cpu" else None,
        "bytes": size,
        "rounds": rounds,
        "calls per round": repeat,
        "rows": rows,
    }


def overhead(device: torch.device, rounds: int) -> dict[str, Any]:
    """Microseconds of host time for a call on tiny tensors: one layer, and 100 layers."""
    result: dict[str, Any] = {"workload": "call overhead, 8 x 8 float32", "microseconds": {}}
    for layers in (1, 100):
        x = [torch.randn(8, 8, device=device) for _ in range(layers)]
        arguments = x[0] if layers == 1 else x
        call = lambda a=arguments: fastfs.feature_stats(a, a, a)  # noqa: E731
        repeat = 2000 // layers
        times = side_by_side({OURS: call}, torch.device("cpu"), rounds, repeat)[OURS]
        result["microseconds"][f"{layers} layer" + "s" * (layers > 1)] = round(statistics.median(times) * 1e6, 2)
    return result


def show(result: dict[str, Any]) -> None:
    threads = f", {result['threads']} thread{'s' * (result['threads'] > 1)}" if result["threads"] else ""
    rows = [
        [
            row["contestant"],
            f"{row['milliseconds']:.3f}",
            f"{row['GB/s']:.1f}",
            f"{row['of ceiling']:.2f}",
            f"{row['fastfs is faster by']:.1f}x",
            "" if row["error"] is None else f"{row['error']:.0e}",
        ]
        for row in result["rows"]
    ]
    title = f"{result['workload']}, {result['dtype']}{threads}"
    print_table(title, ["", "ms", "GB/s", "of ceiling", "fastfs is faster by", "error"], rows)


def main() -> None:
    arguments = command_line(__doc__, quick="tiny workloads: does the benchmark run")
    device = arguments.device

    results = [overhead(device, arguments.rounds)]
    print(f"call overhead: {results[0]['microseconds']} (microseconds)")
    for workload in workloads(arguments.quick):
        for dtype in (torch.float32, torch.bfloat16):
            for _ in thread_counts(device):
                results.append(bandwidth(workload, dtype, device, arguments.rounds))
                show(results[-1])
    if arguments.json:
        write_json(arguments.json, device, results)


if __name__ == "__main__":
    main()
