"""The numbers of a training step, taken by hand: clones of everything, one more forward, float64."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.helpers.monitor_loops import Loop, cuda_randomness

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
            watch = HandWatch(run.model, layers, scale=1.0 if run.scaler is None else run.scaler.get_scale())
            loop.advance(run, step)
            result[step] = watch.finish(loop.precision())
        else:
            loop.advance(run, step)
    return result


class HandWatch:
    """Clones what passes by in one step.

    Args:
        model: The module that is called.
        layers: Names of layers that form a chain behind the stem.
        stem: Prefixes of the names of parameters before the first layer.
        scale: Factor of the loss that is to be divided out.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], stem: tuple[str, ...] = ("stem.",), scale: float = 1.0
    ) -> None:
        self.model = model
        self.layers = layers
        self.stem = stem
        self.scale = scale
        self.forwards: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.inside = self.again = False
        self.before: list[list[Tensor]] = [[] for _ in layers]
        self.backward: list[list[Tensor]] = [[] for _ in layers]
        self.after: list[list[Tensor]] = [[] for _ in layers]
        self.handles: list[Any] = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave),
        ]
        for index, name in enumerate(layers):
            module = model.get_submodule(name)
            self.handles.append(module.register_forward_hook(lambda _m, _a, out, i=index: self._tap(i, out)))
        self.old = [p.detach().double() for p in model.parameters()]
        self.old = [p.clone() for p in self.old]
        self.gradients = [torch.zeros_like(p) for p in self.old]
        for index, p in enumerate(model.parameters()):
            if p.requires_grad:
                self.handles.append(p.register_hook(lambda g, i=index: self._gradient(i, g)))

    def _enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.again and torch.is_grad_enabled() and self.model.training:
            self.inside = True
            inputs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
            self.forwards.append((*inputs, _random(), [b.clone() for b in self.model.buffers()]))

    def _leave(self, *_: Any) -> None:
        self.inside = False

    def _tap(self, index: int, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
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

    def finish(self, precision: AbstractContextManager[Any]) -> Columns:
        """Runs the forwards again, removes the hooks and returns the numbers."""
        self.again = True
        now, buffers = _random(), [b.clone() for b in self.model.buffers()]
        for args, kwargs, state, old in self.forwards:
            _set_random(state)
            _set_buffers(self.model, old)
            with torch.no_grad(), precision:
                self.model(*args, **kwargs)
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
        upstream = (*self.stem, *(f"{name}." for name in self.layers[: index + 1]))
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
