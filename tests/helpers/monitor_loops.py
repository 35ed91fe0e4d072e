"""Training loops with everything that a monitor could disturb, and the numbers of a step taken by hand."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastfs
from tests.helpers.monitor_cases import rows

BLOCKS = r"blocks\.\d+$"
DYNAMO = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"  # Dynamo's own


class Block(nn.Module):
    """``f + branch(f)``, with what a test wants in the branch."""

    def __init__(self, width: int, *, drop: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.norm(self.linear(x))))


class Net(nn.Module):
    """A stem, residual blocks whose outputs are cuts, and a head; an in-place ReLU follows the last block.

    Args:
        use: which blocks run at a step, ``use(step) -> list of indices``; all by default.
        reentrant: of a checkpoint around every block but the first; None for none.
    """

    def __init__(
        self,
        *,
        depth: int = 3,
        width: int = 8,
        drop: float = 0.0,
        norm: bool = False,
        reentrant: bool | None = None,
        use: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width, drop=drop, norm=norm) for _ in range(depth))
        self.head = nn.Linear(width, 3)
        self.reentrant = reentrant
        self.use = use
        self.now = 0  # step, for `use`

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index in range(len(self.blocks)) if self.use is None else self.use(self.now):
            block = self.blocks[index]
            again = self.reentrant is not None and index > 0
            x = checkpoint(block, x, use_reentrant=self.reentrant) if again else block(x)
        return self.head(F.relu(x, inplace=True))


def sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)]


def muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for the rest."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)]


@dataclass
class Run:
    """One training run that is under way, as its step function sees it."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    scaler: Any = None
    monitors: list[fastfs.Monitor] = field(default_factory=list)
    trace: list[Tensor] = field(default_factory=list)
    others: list[nn.Module] = field(default_factory=list)  # more models to compare

    def draw(self) -> None:
        """What a loop may draw between a forward and the step, from every generator."""
        self.trace.append(torch.rand(1) + random.random() + np.random.rand())  # noqa: NPY002


Step = Callable[["Loop", Run, int], None]


