"""What does `fastfs.Monitor` cost: the same training loop with the monitor and without, and the naive way beside it.

    python -m benchmarks.monitor [--device cuda] [--json FILE] [--quick]

Identical models are trained in one process and take turns in blocks of steps, in an order that is drawn anew in every
round; what is reported are medians, and medians of the ratios to the plain loop within a round. "plain, again" is a
second plain loop: its ratio says how well the others are known. Before anything is timed it is checked that parameters
are bitwise equal with the monitor and without, and that the naive way finds the same angles.

Peak memory is that of building the training and its first two steps, outside of the timing. On the CPU every storage
that an operator of torch returns is counted for as long as it lives (a TorchDispatchMode sees them; what kernels take
for themselves while they run is not seen). On CUDA it is what the allocator says.

Targets are printed as PASS or FAIL; exit status 1 if one is missed at full size.
"""

from __future__ import annotations

import copy
import itertools
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastfs
from benchmarks.harness import Times, command_line, median_ratio, print_table, side_by_side, wall_time, write_json
from fastfs.experiments.data import stdlib_text, windows
from fastfs.models import Transformer

PLAIN = "plain"
AGAIN = "plain, again"
OFF = "every=100: a step that is not measured"
EVERY = "every=100: amortised"
WINDOW = "every=100: a window of 100 steps"
ALIGNED = "aligned_every=1: a predicted step"
MEASURED = "measured step"
AMPLIFIED = "measured step, amplify=True"
JVP = 'measured step, mode="jvp"'
PROBE = 'measured step, mode="probe"'
NAIVE = "measured step, the naive way"

