"""Real loops with one mistake in the scale of their gradients, and loops that look like it and have none.

A loop has four micro-batches of its rank at most. ``BUGS`` says how many ranks it has, by how much its gradients are
larger than declared, and, where a part of the parameters is affected, that the ratio is that of this part.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from benchmarks.parallel.clean_loops import Records
from fastfs.monitor import AlertRule

__all__ = ["BUGS", "UNSEEN", "Bug", "run_loop"]

STEPS, ROWS, INPUTS, WIDTH, CLASSES = 8, 24, 8, 16, 5
PADDED = 32  # tokens to which a micro-batch is padded


@dataclass(frozen=True)
class Bug:
    """A loop.

    Attributes:
        run: Trains with a monitor that has these options and returns nothing.
        ranks: How many it needs.
        ratio: By how much its gradients are larger than declared.
        said: A word of the likely cause that an alert has to name; empty for none.
    """

    run: Callable[..., None]
    ranks: int
    ratio: float
    said: str = ""


class _OverAll(torch.autograd.Function):
    """Sums over ranks, forward and backward."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return _summed_over_ranks(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _summed_over_ranks(gradient)


def _summed_over_ranks(x: Tensor) -> Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total


class Block(nn.Module):
    """A residual layer; with ``mixed``, one that sees the mean over the sequence, whose parts are on all ranks."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.inner, self.mixed = nn.Linear(WIDTH, WIDTH), mixed

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        if self.mixed:
            seen = x - _OverAll.apply(x.mean(dim=0)) / dist.get_world_size()
        return x + torch.tanh(self.inner(seen))


class Net(nn.Module):
    """A residual MLP."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.ModuleList(Block(mixed) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


LAYERS = r"^(embed|blocks\.\d+)$"


def _data(step: int, number: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    made = torch.Generator().manual_seed(1000 * step + 10 * rank + number)
    y = torch.randint(0, CLASSES, (rows,), generator=made)
    return torch.randn(rows, INPUTS, generator=made) + F.one_hot(y, INPUTS), y


def loop(
    monitor: dict[str, Any],
    *,
    net: Callable[[], nn.Module] = Net,
    wrap: Callable[[nn.Module], nn.Module] = lambda net: net,
    accumulate: int = 1,
    divide: float | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    rows: Callable[[int], int] = lambda number: ROWS,
    after: Callable[[nn.Module], None] | None = None,
    scaler: Any = None,
    sync_always: bool = False,
    clip: float | None = None,
    **declared: Any,
) -> None:
    """The loop of all bugs.

    Args:
        monitor: Options of the monitor.
        net: Makes the model.
        wrap: Wraps the model, or hooks its parameters.
        accumulate: Micro-batches of a step.
        divide: By what losses are divided; the number of micro-batches if None.
        loss: Of the outputs and the targets.
        rows: Rows of a micro-batch, by its number.
        after: Called with the model after the last backward.
        scaler: A gradient scaler.
        sync_always: DistributedDataParallel communicates after every micro-batch.
        clip: Norm of clipping.
        **declared: What the monitor is told.
    """
    torch.manual_seed(0)
    model = wrap(net())
    optim = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with fastfs.Monitor(model, optim, layers=LAYERS, every=1, scaler=scaler, **monitor, **declared):
        for step in range(STEPS):
            optim.zero_grad()
            for number in range(accumulate):
                x, y = _data(step, number, rows(number))
                if isinstance(model, nn.parallel.DistributedDataParallel):
                    model.require_backward_grad_sync = sync_always or number == accumulate - 1  # as no_sync() does
                value = loss(model(x), y) / (accumulate if divide is None else divide)
                (scaler.scale(value) if scaler is not None else value).backward()
            if after is not None:
                after(model)
            if clip is not None:
                if scaler is not None:
                    scaler.unscale_(optim)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if scaler is None:
                optim.step()
            else:
                scaler.step(optim)
                scaler.update()


# What is applied after the backward


def _multiply(factor: float) -> Callable[[nn.Module], None]:
    def after(model: nn.Module) -> None:
        for p in model.parameters():
            assert p.grad is not None
            p.grad *= factor

    return after


def _sum_again(model: nn.Module) -> None:
    for p in model.parameters():
        dist.all_reduce(p.grad)


# What is applied in the backward


def _ddp(net: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net)


def _reducing(divisor: float) -> Callable[[nn.Module], nn.Module]:
    """DistributedDataParallel with a hook that sums and divides."""

    def reduce(bucket: Any) -> Any:
        work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / divisor)

    def wrap(net: nn.Module) -> nn.Module:
        model = nn.parallel.DistributedDataParallel(net)
        model.register_comm_hook(None, lambda _, bucket: reduce(bucket))  # torch refuses postponed annotations
        return model

    return wrap


