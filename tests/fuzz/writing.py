"""Training runs of generated modules that write within their forward, with a monitor and without."""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from tests.fuzz.world import Picture, differences, global_state, picture
from tests.fuzz.writes import WIDTH, Write, Writing, random_writes
from tests.fuzz.writing_hand import WritingHand, copies

__all__ = ["MODES", "Plan", "altered", "random_plan", "shrink", "train", "wrong"]

STEPS = 4
MODES = ("batch", "amplify", "jvp", "probe")


@dataclass(frozen=True)
class Plan:
    """A training run that is the same whenever it is taken.

    Attributes:
        writes: of the forward.
        mode: of the monitor.
        checkpoint: around the blocks; ``use_reentrant``.
        compiled: the backend of torch.compile.
    """

    writes: tuple[Write, ...]
    mode: str = "batch"
    optimizer: str = "sgd"
    checkpoint: bool | None = None
    compiled: str | None = None
    autocast: bool = False
    micro_batches: int = 1
    clip: bool = False
    aligned: bool = False
    every: int = 1
    evaluates: bool = False


def random_plan(seed: int) -> Plan:
    """The plan of that seed."""
    rng = random.Random(seed)
    return Plan(
        writes=random_writes(rng),
        mode=MODES[seed % 4],
        optimizer=rng.choice(("sgd", "sgd", "adamw", "adam foreach")),
        checkpoint=rng.choice((None, None, None, None, True, False)),
        autocast=rng.random() < 0.15,
        micro_batches=rng.choice((1, 1, 2)),
        clip=rng.random() < 0.2,
        aligned=rng.random() < 0.3,
        every=rng.choice((1, 1, 2)),
        evaluates=rng.random() < 0.15,
    )


def shrink(plan: Plan, fails: Any) -> Plan:
    """A plan with as little in it as still fails: ``fails(plan)``."""
    smaller = True
    while smaller:
        smaller = False
        tries = [replace(plan, writes=plan.writes[:i] + plan.writes[i + 1 :]) for i in range(len(plan.writes))]
        for name, plain in vars(Plan(())).items():
            if name not in ("writes", "mode") and getattr(plan, name) != plain:
                tries.append(replace(plan, **{name: plain}))
        tries += [
            replace(plan, writes=tuple(replace(w, when="always") if i == k else w for k, w in enumerate(plan.writes)))
            for i, write in enumerate(plan.writes)
            if write.when != "always"
        ]
        for smaller_plan in tries:
            if fails(smaller_plan):
                plan, smaller = smaller_plan, True
                break
    return plan


@functools.lru_cache(maxsize=512)
def _unmonitored(plan: Plan) -> list[Picture]:
    return train(plan, monitored=False)[0]


@functools.lru_cache(maxsize=256)
def _monitored(plan: Plan) -> tuple[list[Picture], list[dict[str, Any]]]:
    return train(plan, monitored=True)[:2]


def altered(plan: Plan) -> list[str]:
    """Return what the monitor changed of the training: nothing, as it should be.

    A plan is trained once without a monitor for all settings of the monitor, and once with one for this question and
    that of :func:`wrong`.
    """
    off = _unmonitored(replace(plan, mode="batch", aligned=False, every=1))
    on, _ = _monitored(plan)
    for number, (a, b) in enumerate(zip(off, on, strict=True)):
        if found := differences(a, b):
            when = f"after step {number}" if number < STEPS else "after close()"
            return [f"{when}: {line}" for line in found]
    return []


def wrong(plan: Plan) -> list[str]:
    """Rows that are called valid and are not right, by hand; of the modes that replay the batch."""
    if plan.mode not in ("batch", "amplify") or plan.compiled is not None or plan.checkpoint or not copies(plan.writes):
        return []
    hand = WritingHand()
    train(plan, monitored=False, hand=hand)
    _, rows = _monitored(plan)
    return hand.faults(rows, 1e-3 if plan.mode == "batch" else 0.02)


def _optimizer(name: str, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=0.01)
    return torch.optim.Adam(parameters, lr=0.01, foreach=True, amsgrad=True)


def _options(plan: Plan) -> dict[str, Any]:
    options: dict[str, Any] = {"every": plan.every, "aligned_every": 1 if plan.aligned else None}
    if plan.mode == "probe":
        x, y = _batch(99)
        probe = fastfs.monitor.Probe(x, lambda output: F.cross_entropy(output.float(), y))
        return options | {"mode": "probe", "probe": probe}
    return options | ({"amplify": True} if plan.mode == "amplify" else {"mode": plan.mode})


def _batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randn(8, WIDTH, generator=generator), torch.randint(3, (8,), generator=generator)


def train(
    plan: Plan, *, monitored: bool, hand: WritingHand | None = None
) -> tuple[list[Picture], list[dict[str, Any]], list[str]]:
    """What training owns after every step, the rows that were recorded, and what was said.

    Args:
        plan: of the run.
        monitored: with a monitor.
        hand: takes the numbers of a run without one.
    """
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    if plan.compiled is not None:
        torch._dynamo.reset()
    elsewhere: list[Any] = []
    inner = Writing(plan.writes, again=plan.checkpoint, elsewhere=elsewhere)
    parameters = [*(p for p in inner.parameters() if p.requires_grad), inner.foreign()]
    optimizer = _optimizer(plan.optimizer, parameters)
    inner.optimizers.append(optimizer)
    model: Any = inner if plan.compiled is None else torch.compile(inner, backend=plan.compiled)
    rows: list[dict[str, Any]] = []
    losses: list[Any] = []
    pictures: list[Picture] = []
    roots = {"model": inner, "optimizer": optimizer, "elsewhere": elsewhere, "losses": losses}
    with warnings.catch_warnings(record=True) as said, contextlib.ExitStack() as stack:
        warnings.simplefilter("always")
        monitor = None
        if monitored:
            options = _options(plan) | {"layers": r"blocks\.\d+$", "alerts": (), "sinks": [rows.extend]}
            monitor = fastfs.Monitor(model, optimizer, verbose=False, **options)
            stack.callback(monitor.close)
        if hand is not None:
            hand.attach(inner, parameters)
        for step in range(STEPS):
            try:
                losses.append(_step(plan, model, optimizer, step, hand))
            except Exception as error:  # of the forward's own: it must be the same one
                losses.append(type(error).__name__)
                optimizer.zero_grad()
            pictures.append(picture(roots) | global_state())
        if monitor is not None:
            monitor.close()
        if hand is not None:
            hand.close()
        pictures.append(picture(roots, hooks=True) | global_state())
    return pictures, rows, [str(w.message) for w in said if "fastfs" in str(w.message)]


def _step(
    plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, hand: WritingHand | None
) -> list[Tensor]:
    optimizer.zero_grad()
    if plan.evaluates:
        model.eval()
        with torch.no_grad():
            model(_batch(500 + step)[0])
        model.train()
    losses = []
    for part in range(plan.micro_batches):
        x, y = _batch(step * plan.micro_batches + part)
        if hand is not None:
            hand.enter(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.autocast):
            output = model(x)
        if hand is not None:
            hand.leave()
        loss = F.cross_entropy(output.float(), y) / plan.micro_batches
        loss.backward()
        losses.append(loss.detach().clone())
    if plan.clip:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)
    if hand is not None:
        hand.before_step()
    optimizer.step()
    if hand is not None:
        hand.after_step(plan.autocast)
    return losses
