"""Numbers by hand for forwards that write: a copy of the module, made before the forward, runs it after the step."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.writes import Write

__all__ = ["WritingHand", "copies"]

_UNCOPIED = ("python generator", "global list")


def copies(writes: Sequence[Write]) -> bool:
    """Whether a copy of the module holds everything that the forward writes to."""
    return not any(write.how in _UNCOPIED or write.target in ("foreign", "closure") for write in writes)


@dataclass
class _Forward:
    replica: Any
    x: Tensor
    randomness: Any
    before: dict[str, Tensor] = field(default_factory=dict)
    backward: dict[str, Tensor] = field(default_factory=dict)


class WritingHand:
    """Watches a run without a monitor."""

    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[Tensor, Tensor, Tensor]] | None] = []
        self._forwards: list[_Forward] = []
        self._open: _Forward | None = None
        self._handles: list[Any] = []

    def attach(self, model: Any, parameters: list[Tensor]) -> None:
        self._model, self._parameters = model, parameters
        for name, block in model.blocks.named_children():
            self._handles.append(block.register_forward_hook(_Tap(self, name)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def enter(self, x: Tensor) -> None:
        """Right before a forward that counts."""
        hooks = [block._forward_hooks for block in self._model.blocks]
        taps = [{key: h for key, h in each.items() if isinstance(h, _Tap)} for each in hooks]
        for each, mine in zip(hooks, taps, strict=True):  # which a copy must not have
            for key in mine:
                del each[key]
        replica = copy.deepcopy(self._model)
        for each, mine in zip(hooks, taps, strict=True):
            each.update(mine)
        self._entry = [p.detach().clone() for p in self._parameters]
        self._open = _Forward(replica, x.clone(), _random())
        self._forwards.append(self._open)

    def leave(self) -> None:
        self._open = None

    def tap(self, name: str, output: Tensor) -> None:
        forward = self._open
        if forward is not None and torch._C._current_graph_task_id() == -1:
            forward.before[name] = output.detach().double().clone()
            forward.backward[name] = torch.zeros_like(forward.before[name])

            def arrive(gradient: Tensor) -> None:
                forward.backward[name] = gradient.detach().double().clone()

            if output.requires_grad:
                output.register_hook(arrive)

    def before_step(self) -> None:
        # What a forward does to trained parameters is no update of the optimizer's, and cannot be told from one here.
        self._moved = any(not torch.equal(a, b) for a, b in zip(self._entry, self._parameters, strict=True))

    def after_step(self, autocast: bool) -> None:
        forwards, self._forwards = self._forwards, []
        if self._moved:
            self.steps.append(None)
            return
        now = _random()
        parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        names = {id(p): name for name, p in self._model.named_parameters()}
        for forward in forwards:
            theirs = dict(forward.replica.named_parameters())
            for p in self._parameters:
                if id(p) in names and names[id(p)] in theirs:
                    theirs[names[id(p)]].data = p.detach().clone()
            after = self._again(forward, autocast)
            for name, before in forward.before.items():
                parts.setdefault(name, []).append((before, forward.backward[name], after[name]))
        _give(now)
        numbers = {}
        for name, found in parts.items():
            f, b, g = (torch.cat([triple[number].flatten() for triple in found]) for number in range(3))
            numbers[name] = (f, b, g)
        self.steps.append(numbers)

    def _again(self, forward: _Forward, autocast: bool) -> dict[str, Tensor]:
        """The features of the copy."""
        after: dict[str, Tensor] = {}

        def tap(name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
            after[name] = output.detach().double()

        for name, block in forward.replica.blocks.named_children():
            block.register_forward_hook(functools.partial(tap, name))
        _give(forward.randomness)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            forward.replica(forward.x)
        return after

    def faults(self, rows: list[dict[str, Any]], tolerance: float) -> list[str]:
        """Of the rows of the same run with a monitor."""
        found = []
        for row in rows:
            numbers = self.steps[row["step"]] if row["kind"] == "measured" and row["step"] < len(self.steps) else None
            if numbers is None or not row["valid"]:
                continue
            f, b, after = numbers[row["name"].rsplit(".", 1)[-1]]
            df = after - f
            want = {
                "cos_angle": float(-torch.dot(df, b) / (df.norm() * b.norm())),
                "update_rms": float(df.norm()) / math.sqrt(f.numel()),
                "feature_rms": float(f.norm()) / math.sqrt(f.numel()),
                "backward_rms": float(b.norm()) / math.sqrt(f.numel()),
            }
            for key, value in want.items():
                if not abs(row[key] - value) <= tolerance * max(abs(value), 0.1 * (key == "cos_angle")):
                    found.append(f"step {row['step']}, {row['name']}: valid, {key} {row[key]}, by hand {value:.7g}")
                    break
        return found


class _Tap:
    def __init__(self, hand: WritingHand, name: str) -> None:
        self._hand, self._name = hand, name

    def __call__(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self._hand.tap(self._name, output)


def _random() -> Any:
    return torch.get_rng_state(), random.getstate()


def _give(state: Any) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
