"""Measure what the monitor costs a run on several ranks: bytes on the wire, processor time, time of a step.

    python -m benchmarks.distributed [--json FILE] [--ranks 1 2 4] [--steps N] [--rounds N] [--quick]

Every rank is a process (gloo, over the loopback interface). One monitor watches the whole run; its schedules are
switched between rounds, so that steps without a measurement, predicted steps and measured steps alternate in one run.
Another run without a monitor sends the same bytes as the steps without a measurement.

- "wire": bytes that all ranks together have sent per step, as the kernel counts them at the loopback interface, beyond
  those of steps without a measurement. TCP's own headers and acknowledgements are included.
- "part": bytes of the sums that one rank sends to the first one, per step.
- "cpu" and "wall": processor time of all ranks, and time of a step, relative to steps without a measurement. On a
  machine with fewer cores than ranks, "wall" shows mostly the former.

"merge" is what the first rank does with the parts of all ranks at a measured step, for sizes that do not fit here.

The ceiling of the traffic of a measured step is what one more forward sends: under FSDP2 each rank receives
(n - 1) / n of the parameters, twice (a forward after the step, and now and then one before it).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import fastfs
from benchmarks.harness import command_line, count_option, print_table, write_json
from fastfs._record.encoding import to_json
from fastfs._record.ranks.assembly import Assembler
from fastfs._record.ranks.part import Place, RankPart, Share
from fastfs._record.record import as_line

WIDTH, DEPTH, CLASSES, TOKENS = 256, 6, 50, 32
KINDS = ("nothing", "predicted", "measured")


class Switched:
    """A schedule that is switched by hand."""

    def __init__(self) -> None:
        self.on = False

    def due(self, step: int) -> bool:
        return self.on


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).clone()  # FSDP2 warns of views


def prepared(mesh: str) -> tuple[nn.Module, bool]:
    """Return the model on a mesh, and whether ranks have batches of their own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model: Any = Net()
    if mesh == "ddp":
        return nn.parallel.DistributedDataParallel(model), True
    over = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        if mesh == "fsdp2":
            fully_shard(block, mesh=over)
        else:
            parallelize_module(block, over, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return (fully_shard(model, mesh=over), True) if mesh == "fsdp2" else (model, False)


def sent_bytes() -> int:
    """Return the bytes that the loopback interface has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, values = line.partition(":")
        if name.strip() == "lo":
            return int(values.split()[8])
    raise RuntimeError("there is no loopback interface in /proc/net/dev")


def run_rank(rank: int, ranks: int, mesh: str, steps: int, rounds: int, folder: str) -> None:
    """Train on one rank, and let the first one write what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    model, own = prepared(mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    measured, aligned = Switched(), Switched()
    sizes: list[int] = []
    to_bytes = RankPart.to_bytes

    def counted(part: RankPart) -> bytes:
        data = to_bytes(part)
        sizes.append(len(data))
        return data

    mock.patch.object(RankPart, "to_bytes", counted).start()  # for as long as this process lives
    monitor = fastfs.Monitor(
        model,
        optimizer,
        layers=r"blocks\.\d+$",
        every=measured,
        aligned_every=aligned,
        path=f"{folder}/record.jsonl",
        verbose=False,
        alerts=(),
        flush_seconds=0.05,
    )
    generator = torch.Generator().manual_seed(rank if own else 0)
    batches = [torch.randn(8, TOKENS, 64, generator=generator) for _ in range(4)]
    targets = [torch.randint(CLASSES, (8, TOKENS), generator=generator) for _ in range(4)]

    def train(count: int) -> None:
        for step in range(count):
            optimizer.zero_grad()
            out = model(batches[step % 4])
            F.cross_entropy(out.flatten(0, 1), targets[step % 4].flatten()).backward()
            optimizer.step()

    found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    parts: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):  # the first one warms up
        for kind in KINDS:
            measured.on, aligned.on = kind == "measured", kind == "predicted"
            train(1)  # so that the taps are armed
            monitor.flush()
            dist.barrier()
            sizes.clear()
            before = sent_bytes(), time.process_time(), time.perf_counter()
            train(steps)
            own_time = time.process_time() - before[1]
            dist.barrier()
            wall = time.perf_counter() - before[2]
            monitor.flush()
            dist.barrier()
            time.sleep(0.3)  # for the writers of all ranks
            every = torch.tensor([own_time], dtype=torch.float64)
            wire = sent_bytes() - before[0]
            dist.all_reduce(every)
            if number:
                found[kind].append([wire / steps, every.item() / steps, wall / steps])
                parts[kind] += sizes
    monitor.close()
    if rank == ranks - 1:
        torch.save((found, parts), f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure(mesh: str, ranks: int, steps: int, rounds: int) -> dict[str, Any]:
    """Run a group of ranks and return the medians over rounds."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, mesh, steps, rounds, folder)
        spawn(run_rank, args=arguments, nprocs=ranks)
        found, parts = torch.load(f"{folder}/found.pt")
    result: dict[str, Any] = {"mesh": mesh, "ranks": ranks, "parameters": sum(p.numel() for p in Net().parameters())}
    medians = {kind: [statistics.median(column) for column in zip(*found[kind], strict=True)] for kind in KINDS}
    wire, cpu, wall = medians["nothing"]
    result |= {"step_bytes": wire, "step_cpu_seconds": cpu, "step_wall_seconds": wall}
    for kind in KINDS[1:]:
        result[kind] = {
            "wire_bytes": medians[kind][0] - wire,
            "part_bytes": statistics.mean(parts[kind]) if parts[kind] else 0.0,
            "cpu": statistics.median(a[1] / b[1] for a, b in zip(found[kind], found["nothing"], strict=True)),
            "wall": statistics.median(a[2] / b[2] for a, b in zip(found[kind], found["nothing"], strict=True)),
        }
    return result


def merge_cost(ranks: int, layers: int, parameters: int) -> dict[str, Any]:
    """Return what the first rank does with the parts of one measured step, of FSDP2 with so many ranks.

    Args:
        ranks: number of ranks.
        layers: number of watched layers.
        parameters: number of parameters.
    """
    generator = np.random.default_rng(0)
    names = [f"blocks.{i}" for i in range(layers)]

    def part(rank: int) -> bytes:
        place = Place(rank, tuple(range(ranks)), (rank,), 1 / ranks, (Share(f"fsdp:{ranks}", ranks, rank),))
        arrays = {
            "sums": generator.random((layers, 9)) + 1.0,
            "spread": generator.random((layers, 6)) * 1e-3,
            "reason": np.zeros(layers),
            "amplified": np.zeros(layers),
            "quantiles": np.zeros((layers, 2, 0)),
            "aligned": generator.random((1, layers, 4)),
            "decrease_reason": np.zeros(layers),
        }
        facts = {"touched": [1] * parameters, "ran": [True] * layers, "cut": [True] * layers, "method": "plain"}
        facts |= {"rows": [[131, 8192]] * layers, "margin": [2.0] * layers}
        scalars = {"loss": 1.0, "micro_batches": 1, "overhead_seconds": 0.1, "loss_scale": 1.0}
        return RankPart("measured", 0, time.time(), place, scalars, facts, arrays).to_bytes()

    sent = [part(rank) for rank in range(ranks)]
    assembler = Assembler({"layers": names})
    started = time.process_time()
    parts = [RankPart.from_bytes(data) for data in sent]
    decoded = time.process_time()
    records = assembler.records(parts)
    merged = time.process_time()
    return {
        "merge": f"{ranks} ranks, {layers} layers, {parameters} parameters",
        "part_bytes": statistics.mean(map(len, sent)),
        "decode_cpu_seconds": decoded - started,
        "merge_cpu_seconds": merged - decoded,
        "record_bytes": sum(len(to_json(as_line(record, "x"))) for record in records),
    }


def main() -> int:
    """Run the benchmark.

    Returns:
        The exit status.
    """
    numbers = {"type": count_option, "nargs": "+", "default": [1, 2, 4], "help": "numbers of ranks"}
    args = command_line(
        __doc__,
        quick="few steps of two ranks",
        options={"--ranks": numbers, "--steps": {"type": count_option, "default": 10}},
    )
    ranks, steps, rounds = ([2], 3, 1) if args.quick else (args.ranks, args.steps, args.rounds)
    results: list[dict[str, Any]] = []
    for mesh in ("ddp", "fsdp2", "tp"):
        for count in ranks:
            if count == 1 and mesh != "ddp":
                continue
            results.append(measure(mesh, count, steps, rounds))
            write_json(args.json, torch.device("cpu"), results)
    merges = [merge_cost(*sizes) for sizes in ((8, 32, 291), (1000, 80, 723))]
    write_json(args.json, torch.device("cpu"), [*results, *merges])
    for merge in merges:
        print(
            ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{value}" for name, value in merge.items()
            )
        )
    rows = []
    for result in results:
        for kind in KINDS[1:]:
            one = result[kind]
            rows.append(
                [
                    f"{result['mesh']}, {result['ranks']} ranks, {kind}",
                    f"{one['wire_bytes'] / 1e3:.1f} kB",
                    f"{result['step_bytes'] / 1e3:.0f} kB",
                    f"{one['part_bytes'] / 1e3:.2f} kB",
                    f"{one['cpu']:.3f}",
                    f"{one['wall']:.3f}",
                ]
            )
    columns = ["step", "wire, beyond a step", "a step alone", "part of a rank", "cpu", "wall"]
    print_table("Cost of the monitor in a run of several ranks", columns, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
