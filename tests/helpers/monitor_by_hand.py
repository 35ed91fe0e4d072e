"""The numbers of a training step, taken by hand: clones of everything, one more forward, float64."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.helpers.monitor_loops import Loop, Run, cuda_randomness

Columns = dict[str, list[float]]


def by_hand(loop: Loop, steps: Sequence[int], layers: Sequence[str]) -> dict[int, Columns]:
    """What batch mode is to record of some steps of a loop: step -> column -> one value a layer.

    The loop must run its layers in plain sight: without checkpoints and torch.compile. The aligned decrease is that
    of a chain: a stem, then the layers, in the order given.
    """
    run = loop.start()[0]
    result = {}
    for step in range(max(steps) + 1):
        if step in steps:
            watch = _Watch(run, layers)
            loop.advance(run, step)
            result[step] = watch.finish(loop)
        else:
            loop.advance(run, step)
    return result


class _Watch:
    """Clones what passes by in one step."""

    def __init__(self, run: Run, layers: Sequence[str]) -> None:
        self.model = run.model
        self.layers = layers
        self.scale = 1.0 if run.scaler is None else run.scaler.get_scale()
        self.forwards: list[tuple[Tensor, Any, list[Tensor]]] = []
        self.inside = self.again = False
        self.before: list[list[Tensor]] = [[] for _ in layers]
        self.backward: list[list[Tensor]] = [[] for _ in layers]
        self.after: list[list[Tensor]] = [[] for _ in layers]
        self.handles: list[Any] = [
            run.model.register_forward_pre_hook(self._enter),
            run.model.register_forward_hook(self._leave),
        ]
        for index, name in enumerate(layers):
            module = run.model.get_submodule(name)
            self.handles.append(module.register_forward_hook(lambda _m, _a, out, i=index: self._tap(i, out)))
        self.old = [p.detach().double() for p in run.model.parameters()]
        self.old = [p.clone() for p in self.old]
        self.gradients = [torch.zeros_like(p) for p in self.old]
        for index, p in enumerate(run.model.parameters()):
            if p.requires_grad:
                self.handles.append(p.register_hook(lambda g, i=index: self._gradient(i, g)))

    def _enter(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not self.again and torch.is_grad_enabled() and self.model.training:
            self.inside = True
            self.forwards.append((args[0].clone(), _random(), [b.clone() for b in self.model.buffers()]))

    def _leave(self, *_: Any) -> None:
        self.inside = False

    def _tap(self, index: int, output: Tensor) -> None:
        if self.again:
            self.after[index].append(output.detach().double().clone())
        elif self.inside:
            place = len(self.before[index])
            self.before[index].append(output.detach().double().clone())
            self.backward[index].append(torch.zeros_like(self.before[index][-1]))
            if output.requires_grad:
                output.register_hook(lambda g: self.backward[index].__setitem__(place, g.detach().double().clone()))

    def _gradient(self, index: int, gradient: Tensor) -> None:
        self.gradients[index] += gradient.double()

    def finish(self, loop: Loop) -> Columns:
        self.again = True
        now, buffers = _random(), [b.clone() for b in self.model.buffers()]
        for x, state, old in self.forwards:
            _set_random(state)
            _set_buffers(self.model, old)
            with torch.no_grad(), loop.precision():
                self.model(x)
        _set_random(now)
        _set_buffers(self.model, buffers)
        for handle in self.handles:
            handle.remove()
        rows = [self._row(index) for index in range(len(self.layers))]
        return {key: [row[key] for row in rows] for key in rows[0]}

    def _row(self, index: int) -> dict[str, float]:
        nothing = [torch.zeros(0, dtype=torch.float64)]
        f, g, b = (
            torch.cat([x.flatten() for x in parts[index]] or nothing)
            for parts in (self.before, self.after, self.backward)
        )
        b, df = b / self.scale, g - f
        decrease = 0.0
        upstream = ("stem.", *(f"{name}." for name in self.layers[: index + 1]))
        for (name, p), old, gradient in zip(self.model.named_parameters(), self.old, self.gradients, strict=True):
            if name.startswith(upstream):
                decrease -= float((gradient / self.scale * (p.detach().double() - old)).sum())
        return {
            "cos_angle": float(-(df @ b) / (df.norm() * b.norm())),
            "update_rms": float(df.square().mean().sqrt()),
            "feature_rms": float(f.square().mean().sqrt()),
            "backward_rms": float(b.square().mean().sqrt()),
            "count": float(f.numel()),
            "aligned_decrease": decrease,
        }


def _random() -> Any:
    return torch.get_rng_state(), random.getstate(), np.random.get_state(), cuda_randomness()  # noqa: NPY002


def _set_random(state: Any) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])  # noqa: NPY002
    for device, cuda in enumerate(state[3]):
        torch.cuda.set_rng_state(cuda, device)


def _set_buffers(model: nn.Module, values: Sequence[Tensor]) -> None:
    for buffer, value in zip(model.buffers(), values, strict=True):
        buffer.copy_(value)
