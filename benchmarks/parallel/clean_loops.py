"""Generated training loops that scale their gradients as they declare: whatever an alert says is wrong."""

from __future__ import annotations

import functools
import itertools
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastfs
from fastfs._record.record import Record
from fastfs.models import Transformer
from fastfs.monitor import AlertRule

__all__ = ["CleanLoop", "Records", "clean_loop", "run_clean", "run_clean_loops"]

CLASSES, WIDTH, MEASURED = 5, 12, 14


class Records:
    """A sink that keeps the header and the records."""

    def __init__(self) -> None:
        self.header: dict[str, Any] = {}
        self.records: list[Record] = []

    def open(self, header: Any) -> None:
        self.header = dict(header)

    def write(self, records: Sequence[Record]) -> None:
        self.records += records

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class CleanLoop:
    """A training loop without a mistake in its scaling.

    Attributes:
        seed: Of weights and data.
        model: ``mlp``, ``residual``, ``transformer``, ``one_cut``, or ``growth`` and ``branch``, whose products of
            small matrices grow by the same share in every step, so that the residual is large and constant.
        depth: Of the model.
        optimizer: ``sgd``, ``momentum`` or ``adamw``.
        speed: Learning rate; for SGD as a share of the largest stable one.
        full: Every step has the same batch.
        accumulate: Micro-batches of a step.
        divided_after: Gradients are divided after the backward, and the weight is declared, instead of the loss.
        clip: Largest norm, as a share of the first gradient's; None for no clipping.
        scaler: The loss goes through a gradient scaler.
        frozen: The first layer is not trained.
        every: Steps between measured ones.
        rows: Sampled rows; None for all.
        mode: ``batch``, ``amplify`` or ``jvp``.
        dtype: Name of the dtype of the parameters.
        before: Steps before the monitor is attached.
        warmup: The learning rate grows from 0 over the measured steps.
    """

    seed: int
    model: str
    depth: int
    optimizer: str
    speed: float
    full: bool
    accumulate: int
    divided_after: bool
    clip: float | None
    scaler: bool
    frozen: bool
    every: int
    rows: int | None
    mode: str
    dtype: str
    before: int
    warmup: bool


def clean_loop(seed: int) -> CleanLoop:
    """Returns one of many loops."""
    draw = random.Random(seed)
    optimizer = draw.choice(["sgd", "sgd", "momentum", "adamw"])
    dtype = draw.choice(["float32"] * 6 + ["float64"] * 3 + ["bfloat16"])
    largest = 0.03 if optimizer == "adamw" else 0.97
    return CleanLoop(
        seed=seed,
        model=draw.choice(["mlp", "residual", "transformer", "one_cut", "growth", "branch"]),
        depth=draw.randint(2, 4),
        optimizer=optimizer,
        # As many near the edge of stability as far below it.
        speed=largest * (draw.uniform(0.5, 1.0) if draw.random() < 0.4 else 10 ** draw.uniform(-5, 0)),
        full=draw.random() < 0.6,
        accumulate=draw.choice([1, 1, 2, 3, 4]),
        divided_after=draw.random() < 0.25,
        clip=draw.choice([None, None, 0.1, 0.5, 0.9]),
        scaler=draw.random() < 0.25,
        frozen=draw.random() < 0.2,
        every=draw.choice([1, 1, 2, 3]),
        rows=draw.choice([None, None, 64, 16]),
        mode="amplify" if dtype == "bfloat16" else draw.choice(["batch", "batch", "amplify", "jvp"]),
        dtype=dtype,
        before=draw.choice([0, 0, 0, 20, 100, 300]),
        warmup=draw.random() < 0.15,
    )


