"""Benchmark `optimizer_stats` and `update_stats` against eager torch and torch.compile.

    python -m benchmarks.ops.optimizer_stats [--device cuda] [--json FILE] [--quick]

`optimizer_stats`: all parameters of a model after a step of Adam; the bytes are those of gradient, parameter and both
moments, read once. Training loops call it through UpdateMeter, which also verifies that a step has happened:
`benchmarks.ops.call_cost` times that. `update_stats`: gradients and updates of the same model. The ceiling is a
streaming read of the same tensors. Inputs are several times larger than the cache ("cold" says whether). Sums are
checked against float64 before anything is timed. On a GPU, implementations that launch many kernels are timed as
replayed CUDA graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastfs
from benchmarks.harness import command_line, print_table, side_by_side, thread_counts, write_json
from benchmarks.ops.graphs import as_graphs
from fastfs._bench import ceilings
from fastfs._bench.comparison import COMPILE, EAGER, OURS, attempt, ranking
from fastfs._bench.inputs import COLD, bytes_of
from fastfs._bench.machine import cache_bytes
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._functional import optimizer_stats
from fastfs._monitor.measure.update_meter import UpdateMeter
from fastfs._stats import Stats

SUMS = ("dot", "update_sq", "gradient_sq", "parameter_sq")
Tensors = list[Tensor]
FOREACH = "eager by hand, foreach"
ALLOWED = 2e-6  # permitted error of a sum, relative to the norms of its factors
MOST_SECONDS = 2.0  # largest duration of a call; slower implementations are excluded
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01


def transformer_shapes(blocks: int, width: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Return the parameter shapes of a decoder: the embedding, and per block four weights with biases and two norms."""
    weights = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    block: list[tuple[int, ...]] = []
    for shape in weights:
        block += [shape, (shape[0],)]
    return [(vocabulary, width)] + (block + [(width,)] * 4) * blocks


def by_hand(g: Tensors, w: Tensors, m: Tensors, v: Tensors, c: Tensor) -> Tensor:
    """Compute the sums in eager torch with the multi-tensor functions that optimizers use: (P, 4), float32."""
    decay, scale, r, eps = c[0].tolist()  # one parameter group, one step: the same for all
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
    """Return torch.compile of one parameter's sums, called parameter by parameter: one graph per shape."""
    layer = torch.compile(_one, fullgraph=True, dynamic=False)

    def run(g: Tensors, w: Tensors, m: Tensors, v: Tensors, c: Tensor) -> Tensor:
        return torch.stack([layer(*x) for x in zip(g, w, m, v, c, strict=True)])

    return run


def updates_by_hand(g: Tensors, u: Tensors) -> Tensor:
    """Compute the sums of gradients and updates in eager torch: (P, 3)."""
    dots = [torch.dot(x.view(-1), y.view(-1)) for x, y in zip(g, u, strict=True)]
    norms = [torch.stack(list(torch._foreach_norm(x))).square() for x in (u, g)]
    return torch.stack([torch.stack(dots), *norms], dim=1)


def _two(g: Tensor, u: Tensor) -> Tensor:
    return torch.stack([(g * u).sum(), (u * u).sum(), (g * g).sum()])


def compiled_updates() -> Callable[..., Tensor]:
    """Return torch.compile of one parameter's sums of gradients and updates."""
    layer = torch.compile(_two, fullgraph=True, dynamic=False)
    return lambda g, u: torch.stack([layer(*x) for x in zip(g, u, strict=True)])


def worst_error(sums: Tensor, truth: Stats) -> float:
    """Return the largest error of what all implementations compute, relative to the norms of their factors.

    Args:
        sums: Those of `SUMS` that `truth` has, in this order, or all sums of `truth`.
        truth: The reference.
    """
    names = [name for name in SUMS if name in truth.names]
    if sums.shape[1] == len(truth.names):
        sums = sums[:, [truth.names.index(name) for name in names]]
    expected = torch.stack([getattr(truth, name) for name in names], dim=1)
    scale = expected.clone()
    scale[:, 0] = (expected[:, 1] * expected[:, 2]).sqrt()
    return float(((sums.double() - expected).abs() / scale).max())


