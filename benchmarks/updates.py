"""How fast is `optimizer_stats`: all parameters of a model after a step of Adam, against eager torch and torch.compile.

    python -m benchmarks.updates [--device cuda] [--json FILE] [--quick]

Bandwidth counts the bytes of gradient, parameter and both moments, read once. The ceiling is a streaming read of as
many bytes in as many tensors. Sums are checked against float64 before anything is timed. "UpdateMeter" is what a
training loop calls: with the coefficients of every parameter, from its optimizer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastfs
from benchmarks.harness import command_line, median_ratio, print_table, side_by_side, thread_counts, write_json
from fastfs import ops
from fastfs.functional import optimizer_stats
from fastfs.monitor.measure.updates import UpdateMeter
from fastfs.rules import Rule

Tensors = list[Tensor]
CEILING = "streaming read"
OURS = "fastfs"
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01


def transformer_shapes(blocks: int, width: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Parameters of a decoder: embedding, and for every block four weights with biases and two norms."""
    weights = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    block: list[tuple[int, ...]] = []
    for shape in weights:
        block += [shape, (shape[0],)]
    return [(vocabulary, width)] + (block + [(width,)] * 4) * blocks


def by_hand(g: Tensors, w: Tensors, m: Tensors, v: Tensors, c: Tensor) -> Tensor:
    """Eager torch as one writes it, with the multi-tensor functions that optimizers use: (P, 4), float32."""
    decay, scale, r, eps = c[0].tolist()  # one group, one step: the same for all
    denominators = torch._foreach_sqrt(v)
    torch._foreach_mul_(denominators, r)
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(m, denominators)
    torch._foreach_mul_(updates, scale)
    torch._foreach_add_(updates, w, alpha=decay)
    dots = [torch.dot(x.view(-1), y.view(-1)) for x, y in zip(g, updates, strict=True)]
    norms = [torch.stack(list(torch._foreach_norm(x))).square() for x in (updates, g, w)]
    return torch.stack([torch.stack(dots), *norms], dim=1)


def _one(g: Tensor, w: Tensor, m: Tensor, v: Tensor, c: Tensor) -> Tensor:
    dw = c[0] * w + c[1] * m / (c[2] * v.sqrt() + c[3])
    return torch.stack([(g * dw).sum(), (dw * dw).sum(), (g * g).sum(), (w * w).sum()])


def compiled() -> Callable[..., Tensor]:
    """torch.compile of one parameter's sums, called parameter after parameter: one graph per shape."""
    layer = torch.compile(_one, fullgraph=True, dynamic=False)

    def run(g: Tensors, w: Tensors, m: Tensors, v: Tensors, c: Tensor) -> Tensor:
        rows = c.to(g[0].device, torch.float32)
        return torch.stack([layer(*x) for x in zip(g, w, m, v, rows, strict=True)])

    return run


def worst_error(sums: Tensor, truth: Tensor, scale: Tensor) -> float:
    """Largest error, relative to the norms that a sum is made of."""
    return float(((sums[:, :4].double() - truth[:, :4]).abs() / scale).max())


def measure(name: str, shapes: list[tuple[int, ...]], device: torch.device, rounds: int) -> dict[str, Any]:
    """Times one list of parameters: milliseconds, GB/s, ratio to the ceiling and fastfs' gain for every contestant."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = [torch.empty(s, device=device).normal_(generator=generator) for s in shapes]
    for p in parameters:
        p.grad = torch.empty_like(p).normal_(generator=generator)
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    meter = UpdateMeter(optimizer)
    meter.before()
    optimizer.step()
    metered = meter.after().sums
    gradients = [p.grad for p in parameters if p.grad is not None]
    first, second = ([optimizer.state[p][key] for p in parameters] for key in ("exp_avg", "exp_avg_sq"))
    keep = 1 - LR * DECAY
    row = [-LR * DECAY / keep, -LR / (1 - BETAS[0]) / keep, (1 - BETAS[1]) ** -0.5, EPS]
    table = torch.tensor([row] * len(shapes), dtype=torch.float64)
    lists = (gradients, parameters, first, second)
    size = sum(x.numel() * x.element_size() for tensors in lists for x in tensors)

    torch._dynamo.reset()
    inductor = compiled()
    threads = torch.get_num_threads()
    # The streaming read takes three tensors of one shape a layer: of the last list, thirds of each.
    thirds = [x.view(-1)[: x.numel() // 3 * 3].view(3, -1) for x in second]
    reads = ((gradients, parameters, first), tuple([x[i] for x in thirds] for i in range(3)))
    if device.type == "cuda":
        sink = torch.empty((1, 1), dtype=torch.float64, device=device)
        ceiling: Callable[[], object] = lambda: [ops._C.stream_read_cuda(x, sink) for x in reads]  # noqa: E731
    else:
        ceiling = lambda: [ops._C.stream_read_cpu(x, threads) for x in reads]  # noqa: E731

    def meter_call() -> Tensor:
        meter.before()
        return meter.after().sums

    measured: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: optimizer_stats(Rule.ADAM, *lists, table).sums,
        "UpdateMeter": meter_call,
        "torch.compile": lambda: inductor(*lists, table),
        "eager by hand, foreach": lambda: by_hand(*lists, table),
    }
    truth = fastfs.reference.optimizer_stats(Rule.ADAM, *lists, table).sums
    dw, g, w = (truth[:, i].sqrt() for i in (1, 2, 3))
    scale = torch.stack([dw * g, dw * dw, g * g, w * w], dim=1)
    errors = {contestant: worst_error(call(), truth, scale) for contestant, call in measured.items()}
    errors["UpdateMeter"] = max(errors["UpdateMeter"], worst_error(metered, truth, scale))
    if not max(errors[OURS], errors["UpdateMeter"]) <= 2e-6:
        raise AssertionError(f"{name}: fastfs is off by {errors}, allowed is 2e-6")

    times = side_by_side({CEILING: ceiling, **measured}, device, rounds, 5 if device.type == "cuda" else 1)
    rows = [
        {
            "contestant": contestant,
            "milliseconds": round(statistics.median(seconds) * 1e3, 4),
            "GB/s": round(size / statistics.median(seconds) / 1e9, 2),
            "of ceiling": round(median_ratio(times, CEILING, contestant), 3),
            "fastfs is faster by": round(median_ratio(times, contestant, OURS), 2),
            "error": errors.get(contestant),
        }
        for contestant, seconds in times.items()
    ]
    return {
        "workload": name,
        "tensors": len(shapes),
        "threads": threads if device.type == "cpu" else None,
        "bytes": size,
        "rounds": rounds,
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
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
    threads = f", threads: {result['threads']}" if result["threads"] else ""
    title = f"{result['workload']}, {result['tensors']} tensors, {result['bytes'] / 16e6:.1f}M float32{threads}"
    print_table(title, ["", "ms", "GB/s", "of ceiling", "fastfs is faster by", "error"], rows)


def workloads(quick: bool) -> dict[str, list[tuple[int, ...]]]:
    if quick:
        return {"decoder, tiny": transformer_shapes(2, 64, 256)}
    return {"decoder 12 x 512": transformer_shapes(12, 512, 24_000), "300 x 16K": [(16, 1024)] * 300}


def main() -> None:
    arguments = command_line(__doc__, quick="a tiny workload: does the benchmark run")
    device = arguments.device
    results = []
    for name, shapes in workloads(arguments.quick).items():
        for _ in thread_counts(device):
            results.append(measure(name, shapes, device, arguments.rounds))
            show(results[-1])
    if arguments.json:
        write_json(arguments.json, device, results)


if __name__ == "__main__":
    main()