class Residual(nn.Module):
    """x + a linear layer of tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Branch(nn.Module):
    """x + B A x, with small matrices A and B."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        for p in self.parameters():
            nn.init.normal_(p, std=size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


def make_model(loop: CleanLoop) -> tuple[nn.Module, str]:
    """Returns a model and the pattern of its watched layers."""
    torch.manual_seed(loop.seed)
    if loop.model == "transformer":
        model: nn.Module = Transformer(vocabulary=CLASSES, width=8, depth=loop.depth, heads=2, context=6)
        return model, r"^blocks\.\d+$"
    if loop.model == "residual":
        parts = [nn.Linear(8, WIDTH), *(Residual() for _ in range(loop.depth)), nn.Linear(WIDTH, CLASSES)]
        return nn.Sequential(*parts), rf"^[1-{loop.depth}]$"
    if loop.model == "growth":
        sizes = [8, *[WIDTH] * (loop.depth - 1), CLASSES]
        layers = [nn.Linear(n, m, bias=False) for n, m in itertools.pairwise(sizes)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=1e-2 if loop.depth == 2 else 0.1)
        return nn.Sequential(*layers), rf"^{loop.depth - 1}$"
    if loop.model == "branch":
        fixed = nn.Linear(8, WIDTH).requires_grad_(False)
        parts = [fixed, *(Branch(1e-2) for _ in range(loop.depth)), nn.Linear(WIDTH, CLASSES).requires_grad_(False)]
        return nn.Sequential(*parts), rf"^[1-{loop.depth}]$"
    act = nn.Tanh if loop.seed % 2 else nn.ReLU
    inner = [layer for _ in range(loop.depth) for layer in (nn.Linear(WIDTH, WIDTH), act())]
    model = nn.Sequential(nn.Linear(8, WIDTH), act(), *inner, nn.Linear(WIDTH, CLASSES))
    return model, r"^\d*[02468]$" if loop.model == "mlp" else rf"^{2 * loop.depth + 1}$"


def batches(loop: CleanLoop, rank: int) -> Callable[[int], list[tuple[Tensor, Tensor]]]:
    """Returns the micro-batches of a step, by its number."""

    @functools.lru_cache(maxsize=1)
    def of(step: int) -> list[tuple[Tensor, Tensor]]:
        made = torch.Generator().manual_seed(1000 * loop.seed + 100 * rank + 10**6 * step)
        found = []
        for _ in range(loop.accumulate):
            y = torch.randint(0, CLASSES, (16, 6) if loop.model == "transformer" else (32,), generator=made)
            if loop.model == "transformer":
                found.append((y, y.roll(-1, 1)))
                continue
            found.append((torch.randn(32, 8, generator=made) + F.one_hot(y, 8), y))
        return found

    return (lambda _: of(0)) if loop.full else of


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x = batch[0]
    if x.is_floating_point():
        x = x.to(next(model.parameters()).dtype)
    return F.cross_entropy(model(x).flatten(0, -2), batch[1].flatten())


def sharpness(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """Returns about the largest eigenvalue of the Hessian, from a few power iterations."""
    own = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):  # the only one that has second derivatives everywhere
        loss = _loss(model, batch)
    gradients = torch.autograd.grad(loss, own, create_graph=True)
    v, size = [torch.randn_like(p) for p in own], 1.0
    for _ in range(12):
        norm = sum((x.square().sum() for x in v), torch.zeros(())).sqrt()
        v = [x / norm for x in v]
        product = sum(((g * x).sum() for g, x in zip(gradients, v, strict=True)), torch.zeros(()))
        v = list(torch.autograd.grad(product, own, retain_graph=True))
        size = sum((x.square().sum() for x in v), torch.zeros(())).sqrt().item()
    return max(size, 1e-3)


def _optimizer(loop: CleanLoop, model: nn.Module, batch: tuple[Tensor, Tensor]) -> torch.optim.Optimizer:
    """Returns the optimizer, and gives the model its dtype."""
    momentum = 0.9 if loop.optimizer == "momentum" else 0.0
    rate = loop.speed if loop.optimizer == "adamw" else loop.speed * 2 * (1 + momentum) / sharpness(model, batch)
    model.to(getattr(torch, loop.dtype))
    own = [p for p in model.parameters() if p.requires_grad]
    if loop.optimizer == "adamw":
        return torch.optim.AdamW(own, lr=rate)
    return torch.optim.SGD(own, lr=rate, momentum=momentum)


def run_clean(loop: CleanLoop, alerts: Sequence[AlertRule]) -> Records:
    """Trains, and returns what was recorded. In a process group, by DistributedDataParallel."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    net, layers = make_model(loop)
    data = batches(loop, rank)
    if loop.frozen and loop.model != "growth":
        next(net.children()).requires_grad_(False)
    torch.manual_seed(loop.seed)
    optimizer = _optimizer(loop, net, batches(loop, 0)(0)[0])
    scheduler = None
    if loop.warmup:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 0.01) / 20))
    model = nn.parallel.DistributedDataParallel(net) if several else net
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if loop.scaler else None
    sink, largest = Records(), 1.0
    monitor: fastfs.Monitor | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(loop.before + MEASURED * loop.every):
            if step == loop.before:
                monitor = fastfs.Monitor(
                    model,
                    optimizer,
                    layers=layers,
                    every=loop.every,
                    rows=loop.rows,
                    mode="jvp" if loop.mode == "jvp" else "batch",
                    amplify=loop.mode == "amplify",
                    scaler=scaler,
                    loss_weight=1.0 / (ranks * loop.accumulate) if loop.divided_after else None,
                    alerts=alerts,
                    sinks=[sink],
                    verbose=False,
                    metadata=asdict(loop),
                )
            optimizer.zero_grad()
            for batch in data(step):
                loss = _loss(model, batch) / (1 if loop.divided_after else loop.accumulate)
                (scaler.scale(loss) if scaler is not None else loss).backward()
            if scaler is not None:
                scaler.unscale_(optimizer)
            if loop.divided_after:
                for p in net.parameters():
                    if p.grad is not None:
                        p.grad /= loop.accumulate
            if loop.clip is not None:
                limit = loop.clip * largest if step else 1e9
                norm = nn.utils.clip_grad_norm_(net.parameters(), limit)
                largest = norm.item() if not step else largest
            if scaler is not None:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            if scheduler is not None:
                scheduler.step()
        assert monitor is not None
        monitor.close()
    return sink


def run_clean_loops(seeds: Sequence[int], alerts: Sequence[AlertRule]) -> list[list[Record]]:
    """Runs loops on this rank; returns the records of each."""
    return [run_clean(clean_loop(seed), alerts).records for seed in seeds]