NEVER = 10**9  # every=NEVER: step 0 alone is measured

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A transformer and its batches."""

    width: int
    depth: int
    context: int
    batch: int
    autocast: bool = False

    @property
    def name(self) -> str:
        precision = "bfloat16 autocast" if self.autocast else "float32"
        return f"transformer {self.depth} x {self.width}, {self.batch} x {self.context} tokens, AdamW, {precision}"


def workload(quick: bool, device: torch.device) -> Workload:
    if quick:
        return Workload(width=64, depth=2, context=64, batch=4)
    if device.type == "cuda":
        return Workload(width=1024, depth=12, context=512, batch=16, autocast=True)
    return Workload(width=256, depth=6, context=256, batch=6)


class Naive:
    """What one writes without a library: clone everything, run the forward again, float64 reductions in eager torch."""

    def __init__(self, model: nn.Module, layers: list[str]) -> None:
        self.angles: list[Tensor] = []
        self.decrease = torch.zeros(())
        self._model = model
        self._modules = [dict(model.named_modules())[name] for name in layers]
        self._handles = [
            m.register_forward_hook(lambda _m, _args, out, i=i: self._seen(i, out)) for i, m in enumerate(self._modules)
        ]
        self._replaying = False
        self._clear()

    def _clear(self) -> None:
        self._before: list[Tensor] = [torch.empty(0)] * len(self._modules)
        self._after, self._backward = list(self._before), list(self._before)
        self._weights: list[tuple[Tensor, Tensor]] = []

    def _seen(self, index: int, features: Tensor) -> None:
        if self._replaying:
            self._after[index] = features.detach().clone()
            return
        self._before[index] = features.detach().clone()
        features.register_hook(lambda gradient: self._backward.__setitem__(index, gradient.detach().clone()))

    def before_step(self) -> None:
        self._weights = [
            (p.detach().clone(), p.grad.detach().clone()) for p in self._model.parameters() if p.grad is not None
        ]

    @torch.no_grad()
    def after_step(self, forward: Callable[[], object]) -> None:
        self._replaying = True
        forward()
        self._replaying = False
        self.angles = []
        for before, after, backward in zip(self._before, self._after, self._backward, strict=True):
            f, df, b = before.double(), after.double() - before.double(), backward.double()
            cosine = -(df * b).sum() / ((df * df).sum() * (b * b).sum()).sqrt()
            speed, size = df.square().mean().sqrt(), f.square().mean().sqrt()
            self.angles.append(torch.stack([torch.arccos(cosine), speed, speed / size]))
        new = [p for p in self._model.parameters() if p.grad is not None]
        parts = [-(g.double() * (p.double() - w.double())).sum() for p, (w, g) in zip(new, self._weights, strict=True)]
        self.decrease = torch.stack(parts).sum()
        self._clear()


class Training:
    """A loop whose steps can be taken one at a time.

    Args:
        load: model and data.
        model: that every training starts from; copied.
        batches: the same for all.
        watch: attaches something to model and optimizer: a monitor, or None.
        naive: measure every step the naive way.
    """

    def __init__(
        self,
        load: Workload,
        model: nn.Module,
        batches: list[Batch],
        watch: Callable[[nn.Module, torch.optim.Optimizer], fastfs.Monitor | None],
        naive: bool = False,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        self.monitor = watch(self.model, self.optimizer)
        self.naive = Naive(self.model, [f"blocks.{i}" for i in range(load.depth)]) if naive else None
        self._load = load
        self._batches: Iterator[Batch] = itertools.cycle(batches)

    def _forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self._load.autocast):
            return self.model(tokens)  # type: ignore[no-any-return]

    def step(self) -> None:
        tokens, targets = next(self._batches)
        self.optimizer.zero_grad()
        loss = cross_entropy(self._forward(tokens), targets)
        loss.backward()
        if self.monitor is not None:
            self.monitor.log(loss=loss)
        if self.naive is not None:
            self.naive.before_step()
        self.optimizer.step()
        if self.naive is not None:
            self.naive.after_step(lambda: self._forward(tokens))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Bench:
    """Makes trainings of one workload; their records go to a folder."""

    def __init__(self, load: Workload, device: torch.device, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        model = Transformer(256, load.width, load.depth, 4, load.context, generator=generator)
        self.load = load
        self.device = device
        self._model = model.to(device)
        stream = windows(stdlib_text(1_000_000), batch=load.batch, length=load.context, seed=0)
        self._batches = [tuple(x.to(device) for x in next(stream)) for _ in range(8)]
        self._folder = folder
        self._number = itertools.count()

    def training(self, name: str, **options: Any) -> Training:
        """A training as the table calls it; ``options`` of the monitor are added."""
        settings: dict[str, dict[str, Any]] = {
            OFF: {"every": NEVER},
            WINDOW: {"every": 100},
            ALIGNED: {"every": NEVER, "aligned_every": 1},
            MEASURED: {"every": 1},
            AMPLIFIED: {"every": 1, "amplify": True},
            JVP: {"every": 1, "mode": "jvp"},
            PROBE: {"every": 1, "mode": "probe", "probe": self._probe()},
        }

        def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> fastfs.Monitor | None:
            if name not in settings:
                return None
            path = self._folder / f"record-{next(self._number)}.jsonl"
            chosen = {**settings[name], **options}
            return fastfs.Monitor(model, optimizer, path=path, alerts=(), verbose=False, **chosen)

        return Training(self.load, self._model, self._batches, watch, naive=name == NAIVE)  # type: ignore[arg-type]

    def _probe(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        tokens, targets = self._batches[-1]
        return tokens, lambda logits: cross_entropy(logits, targets)


# Correctness


def check(bench: Bench) -> dict[str, float]:
    """That monitors change nothing and agree with the naive way.

    Returns:
        Largest difference of angles (radians) with all rows, and with the default rows in standard errors.

    Raises:
        AssertionError: if not.
    """
    steps = 2
    plain, naive = bench.training(PLAIN), bench.training(NAIVE)
    watched = {name: bench.training(name) for name in (OFF, ALIGNED, MEASURED, AMPLIFIED, JVP, PROBE)}
    seen: list[Any] = []
    watched["all rows"] = bench.training(MEASURED, rows=None, sinks=[lambda rows: seen.extend(rows)])
    sampled: list[Any] = []
    watched["sampled"] = bench.training(MEASURED, rows=64, sinks=[lambda rows: sampled.extend(rows)])
    for _ in range(steps):
        for training in (plain, naive, *watched.values()):
            training.step()
    wanted = list(plain.model.parameters())
    for name, training in watched.items():
        if not all(torch.equal(a, b) for a, b in zip(wanted, training.model.parameters(), strict=True)):
            raise AssertionError(f"{name}: parameters differ from those without the monitor")
        assert training.monitor is not None
        training.monitor.close()
    assert naive.naive is not None
    angles, speeds, _ = torch.stack(naive.naive.angles, dim=1).tolist()
    exact = [row for row in seen if row["kind"] == "measured" and row["step"] == steps - 1]
    rough = [row for row in sampled if row["kind"] == "measured" and row["step"] == steps - 1]
    off = max(abs(row["angle"] - angle) for row, angle in zip(exact, angles, strict=True))
    slow = max(abs(row["update_rms"] / speed - 1) for row, speed in zip(exact, speeds, strict=True))
    errors = max(abs(row["angle"] - angle) / row["angle_se"] for row, angle in zip(rough, angles, strict=True))
    fall = float(naive.naive.decrease)
    if not max(off, slow) <= 1e-5 or not errors <= 6:
        raise AssertionError(f"the naive way has other angles: {off:.1e} rad, {slow:.1e}, {errors:.1f} standard errors")
    # The last block is upstream of all but the final norm and the head: less than the whole decrease, and most of it.
    if not 0 < exact[-1]["aligned_decrease"] <= fall * (1 + 1e-6):
        raise AssertionError(f"aligned decrease {exact[-1]['aligned_decrease']:.3g}, the naive way {fall:.3g} in all")
    return {"angle, all rows": off, "speed, all rows": slow, "standard errors, 64 rows": errors}


# Memory


class Storages(TorchDispatchMode):
    """Counts the bytes of all storages that operators return, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self._live:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        for key in [key for key, (reference, _) in self._live.items() if reference.expired()]:
            del self._live[key]
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def peak_bytes(make: Callable[[], Training], device: torch.device, steps: int = 2) -> int:
    """Of making a training and its first steps."""

    def run() -> None:
        training = make()
        for _ in range(steps):
            training.step()
        if training.monitor is not None:
            training.monitor.close()

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with Storages() as storages:
        run()
    return storages.peak