def _hooked(factor: float) -> Callable[[nn.Module], nn.Module]:
    def scale(p: Tensor) -> None:
        assert p.grad is not None
        p.grad *= factor

    def wrap(net: nn.Module) -> nn.Module:
        for p in net.parameters():
            p.register_post_accumulate_grad_hook(scale)
        return net

    return wrap


def _reduced_by_hand(net: nn.Module) -> nn.Module:
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
    return net


# Losses


def _own_share(out: Tensor, y: Tensor) -> Tensor:
    """The rank's share of the mean over the tokens of all ranks."""
    tokens = torch.tensor(float(len(y)))
    if dist.is_initialized():
        dist.all_reduce(tokens)
    return F.cross_entropy(out, y, reduction="sum") / tokens


def _uneven(number: int) -> int:
    own = dist.get_rank() if dist.is_initialized() else 0
    return (30, 18, 24, 12)[(number + own) % 4]


_summed = functools.partial(F.cross_entropy, reduction="sum")


# Tensor parallelism by hand


class _ToAll(torch.autograd.Function):
    """Copies forward, sums over ranks backward."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _summed_over_ranks(gradient)


class _FromAll(torch.autograd.Function):
    """Sums over ranks forward, copies backward."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return _summed_over_ranks(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


class SplitBlock(nn.Module):
    """A residual MLP of which every rank has its share of the hidden width."""

    def __init__(self) -> None:
        super().__init__()
        hidden = 4 * WIDTH // dist.get_world_size()
        self.up = nn.Linear(WIDTH, hidden, bias=False)
        self.down = nn.Linear(hidden, WIDTH, bias=False)
        torch.manual_seed(1 + dist.get_rank())
        for p in self.parameters():
            nn.init.normal_(p, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + _FromAll.apply(self.down(torch.tanh(self.up(_ToAll.apply(x)))))


def tensor_parallel(monitor: dict[str, Any], *, bug: bool = True) -> None:
    """The first layer is replicated. Its gradient is the same on all ranks, and is summed over them all the same."""
    torch.manual_seed(0)
    first, last = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)
    model = nn.Sequential(first, SplitBlock(), SplitBlock(), last)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if bug:
        _reduced_by_hand(first)
    options = {"layers": r"^[012]$", "every": 1, "own_parameters": r"up|down", **monitor}
    with fastfs.Monitor(model, optim, **options):
        for step in range(STEPS):
            optim.zero_grad()
            made = torch.Generator().manual_seed(step)
            y = torch.randint(0, CLASSES, (ROWS,), generator=made)
            x = torch.randn(ROWS, INPUTS, generator=made) + F.one_hot(y, INPUTS)
            F.cross_entropy(model(x), y).backward()
            optim.step()


# Sequences in parts


def context_parallel(monitor: dict[str, Any]) -> None:
    """Every rank has a part of each sequence and the mean loss of its part; gradients are summed, not averaged."""
    loop(monitor, net=lambda: Net(mixed=True), wrap=_reduced_by_hand, loss_weight=1.0 / dist.get_world_size())


def scaled(monitor: dict[str, Any], **options: Any) -> None:
    """A loop with a gradient scaler."""
    loop(monitor, scaler=torch.amp.GradScaler("cpu", init_scale=256.0), **options)


def _of(**options: Any) -> Callable[..., None]:
    return functools.partial(loop, **options)


_K = 4
_TOKENS = sum(map(_uneven, range(_K)))

