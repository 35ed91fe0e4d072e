"""Measure how far aligned decreases from a sample of the parameters are from the exact ones, and what they save.

    python -m benchmarks.monitor.sampled_alignment [--device cuda] [--quick] [--json FILE]

Study: in every step of several trainings, the decrease of each layer is taken from all elements and from 8
independent samples of a quarter of the chunks. For each layer the table has the coverage (how often the exact decrease
lies within 2 and 3 standard errors of the estimate), the median of the relative standard error, and the median of the
relative error. Models are small, so chunks are, too: chunks per matrix and rows of embeddings per chunk are about those
of GPT-2 small with the chunks of the monitor. Bytes are counted from what the op is given to read. Steps that take a
census read everything; they count as bytes, not as estimates.

Time: steps of a transformer without a monitor, with exact and with sampled predicted steps; and the update meter alone.
On the CPU this is the processor time of the process. With --device cuda only this part runs, in wall time, on the
workload of benchmarks/monitor.
"""

from __future__ import annotations

import functools
import itertools
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import command_line, median_ratio, print_table, side_by_side, wall_time, write_json
from benchmarks.monitor.trainings import ALIGNED, PLAIN, Bench, Workload, workload
from fastfs import _functional
from fastfs._monitor.measure.parameter_sample import SAMPLING
from fastfs._monitor.measure.sampled_calls import SampledCalls
from fastfs._monitor.measure.update_meter import UpdateMeter
from fastfs._reproduce.data import digits, minibatches, stdlib_text, windows
from fastfs.models import MLP, Transformer

EVERY = 4
SAMPLES = 8
WORDS = 4096

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Training:
    """A model, its batches and its optimizer.

    Attributes:
        model: Makes the model.
        batches: Yields inputs and labels.
        optimizer: Makes the optimizer of the parameters.
        chunk: The least elements of a chunk.
    """

    model: Callable[[], nn.Module]
    batches: Callable[[], Iterator[Batch]]
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    chunk: int


def words() -> Iterator[Batch]:
    """Yield windows of words and signs, numbered by frequency, of Python's standard library."""
    text = bytes(stdlib_text().tokens.tolist()).decode(errors="replace")
    found = re.findall(r"\w+|\s+|[^\w\s]", text)
    rank = {word: i for i, (word, _) in enumerate(Counter(found).most_common(WORDS - 1))}
    tokens = torch.tensor([rank.get(word, WORDS - 1) for word in found])
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(tokens) - 128, (4, 1), generator=generator)
        window = tokens[starts + torch.arange(129)]
        yield window[:, :-1], window[:, 1:]


def shuffled_words() -> Iterator[Batch]:
    """Yield the same with numbers in random order."""
    order = torch.randperm(WORDS, generator=torch.Generator().manual_seed(1))
    for inputs, labels in words():
        yield order[inputs], order[labels]


def texts() -> Iterator[Batch]:
    return windows(stdlib_text(1_000_000), batch=4, length=128, seed=0)


def images() -> Iterator[Batch]:
    inputs, labels = digits()
    return minibatches(inputs, labels, 64, seed=0)


def transformer(vocabulary: int, width: int, tied: bool) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    return Transformer(vocabulary, width, 4, 4, 128, tied=tied, generator=generator)


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