def compare(
    what: str,
    name: str,
    lists: Sequence[Tensors],
    measured: dict[str, Callable[[], Tensor]],
    truth: Stats,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """Time the implementations on one list of parameters.

    Raises:
        AssertionError: a sum of fastfs is wrong, or fastfs cannot be called.
    """
    size = bytes_of(lists)
    calls: dict[str, Callable[[], object]] = {
        ceilings.READ: ceilings.streaming_read(ceilings.thirds([x for tensors in lists for x in tensors]))
    }
    about: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for implementation, call in measured.items():
        first, _, why = attempt(call, device, MOST_SECONDS, compiles=implementation == COMPILE)
        ours = implementation == OURS
        if why is not None:
            assert not ours, f"{what}, {name}, {implementation}: {why}"
            left_out[implementation] = why
            continue
        error = worst_error(first, truth)
        if ours and not error <= ALLOWED:
            raise AssertionError(f"{what}, {name}: {implementation} is off by {error:.1e}, allowed is {ALLOWED:.0e}")
        about[implementation] = {"error": error, "timed as": "calls"}
        calls[implementation] = call
        if device.type == "cuda" and not ours:
            (calls[implementation],), about[implementation]["timed as"] = as_graphs([call])
    repeat = 5 if device.type == "cuda" else 1
    times = side_by_side(calls, device, rounds, repeat, 2.0)
    return {
        "op": what,
        "workload": name,
        "tensors": len(lists[0]),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "bytes": size,
        "cold": size >= COLD * cache_bytes(device),
        "rounds": rounds,
        "calls per round": repeat,
        "rows": [{"error": None, **row, **about.get(row["implementation"], {})} for row in ranking(times, size)],
        "left out": left_out,
    }


def measure(name: str, shapes: list[tuple[int, ...]], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Time one list of parameters: the state of the optimizer, and gradients with updates."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = [torch.empty(s, device=device).normal_(generator=generator) for s in shapes]
    for p in parameters:
        p.grad = torch.empty_like(p).normal_(generator=generator)
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    meter = UpdateMeter(optimizer)
    meter.before()
    optimizer.step()
    metered = meter.after().stats.sums
    gradients = [p.grad for p in parameters if p.grad is not None]
    first, second = ([optimizer.state[p][key] for p in parameters] for key in ("exp_avg", "exp_avg_sq"))
    keep = 1 - LR * DECAY
    row = [-LR * DECAY / keep, -LR / (1 - BETAS[0]) / keep, (1 - BETAS[1]) ** -0.5, EPS]
    table = torch.tensor([row] * len(shapes), dtype=torch.float64)
    lists = (gradients, parameters, first, second)

    torch._dynamo.reset()
    inductor, there = compiled(), table.to(device)  # copied once: a graph cannot
    coefficients = there.float()
    truth = fastfs.reference.optimizer_stats(OptimizerRule.ADAM, *lists, table)
    if not worst_error(metered, truth) <= ALLOWED:
        raise AssertionError(f"{name}: UpdateMeter is off by {worst_error(metered, truth):.1e} after a step")
    state = compare(
        "optimizer_stats",
        name,
        lists,
        {
            OURS: lambda: optimizer_stats(OptimizerRule.ADAM, *lists, table).sums,
            COMPILE: lambda: inductor(*lists, coefficients),
            FOREACH: lambda: by_hand(*lists, table),
            EAGER: lambda: optimizer_stats(OptimizerRule.ADAM, *lists, there, backend="reference").sums,
        },
        truth,
        device,
        rounds,
    )
    pair = (gradients, first)  # any tensors can serve as updates
    torch._dynamo.reset()
    inductor = compiled_updates()
    update = functools.partial(fastfs.update_stats, *pair)
    updates = compare(
        "update_stats",
        name,
        pair,
        {
            OURS: lambda: update().sums,
            COMPILE: lambda: inductor(*pair),
            FOREACH: lambda: updates_by_hand(*pair),
            EAGER: lambda: update(backend="reference").sums,
        },
        fastfs.reference.update_stats(*pair),
        device,
        rounds,
    )
    return [state, updates]


def show(result: dict[str, Any]) -> None:
    """Print one table."""
    rows = [
        [
            row["implementation"],
            f"{row['milliseconds']:.3f}",
            f"{row['GB/s']:.1f}",
            f"{row['of ceiling']:.2f}",
            f"{row['fastfs is faster by']:.1f}x",
            "" if row["error"] is None else f"{row['error']:.0e}",
        ]
        for row in result["rows"]
    ]
    threads = f", threads: {result['threads']}" if result["threads"] else ""
    title = (
        f"{result['op']}: {result['workload']}, {result['tensors']} tensors, {result['bytes'] / 1e6:.1f} MB{threads}"
    )
    print_table(title, ["", "ms", "GB/s", "of ceiling", "fastfs is faster by", "error"], rows)
    for implementation, why in result["left out"].items():
        print(f"  {implementation}: {why}")


def workloads(quick: bool, device: torch.device) -> dict[str, list[tuple[int, ...]]]:
    """Return the parameter shapes of each list; the largest list on a GPU only."""
    if quick:
        return {"decoder, tiny": transformer_shapes(2, 64, 256)}
    lists: dict[str, list[tuple[int, ...]]] = {
        "decoder 12 x 512": transformer_shapes(12, 512, 24_000),
        "1000 x 16K": [(16, 1024)] * 1000,
    }
    if device.type == "cuda":
        lists["decoder 16 x 2048"] = transformer_shapes(16, 2048, 32_000)
    return lists


def main() -> None:
    """Run the workloads that the command line requests."""
    arguments = command_line(__doc__, quick="a tiny workload, to test the benchmark itself")
    device = arguments.device
    results: list[dict[str, Any]] = []
    for name, shapes in workloads(arguments.quick, device).items():
        for _ in thread_counts(device):
            measured = measure(name, shapes, device, arguments.rounds)
            results += measured
            write_json(arguments.json, device, results)
            for result in measured:
                show(result)


if __name__ == "__main__":
    main()