# Time


def compare(bench: Bench, names: list[str], rounds: int, repeat: int) -> Times:
    """Seconds per step of the named trainings, in turn."""
    trainings = {name: bench.training(name) for name in names}
    for training in trainings.values():  # the first step has the structure to find, and starts the amplification
        training.step()
        training.step()
    calls: dict[str, Callable[[], object]] = {name: training.step for name, training in trainings.items()}
    times = side_by_side(calls, bench.device, rounds, repeat, float("inf"), shuffle=random.Random(0), timer=wall_time)
    for training in trainings.values():
        if training.monitor is not None:
            training.monitor.close()
    return times


def window(bench: Bench, steps: int, block: int) -> tuple[float, float]:
    """Mean seconds per step over a window with one measured step in it, and of the plain loop in turn with it."""
    trainings = {WINDOW: bench.training(WINDOW), PLAIN: bench.training(PLAIN)}
    monitor = trainings[WINDOW].monitor
    assert monitor is not None
    for training in trainings.values():  # past the first measured step, which has the structure to find
        training.step()
        training.step()
    total = dict.fromkeys(trainings, 0.0)
    shuffle = random.Random(0)
    order = list(trainings)
    first = monitor.step
    while monitor.step < first + steps:
        shuffle.shuffle(order)
        for name in order:
            total[name] += block * wall_time(trainings[name].step, bench.device, block)
    count = monitor.step - first
    monitor.close()
    return total[WINDOW] / count, total[PLAIN] / count