def momentum(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def rmsprop(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr=1e-4)


TRAININGS = {
    "words, tied head, AdamW": Training(lambda: transformer(WORDS, 96, True), words, adamw, 512),
    "words, tied head, SGD with momentum": Training(lambda: transformer(WORDS, 96, True), words, momentum, 512),
    "words, AdamW": Training(lambda: transformer(WORDS, 96, False), words, adamw, 512),
    "words, SGD with momentum": Training(lambda: transformer(WORDS, 96, False), words, momentum, 512),
    "words in random order, AdamW": Training(lambda: transformer(WORDS, 96, False), shuffled_words, adamw, 512),
    "bytes, AdamW": Training(lambda: transformer(256, 96, False), texts, adamw, 512),
    "digits, MLP, RMSprop": Training(
        lambda: MLP(64, 256, 6, 10, generator=torch.Generator().manual_seed(0)), images, rmsprop, 512
    ),
}


def layer_of(name: str, depth: int) -> int:
    """Return the position of the layer that a parameter belongs to: 0 is before the blocks."""
    first, *rest = name.split(".")
    if first == "blocks":
        return int(rest[0]) + 1
    return 0 if first in ("token", "position") else depth + 1


class BytesRead:
    """Counts the bytes that `optimizer_stats` is given to read, in the place of the function."""

    def __init__(self) -> None:
        self.total = 0
        self._call = _functional.optimizer_stats

    def __call__(self, rule: int, *arguments: Any, pieces: Tensor | None = None) -> Any:
        lists = [each for each in arguments[:4] if each]
        sizes = [sum(x[i].element_size() for x in lists) for i in range(len(lists[0]))]
        if pieces is None:
            self.total += sum(size * x.numel() for size, x in zip(sizes, lists[0], strict=True))
        else:
            self.total += sum(sizes[index] * count for index, _, count in pieces.tolist())
        return self._call(rule, *arguments, pieces=pieces)


def study(name: str, steps: int) -> dict[str, Any]:
    """Train, and compare the decreases of every step."""
    training = TRAININGS[name]
    model = training.model()
    names = [n for n, _ in model.named_parameters()]
    depth = len(model.blocks)  # type: ignore[arg-type]
    belongs = torch.tensor([layer_of(n, depth) for n in names])
    upstream = (belongs <= torch.arange(depth + 2)[:, None]).double()
    optimizer = training.optimizer(list(model.parameters()))
    exact = UpdateMeter(optimizer)
    meters = [UpdateMeter(optimizer, sampled=SampledCalls(EVERY, i, training.chunk)) for i in range(SAMPLES)]
    found: list[Tensor] = []
    read = {"exact": 0, "sampled": 0, "between": 0}
    variance = SAMPLING.index("dot_variance")
    for inputs, labels in itertools.islice(training.batches(), steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten()).backward()
        for meter in (exact, *meters):
            meter.before(complete=meter is exact)
        optimizer.step()
        with mock.patch.object(_functional, "optimizer_stats", BytesRead()) as counter:
            truth = upstream @ -exact.after().stats.dot
            read["exact"] += counter.total
            counter.total = 0
            for meter in meters:
                before = counter.total
                result = meter.after(exact=False)
                if result.sampling is None:
                    raise RuntimeError(f"{name}: no parameter is large enough to be sampled")
                error = (upstream @ result.sampling[:, variance]).sqrt()
                if result.sampling[:, variance].any():  # not a census
                    found.append(torch.stack([truth, upstream @ -result.stats.dot, error]))
                    read["between"] += counter.total - before
            read["sampled"] += counter.total
    table = torch.stack(found)
    layers = []
    for layer in (each for each in range(depth + 2) if upstream[each].any()):
        truth, estimate, error = table[:, :, layer].unbind(dim=1)
        distance = (estimate - truth).abs()
        layers.append(
            {
                "layer": "before the blocks" if layer == 0 else "after" if layer > depth else f"block {layer - 1}",
                "within_2_se": ((distance <= 2 * error) | (error == 0)).double().mean().item(),
                "within_3_se": ((distance <= 3 * error) | (error == 0)).double().mean().item(),
                "sampled": (error > 0).double().mean().item(),
                "relative_se": (error / truth.abs()).median().item(),
                "relative_error": (distance / truth.abs()).median().item(),
            }
        )
    return {
        "training": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "estimates": len(table),
        "bytes_read_exact": read["exact"],
        "bytes_read_sampled": read["sampled"] // SAMPLES,
        "share_between_censuses": read["between"] / len(table) * steps / read["exact"],
        "layers": layers,
    }


def processor_time(call: Callable[[], object], _device: torch.device, repeat: int) -> float:
    """Return the processor time per call in seconds, which other processes hardly change."""
    begin = time.process_time()
    for _ in range(repeat):
        call()
    return (time.process_time() - begin) / repeat


def timing(device: torch.device, rounds: int, quick: bool) -> dict[str, Any]:
    """Time steps without a monitor, with exact and with sampled predicted steps."""
    load = workload(quick, device, compiled=False)
    if not quick and device.type == "cpu":  # matrices that are large enough to be sampled
        load = Workload(width=768, depth=6, heads=12, context=64, batch=2)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(load, device, Path(folder))
        trainings = {
            PLAIN: bench.training(PLAIN),
            "exact": bench.training(ALIGNED, aligned_fraction=1),
            "sampled": bench.training(ALIGNED, aligned_fraction=1 / EVERY),
        }
        for training in trainings.values():
            for _ in range(20):  # past the first checks and censuses
                training.step()
        calls = {name: training.step for name, training in trainings.items()}
        timer = processor_time if device.type == "cpu" else wall_time
        times = side_by_side(calls, device, rounds, repeat=4, budget=120.0, timer=timer)
        meters = {
            "exact": UpdateMeter(trainings[PLAIN].optimizer),
            "sampled": UpdateMeter(trainings[PLAIN].optimizer, sampled=SampledCalls(EVERY)),
        }
        for meter in meters.values():
            for _ in range(4):  # past the first censuses; the median leaves out the next one
                _measure(meter)
        alone = side_by_side(
            {name: functools.partial(_measure, meter) for name, meter in meters.items()},
            device,
            rounds,
            budget=60.0,
            timer=timer,
        )
        for training in trainings.values():
            training.close()
    return {
        "workload": load.name,
        "parameters": bench.parameters,
        "threads": torch.get_num_threads(),
        "plain_ms": 1e3 * statistics.median(times[PLAIN]),
        "exact_ratio": median_ratio(times, "exact", PLAIN),
        "sampled_ratio": median_ratio(times, "sampled", PLAIN),
        "meter_exact_ms": 1e3 * statistics.median(alone["exact"]),
        "meter_sampled_ms": 1e3 * statistics.median(alone["sampled"]),
    }


def _measure(meter: UpdateMeter) -> None:
    """Measure the step that was made last once more."""
    meter.before(complete=False)
    meter.after(exact=False)


def main() -> None:
    """Run the study and the timing."""
    args = command_line(__doc__, quick="two short trainings and a tiny model, to try the benchmark")
    results: list[dict[str, Any]] = []
    chosen = list(TRAININGS)[-2:] if args.quick else list(TRAININGS)
    for name in chosen if args.device.type == "cpu" else []:
        result = study(name, 12 if args.quick else 48)
        results.append(result)
        write_json(args.json, args.device, results)
        share = result["share_between_censuses"]
        columns = ["layer", "within 2 se", "within 3 se", "se / D", "error / D"]
        keys = ("within_2_se", "within_3_se", "relative_se", "relative_error")
        rows = [[str(x["layer"]), *(f"{x[key]:.3f}" for key in keys)] for x in result["layers"]]
        print_table(
            f"{name}: {share:.1%} of the bytes between censuses, {result['estimates']} estimates", columns, rows
        )
    result = timing(args.device, 3 if args.quick else args.rounds, args.quick)
    results.append(result)
    write_json(args.json, args.device, results)
    rows = [[name, f"{result[f'{name}_ratio']:.3f}"] for name in ("exact", "sampled")]
    for row, name in zip(rows, ("exact", "sampled"), strict=True):
        row.append(f"{result[f'meter_{name}_ms']:.2f}")
    print_table(f"{result['workload']}: a predicted step", ["", "ratio to a plain step", "meter, ms"], rows)


if __name__ == "__main__":
    main()
