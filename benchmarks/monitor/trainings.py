"""The compared trainings: one model, one stream of batches, and the monitor of each."""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from benchmarks.monitor.naive import Naive
from fastfs._reproduce.data import stdlib_text, windows
from fastfs.models import Transformer

PLAIN = "plain"
AGAIN = "plain, again"
OFF = "every=100: a step that is not measured"
EVERY = "every=100: amortized"
WINDOW = "every=100: a window of 100 steps"
ALIGNED = "aligned_every=1: a predicted step"
MEASURED = "measured step"
DETAILED = "measured step, details=True"
AMPLIFIED = "measured step, amplify=True"
JVP = 'measured step, mode="jvp"'
PROBE = 'measured step, mode="probe"'
SAMPLES = 2
MEASURED_FEW = f"measured step, samples={SAMPLES}"
AMPLIFIED_FEW = f"measured step, amplify=True, samples={SAMPLES}"
JVP_FEW = f'measured step, mode="jvp", samples={SAMPLES}'
PROBE_FEW = f'measured step, mode="probe", {SAMPLES} samples'
NAIVE = "measured step, naive implementation"

NEVER = 10**9  # every=NEVER measures step 0 only

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A transformer and its batches."""

    width: int
    depth: int
    heads: int
    context: int
    batch: int
    vocabulary: int = 256
    autocast: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        precision = "bfloat16 autocast" if self.autocast else "float32"
        name = f"transformer {self.depth} x {self.width}, {self.batch} x {self.context} tokens, AdamW, {precision}"
        return f"{name}, torch.compile" if self.compiled else name

    def smaller(self, batch: int) -> Workload:
        """Return the same workload with at most the given number of sequences per batch."""
        return replace(self, batch=min(batch, self.batch))


def workload(quick: bool, device: torch.device, compiled: bool) -> Workload:
    """Return the workload; on CUDA, GPT-2 small with half of its vocabulary, as its head is not tied: 124M in all."""
    if quick:
        return Workload(width=64, depth=2, heads=4, context=64, batch=4, compiled=compiled)
    if device.type == "cuda":
        size = {"width": 768, "depth": 12, "heads": 12, "context": 1024, "vocabulary": 25_088}
        return Workload(**size, batch=16, autocast=True, compiled=compiled)
    return Workload(width=256, depth=6, heads=4, context=256, batch=6, compiled=compiled)


class Training:
    """A training loop whose steps can be taken one at a time.

    Args:
        load: model and data.
        model: initial model; copied, and the copy compiled if the workload says so.
        batches: batches, the same for all trainings.
        watch: attaches a monitor to model and optimizer, or returns None.
        naive: whether to measure every step with the naive implementation.
    """

    def __init__(
        self,
        load: Workload,
        model: nn.Module,
        batches: list[Batch],
        watch: Callable[[nn.Module, torch.optim.Optimizer], fastfs.Monitor | None],
        naive: bool = False,
    ) -> None:
        own = copy.deepcopy(model)
        self.parameters = list(own.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=3e-4)
        self.naive = Naive(own, [f"blocks.{i}" for i in range(load.depth)]) if naive else None
        # The naive implementation stays eager: its hooks would break a compiled model into many graphs.
        self.model: nn.Module = _compiled(own) if load.compiled and not naive else own
        self.monitor = watch(self.model, self.optimizer)
        self._load = load
        self._batches: Iterator[Batch] = itertools.cycle(batches)

    def _forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self._load.autocast):
            return self.model(tokens)

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

    def close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()


def _compiled(model: nn.Module) -> nn.Module:
    """Give the model its own code object: torch.compile caches graphs per code object, without regard to hooks."""
    forward = type(model).forward
    parts = forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    own = types.FunctionType(forward.__code__.replace(), *parts)
    model.forward = types.MethodType(own, model)
    compiled: Any = torch.compile(model, dynamic=False)
    return compiled


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Bench:
    """Creates trainings of one workload, with records in a folder."""

    def __init__(self, load: Workload, device: torch.device, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        model = Transformer(load.vocabulary, load.width, load.depth, load.heads, load.context, generator=generator)
        self.load = load
        self.device = device
        self.parameters = sum(p.numel() for p in model.parameters())
        self._model = model.to(device)
        self._batches = [(x.to(device), y.to(device)) for x, y in itertools.islice(_batches(load), 8)]
        self._folder = folder
        self._number = itertools.count()

    def training(self, name: str, **options: Any) -> Training:
        """Create the training of a given name in the table, with further ``options`` of the monitor."""
        settings: dict[str, dict[str, Any]] = {
            OFF: {"every": NEVER},
            WINDOW: {"every": 100},
            ALIGNED: {"every": NEVER, "aligned_every": 1},
            MEASURED: {"every": 1},
            DETAILED: {"every": 1, "details": True},
            AMPLIFIED: {"every": 1, "amplify": True},
            JVP: {"every": 1, "mode": "jvp"},
            PROBE: {"every": 1, "mode": "probe", "probe": self._probe()},
            MEASURED_FEW: {"every": 1, "samples": SAMPLES},
            AMPLIFIED_FEW: {"every": 1, "amplify": True, "samples": SAMPLES},
            JVP_FEW: {"every": 1, "mode": "jvp", "samples": SAMPLES},
            PROBE_FEW: {"every": 1, "mode": "probe", "probe": self._probe(SAMPLES)},
        }

        def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> fastfs.Monitor | None:
            if name not in settings:
                return None
            path = self._folder / f"record-{next(self._number)}.jsonl"
            chosen = {**settings[name], **options}
            return fastfs.Monitor(model, optimizer, path=path, alerts=(), verbose=False, **chosen)

        return Training(self.load, self._model, self._batches, watch, naive=name == NAIVE)

    def _probe(self, samples: int | None = None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        tokens, targets = (x[:samples] for x in self._batches[-1])
        return tokens, lambda logits: cross_entropy(logits, targets)


def _batches(load: Workload) -> Iterator[Batch]:
    """Yield windows of text in bytes, or random tokens for a larger vocabulary, where only their number matters."""
    if load.vocabulary == 256:
        yield from windows(stdlib_text(1_000_000), batch=load.batch, length=load.context, seed=0)
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(load.vocabulary, (load.batch, load.context + 1), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]