@dataclass(frozen=True)
class Loop:
    """A training loop of one kind.

    Attributes:
        model, optimizers: what is trained by what; ``models`` of them, each with a monitor of its own.
        step: one training step.
        prepare: changes the model after the optimizers were made and before the monitor is attached.
        skipped: steps that a gradient scaler skips.
        strict: warnings are errors.
        device: where the models and their inputs are.
    """

    name: str
    model: Callable[[], nn.Module] = Net
    optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]] = sgd
    micro_batches: int = 1
    clip: float | None = None
    autocast: torch.dtype | None = None
    scaler: bool = False
    models: int = 1
    step: Step | None = None
    prepare: Callable[[nn.Module], nn.Module] | None = None
    skipped: Sequence[int] = ()
    batch: Callable[[int], tuple[Tensor, Tensor]] = rows
    strict: bool = True
    device: str = "cpu"

    def start(self) -> list[Run]:
        """From the same random state always."""
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002
        runs = []
        for _ in range(self.models):
            model = self.model().to(self.device)
            optimizers = self.optimizers(model)
            scaler = torch.amp.GradScaler(self.device, init_scale=256.0, growth_interval=10) if self.scaler else None
            model = model if self.prepare is None else self.prepare(model)
            runs.append(Run(model, optimizers, scaler))
        return runs

    def advance(self, run: Run, step: int) -> None:
        inner = getattr(run.model, "_orig_mod", run.model)
        if hasattr(inner, "now"):
            inner.now = step
        (self.step or plain_step)(self, run, step)

    def data(self, number: int) -> tuple[Tensor, Tensor]:
        """A batch, where the model is."""
        x, y = self.batch(number)
        return x.to(self.device), y.to(self.device)

    def precision(self) -> torch.autocast:
        """Of the forward."""
        return torch.autocast(self.device, self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def loss(self, run: Run, number: int) -> Tensor:
        x, y = self.data(number)
        with self.precision():
            output = run.model(x)
            return F.cross_entropy(output.float().flatten(0, -2), y.flatten()) / self.micro_batches

    def train(self, steps: int, options: dict[str, Any] | None) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
        """Everything that must not depend on whether a monitor is attached; and what the monitors recorded."""
        runs = self.start()
        records: list[list[dict[str, Any]]] = [[] for _ in runs]
        if options is not None:
            for run, seen in zip(runs, records, strict=True):
                keywords = {"layers": BLOCKS, "verbose": False, "scaler": run.scaler, "alerts": ()} | options
                run.monitors.append(fastfs.Monitor(run.model, run.optimizers, sinks=[keep(seen)], **keywords))
        with warnings.catch_warnings():
            if self.strict:
                warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "fastfs.Monitor: step 0 has no forward of", RuntimeWarning)  # some loops
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            for step in range(steps):
                for run in runs:
                    self.advance(run, step)
                    run.trace += [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
                    run.trace += [b.clone() for b in run.model.buffers()]
        final: dict[str, Any] = {
            "torch_rng": [torch.get_rng_state(), *cuda_randomness()],
            "python_rng": random.getstate(),
            "numpy_rng": np.random.get_state()[1].tolist(),  # noqa: NPY002
        }
        for index, run in enumerate(runs):
            modules = [run.model, *run.others]
            final |= {
                f"{index} trace": run.trace,
                f"{index} parameters": [p.detach().clone() for m in modules for p in m.parameters()],
                f"{index} buffers": [b.clone() for m in modules for b in m.buffers()],
                f"{index} state": [
                    value.clone()
                    for optimizer in run.optimizers
                    for state in optimizer.state.values()
                    for value in state.values()
                    if isinstance(value, Tensor)
                ],
                f"{index} groups": [g["lr"] for o in run.optimizers for g in o.param_groups],
                f"{index} training": [m.training for module in modules for m in module.modules()],
                f"{index} requires_grad": [p.requires_grad for m in modules for p in m.parameters()],
                f"{index} scale": None if run.scaler is None else run.scaler.get_scale(),
            }
            for monitor in run.monitors:
                monitor.close()
        return final, records


def cuda_randomness() -> list[Tensor]:
    """Of all GPUs."""
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def keep(seen: list[dict[str, Any]]) -> Callable[[list[dict[str, Any]]], None]:
    """A sink: one dictionary a record, columns as lists."""
    return lambda rows: seen.extend(rows)


def assert_bitwise(first: dict[str, Any], second: dict[str, Any]) -> None:
    """The same bits, also of NaN."""
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            assert [(t.dtype, t.shape) for t in value] == [(t.dtype, t.shape) for t in second[key]], key
            for number, (a, b) in enumerate(zip(value, second[key], strict=True)):
                same = torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
                assert same, f"{key}: number {number} of shape {tuple(a.shape)}"
        else:
            assert value == second[key], key


def plain_step(loop: Loop, run: Run, step: int) -> None:
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    for part in range(loop.micro_batches):
        loss = loop.loss(run, step * loop.micro_batches + part)
        (loss if run.scaler is None else run.scaler.scale(loss)).backward()
        run.trace.append(loss.detach().clone())
        run.draw()
    finish_step(loop, run)


def finish_step(loop: Loop, run: Run) -> None:
    if loop.clip is not None:
        if run.scaler is not None:
            for optimizer in run.optimizers:
                run.scaler.unscale_(optimizer)
        run.trace.append(nn.utils.clip_grad_norm_(run.model.parameters(), loop.clip).detach())
    for optimizer in run.optimizers:
        if run.scaler is None:
            optimizer.step()
        else:
            run.scaler.step(optimizer)
    if run.scaler is not None:
        run.scaler.update()


# Steps of other kinds


def infinite_step(loop: Loop, run: Run, step: int) -> None:
    """A gradient overflows in some steps: the scaler skips them."""
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    loss = loop.loss(run, step)
    run.scaler.scale(loss).backward()
    run.trace.append(loss.detach().clone())
    if step in loop.skipped:
        run.model.stem.weight.grad[0, 0] = torch.inf
    run.draw()
    finish_step(loop, run)


def failing_step(loop: Loop, run: Run, step: int) -> None:
    """Raises in every fifth step, each time elsewhere."""
    plain_step(loop, run, step)
    if step % 5 == 2:
        for place in (step // 5) % 3, None:
            handle = None
            try:
                if place == 0:
                    handle = run.model.head.register_forward_pre_hook(_raise)
                loss = loop.loss(run, 100 + step)
                if place == 1:
                    loss.register_hook(_raise)
                loss.backward()
                if place == 2:
                    handle = run.optimizers[0].register_step_pre_hook(_raise)
                    run.optimizers[0].step()
            except ZeroDivisionError:
                run.trace.append(torch.ones(1))
            finally:
                if handle is not None:
                    handle.remove()


def _raise(*_: Any) -> None:
    raise ZeroDivisionError


def closure_step(loop: Loop, run: Run, step: int) -> None:
    (optimizer,) = run.optimizers

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loop.loss(run, step)
        loss.backward()
        run.draw()
        if loop.clip is not None:
            run.trace.append(nn.utils.clip_grad_norm_(run.model.parameters(), loop.clip).detach())
        return loss

    run.trace.append(optimizer.step(closure).detach())  # type: ignore[attr-defined]


def copying_step(loop: Loop, run: Run, step: int) -> None:
    """From the middle on a copy of the model is used beside it, forward and backward, and averaged as an EMA is."""
    plain_step(loop, run, step)
    if step == 20:
        run.others.append(copy.deepcopy(run.model))
    for other in run.others:
        with torch.no_grad():
            for mine, theirs in zip(other.parameters(), run.model.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)
        other.zero_grad()
        loss = other(loop.data(step)[0]).square().mean()
        loss.backward()
        run.trace += [loss.detach(), *(p.grad.clone() for p in other.parameters())]


def evaluating_step(loop: Loop, run: Run, step: int) -> None:
    """Evaluations in between, with and without no_grad, in the other mode."""
    run.model.eval()
    run.trace.append(run.model(loop.data(500 + step)[0]).detach())
    with torch.no_grad():
        run.trace.append(run.model(loop.data(600 + step)[0]))
    run.model.train()
    plain_step(loop, run, step)


def backward_step(loop: Loop, run: Run, step: int) -> None:
    """Optimizers that step within the backward."""
    loss = loop.loss(run, step)
    loss.backward()
    run.trace.append(loss.detach().clone())
    run.draw()


def in_backward(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One optimizer a parameter, which steps as soon as the gradient is there."""
    optimizers: list[torch.optim.Optimizer] = []
    for p in model.parameters():
        optimizer = torch.optim.AdamW([p], lr=1e-2)
        optimizers.append(optimizer)

        def hook(_p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(hook)
    return optimizers
