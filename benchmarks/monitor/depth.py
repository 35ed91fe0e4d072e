"""Measure the cost of a measured step over the depth of the model, and the share of the structure analysis in it.

    python -m benchmarks.monitor.depth [--json FILE] [--rounds N] [--quick]

Chains and residual networks of linear layers, every layer watched, SGD, `every=1`: the most expensive case, in which a
layer does little work of its own. The first measured step analyses the structure; later ones have the same graph. The
structure's share is the time in `trace`, `join`, `analyse` and `signature`, wherever they are called.

Times are processor seconds of one thread, so that other load on the machine has little effect.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastfs
from benchmarks.harness import command_line, print_table, write_json
from fastfs._network import structure
from fastfs._network.structure import analyse, edge_of, join, signature, trace

ROWS = 64
OF_STRUCTURE = (trace, join, analyse, signature)


@dataclass(frozen=True)
class Workload:
    kind: str
    depth: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.depth} x {self.width}"


class Network(nn.Module):
    """Linear layers in sequence or each in a residual branch, initialized to the identity."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(workload.width, workload.width) for _ in range(workload.depth))
        self.residual = workload.kind == "residual"
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.eye_(layer.weight)
            with torch.no_grad():
                layer.weight.mul_(1e-3 if self.residual else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) if self.residual else layer(x)
        return x


class Clock:
    """Measures the processor seconds spent in given functions, without counting nested calls twice."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start
                self._inside = False

        return timed


@contextmanager
def time_of_structure() -> Iterator[Clock]:
    """Time the functions of the structure analysis under every name that modules of fastfs have for them."""
    clock = Clock()
    places = [
        (module, name, value)
        for key, module in list(sys.modules.items())
        if key.startswith("fastfs.")
        for name, value in list(vars(module).items())
        if any(value is function for function in OF_STRUCTURE)
    ]
    for module, name, value in places:
        setattr(module, name, clock.around(value))
    try:
        yield clock
    finally:
        for module, name, value in places:
            setattr(module, name, value)


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [Workload("chain", 20, 4), Workload("residual", 40, 8)]
    tiny = [Workload(kind, depth, 4) for kind in ("chain", "residual") for depth in (250, 500, 1000, 3000, 10_000)]
    return [*tiny, Workload("chain", 1000, 256), Workload("residual", 1000, 256)]


def seconds(call: Callable[[], object], times: int) -> float:
    """Return the median time of a call, without the first one."""
    call()
    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return statistics.median(found)


def alone(model: Network, x: Tensor, rounds: int) -> dict[str, float]:
    """Return the seconds of each step of the analysis, called separately."""
    edges: list[list[structure.Edge | None]] = [[] for _ in model.layers]
    handles = [
        layer.register_forward_hook(lambda _m, _a, out, visits=visits: visits.append(edge_of(out)))
        for layer, visits in zip(model.layers, edges, strict=True)
    ]
    output = model(x)
    for handle in handles:
        handle.remove()
    named = dict(model.named_parameters())
    parameters, names = list(named.values()), list(named)
    known = trace(edges, [output], parameters)
    return {
        "trace": seconds(lambda: trace(edges, [output], parameters), rounds),
        "signature": seconds(lambda: signature(edges, [output], parameters), rounds),
        "join": seconds(lambda: join([(known, [0])], names), rounds),
    }


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """Return all times for one network."""
    torch.manual_seed(0)
    model = Network(workload)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    x = torch.randn(ROWS, workload.width)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    forward, plain = seconds(lambda: model(x), rounds), seconds(step, rounds)
    parts = alone(model, x, rounds)
    with time_of_structure() as clock:
        start = time.process_time()
        monitor = fastfs.Monitor(
            model, optimizer, layers=list(_names(model)), every=1, sinks=[_nothing], verbose=False, alerts=()
        )
        attach = time.process_time() - start
        start = time.process_time()
        step()
        cold, cold_structure = time.process_time() - start, clock.seconds
        clock.seconds = 0.0
        warm = seconds(step, rounds)
        warm_structure = clock.seconds / (rounds + 1)
        start = time.process_time()
        monitor.close()
    return {
        "workload": workload.name,
        "layers": workload.depth,
        "seconds": {
            "forward": forward,
            "step": plain,
            "attach": attach,
            "first measured step": cold,
            "measured step": warm,
            "of it structure, first": cold_structure,
            "of it structure": warm_structure,
            "close": time.process_time() - start,
            **parts,
        },
        "measured step / step": warm / plain,
        "trace / forward": parts["trace"] / forward,
        "trace and join / forward": (parts["trace"] + parts["join"]) / forward,
        "signature / forward": parts["signature"] / forward,
        "structure in a measured step / forward": warm_structure / forward,
    }


def _names(model: Network) -> Iterator[str]:
    return (f"layers.{index}" for index in range(len(model.layers)))


def _nothing(_rows: object) -> None:
    """A sink that keeps no rows."""


def main() -> int:
    arguments = command_line(__doc__, quick="two small networks, to test the benchmark itself")
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    for workload in workloads(arguments.quick):
        print(f"{workload.name} ...", file=sys.stderr, flush=True)
        results.append(measure(workload, arguments.rounds))
        write_json(arguments.json, arguments.device, results)
    columns = ["forward", "step", "first measured step", "measured step", "trace", "join", "signature"]
    ratios = ["measured step / step", "structure in a measured step / forward"]
    print_table(
        "Milliseconds, and ratios",
        ["network", *columns, *ratios],
        [
            [r["workload"], *(f"{1e3 * r['seconds'][c]:.1f}" for c in columns), *(f"{r[c]:.2f}" for c in ratios)]
            for r in results
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