def say(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


def run(load: Workload, device: torch.device, rounds: int, quick: bool) -> dict[str, Any]:
    """All rows of the table."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(load, device, Path(folder))
        say("checking that nothing changes, and the naive way")
        errors = check(bench)
        few = [PLAIN, AGAIN, OFF, ALIGNED]
        many = [PLAIN, MEASURED, AMPLIFIED, JVP, PROBE, NAIVE]
        say("memory")
        peaks = {name: peak_bytes(lambda n=name: bench.training(n), device) for name in dict.fromkeys(few + many)}
        on_gpu = device.type == "cuda"
        say("steps that are not measured")
        cheap = compare(bench, few, 2 * rounds + 4, 20 if on_gpu else 3)
        say("measured steps")
        dear = compare(bench, many, rounds, 5 if on_gpu else 1)
        say("a window of 100 steps")
        with_monitor, without = window(bench, 100, 5 if quick else 4)

    rows = []

    def add(name: str, seconds: float, ratio: float, peak: int | None = None) -> None:
        entry: dict[str, Any] = {"contestant": name, "milliseconds": round(seconds * 1e3, 4), "ratio": round(ratio, 4)}
        if peak is not None:
            entry |= {
                "peak MiB": round(peak / 2**20, 1),
                "more than plain MiB": round((peak - peaks[PLAIN]) / 2**20, 1),
            }
        rows.append(entry)

    for name in few:
        add(name, statistics.median(cheap[name]), median_ratio(cheap, name, PLAIN), peaks[name])
    ratio = (99 * median_ratio(cheap, OFF, PLAIN) + median_ratio(dear, MEASURED, PLAIN)) / 100
    add(EVERY, ratio * statistics.median(cheap[PLAIN]), ratio)
    add(WINDOW, with_monitor, with_monitor / without)
    for name in many[1:]:
        add(name, statistics.median(dear[name]), median_ratio(dear, name, PLAIN), peaks[name])
    return {
        "workload": load.name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "rounds": rounds,
        "naive way and monitor differ by": errors,
        "rows": rows,
        "targets": targets({row["contestant"]: row["ratio"] for row in rows}, device),
    }


def targets(ratios: dict[str, float], device: torch.device) -> list[dict[str, Any]]:
    """What the monitor may cost, and whether it keeps to it."""
    most = {EVERY: 1.01, ALIGNED: 1.01 if device.type == "cuda" else 1.02, MEASURED: 1.5}
    return [{"contestant": n, "most": x, "ratio": ratios[n], "pass": ratios[n] <= x} for n, x in most.items()]


def show(result: dict[str, Any]) -> None:
    columns = ["", "ms a step", "ratio to plain", "peak MiB", "more than plain MiB"]
    rows = [
        [
            row["contestant"],
            f"{row['milliseconds']:.2f}",
            f"{row['ratio']:.4f}",
            f"{row['peak MiB']:.1f}" if "peak MiB" in row else "",
            f"{row['more than plain MiB']:.1f}" if "peak MiB" in row else "",
        ]
        for row in result["rows"]
    ]
    threads = f", threads: {result['threads']}" if result["threads"] else ""
    print_table(result["workload"] + threads, columns, rows)
    for target in result["targets"]:
        verdict = "PASS" if target["pass"] else "FAIL"
        print(f"{verdict}  {target['contestant']}: {target['ratio']:.4f}, at most {target['most']}")


def main() -> int:
    arguments = command_line(__doc__, quick="a tiny model: does the benchmark run; targets mean nothing")
    device = arguments.device
    result = run(workload(arguments.quick, device), device, arguments.rounds, arguments.quick)
    show(result)
    if arguments.json:
        write_json(arguments.json, device, [result])
    return int(not arguments.quick and not all(target["pass"] for target in result["targets"]))


if __name__ == "__main__":
    sys.exit(main())