BUGS: dict[str, Bug] = {
    "gradients times world size after the average": Bug(_of(wrap=_ddp, after=_multiply(2.0)), 2, 2.0, "summed"),
    "communication hook sums": Bug(_of(wrap=_reducing(1.0)), 2, 2.0, "summed"),
    "averaged twice": Bug(_of(wrap=_reducing(4.0)), 2, 0.5, "twice"),
    "reduced again after the backward": Bug(_of(wrap=_ddp, after=_sum_again), 2, 2.0, "summed"),
    "accumulation divided twice": Bug(_of(accumulate=_K, after=_multiply(1.0 / _K)), 1, 1.0 / _K, "twice"),
    "accumulation not divided": Bug(
        _of(wrap=_ddp, accumulate=_K, divide=1.0, loss_weight=1.0 / (2 * _K)), 2, float(_K), "not divided"
    ),
    "divided by padded tokens of uneven micro-batches": Bug(
        _of(
            accumulate=_K,
            divide=1.0,
            rows=_uneven,
            loss=_summed,
            after=_multiply(1.0 / (_K * PADDED)),
            loss_weight=1.0 / _TOKENS,
        ),
        1,
        _TOKENS / (_K * PADDED),
        f"divided by {_K * PADDED}",
    ),
    "tokens averaged per device, global average declared": Bug(_of(wrap=_ddp, loss_weight=1.0), 2, 0.5, "averaged"),
    "share of global tokens not multiplied by the processes": Bug(
        _of(wrap=_ddp, accumulate=2, divide=1.0, rows=_uneven, loss=_own_share, loss_weight=1.0), 2, 0.5, "averaged"
    ),
    "share of global tokens times processes, but summed": Bug(
        _of(
            wrap=_reducing(1.0),
            rows=_uneven,
            loss=lambda out, y: _own_share(out, y) * dist.get_world_size(),
        ),
        2,
        2.0,
        "summed",
    ),
    "replica counted twice (tensor parallel)": Bug(tensor_parallel, 2, 2.0, "replicas"),
    "parts of sequences summed (context parallel)": Bug(context_parallel, 2, 2.0, "summed"),
    "hook that scales gradients": Bug(_of(wrap=_hooked(0.6)), 1, 0.6, "hook"),
    "unscaled twice": Bug(functools.partial(scaled, after=_multiply(1.0 / 256.0)), 1, 1.0 / 256.0, "unscaled twice"),
    "hook that scales gradients, scaler and clipping": Bug(
        functools.partial(scaled, wrap=_hooked(3.0), clip=3.5), 1, 3.0, "hook"
    ),
}

UNSEEN: dict[str, Bug] = {
    # A loss that is itself multiplied scales backward vectors as well, so that nothing is wrong at any cut.
    "loss times world size": Bug(
        _of(wrap=_ddp, loss=lambda out, y: F.cross_entropy(out, y) * dist.get_world_size()), 2, 1.0
    ),
    "accumulation not divided, nothing declared": Bug(_of(accumulate=_K, divide=1.0), 1, 1.0),
    # Only slower: DistributedDataParallel averages what is already the average.
    "no_sync forgotten": Bug(_of(wrap=_ddp, accumulate=2, sync_always=True), 2, 1.0),
    "tensor parallel without the mistake": Bug(functools.partial(tensor_parallel, bug=False), 2, 1.0),
}


def run_loop(name: str, alerts: Sequence[AlertRule]) -> dict[str, Any]:
    """Runs a loop on this rank.

    Returns:
        The scales of the measured steps, and what was raised.
    """
    sink = Records()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (BUGS | UNSEEN)[name].run({"sinks": [sink], "alerts": alerts, "verbose": False})
    return {
        "scales": [r.scalars["gradient_scale"] for r in sink.records if r.kind == "measured"],
        "raised": [(r.scalars["value"], r.scalars["message"]) for r in sink.records if r.kind == "alert"],
    }


def run_loops(names: Sequence[str], alerts: Sequence[AlertRule]) -> list[dict[str, Any]]:
    """Runs several loops on this rank."""
    return [run_loop(name, alerts) for name in names]
