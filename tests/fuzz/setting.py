"""One small training run that is disturbed: a failure inside of the monitor, an interrupt anywhere."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from tests.fuzz.world import Picture, differences, global_state, picture, reset_switches

__all__ = [
    "MODES",
    "Injected",
    "Place",
    "Run",
    "Site",
    "failing_at",
    "faults_of_failure",
    "faults_of_interrupt",
    "interrupted_at",
    "train",
]

OURS = str(Path(fastfs.__file__).parent)
MODES = ("batch", "amplify", "jvp", "probe", "aligned", "autocast")
STEPS, DISTURBED = 5, 1


class Injected(Exception):
    """A failure that the monitor did not expect."""


class Net(nn.Module):
    """Buffers, dropout, a parametrisation, attention: what a second forward has to treat with care."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(2))
        if mode == "jvp":  # a spectral norm has no forward-mode derivative
            nn.utils.parametrize.register_parametrization(self.blocks[1][0], "weight", nn.Tanh())
        else:
            nn.utils.parametrizations.spectral_norm(self.blocks[1][0])
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        y, _ = self.attention(x[None], x[None], x[None], need_weights=False)
        out: Tensor = self.head(self.drop(x + y[0]))
        return out


@dataclass
class Run:
    """What came of it.

    Attributes:
        pictures: after every step, and after ``close()``.
        rows: of the record.
        said: the monitor's warnings.
        stopped: phase and progress at which an interrupt arrived in the loop.
        escaped: an exception that reached the loop.
        numbers: of every step, in the record.
    """

    pictures: list[Picture] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    stopped: tuple[str, int] | None = None
    escaped: str | None = None
    numbers: list[int] = field(default_factory=list)


class _Loop:
    def __init__(self, mode: str, stop: tuple[str, int] | None) -> None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        self.mode, self.stop = mode, stop
        self.model = Net(mode)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.phase, self.progress, self.number = "", 0, -1
        for module in self.model.modules():
            if not list(module.children()):
                module.register_forward_hook(self._count)
        self.optimizer.register_step_pre_hook(lambda *_: self._reach("before step", 0))
        self.optimizer.register_step_post_hook(lambda *_: self._reach("after step", 0))

    def _count(self, *_: Any) -> None:
        if self.phase == "forward":
            self._reach("forward", self.progress + 1)

    def _reach(self, phase: str, progress: int) -> None:
        """The loop is as far as that; without a monitor, an interrupt comes here."""
        self.phase, self.progress = phase, progress
        if self.stop == (phase, progress) and self.number == DISTURBED:
            raise KeyboardInterrupt

    def step(self) -> None:
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(100 + self.number)
        x, y = torch.randn(8, 8, generator=generator), torch.randint(3, (8,), generator=generator)
        self._reach("forward", 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mode == "autocast"):
            out = self.model(x)
        self._reach("loss", 0)
        loss = F.cross_entropy(out.float(), y)
        self._reach("backward", 0)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.phase = "before the step"
        self.optimizer.step()
        self._reach("done", 0)

    def monitor(self, rows: list[dict[str, Any]]) -> fastfs.Monitor:
        generator = torch.Generator().manual_seed(99)
        x, y = torch.randn(8, 8, generator=generator), torch.randint(3, (8,), generator=generator)
        options: dict[str, dict[str, Any]] = {
            "amplify": {"amplify": True},
            "jvp": {"mode": "jvp"},
            "probe": {"mode": "probe", "probe": (x, lambda out: F.cross_entropy(out, y))},
            "aligned": {"every": 4, "aligned_every": 1},  # the disturbed step is a predicted one
            "autocast": {"amplify": True, "aligned_every": 1},
        }
        keywords: dict[str, Any] = {
            "layers": r"blocks\.\d+$|attention$",
            "every": 1,
            "sinks": [rows.extend],
        } | options.get(self.mode, {})
        return fastfs.Monitor(self.model, self.optimizer, alerts=(), verbose=False, **keywords)


Around = Callable[[fastfs.Monitor], contextlib.AbstractContextManager[Any]]


def train(mode: str, *, around: Around | None = None, stop: tuple[str, int] | None = None) -> Run:
    """A run of a few steps; switches that a fault left are put back afterwards.

    Args:
        mode: of the monitor.
        around: with a monitor: a context of the monitor around the step that is disturbed.
        stop: without one: where an interrupt comes.
    """
    try:
        return contextvars.copy_context().run(_train, mode, around, stop)
    finally:
        reset_switches()


def _train(mode: str, around: Around | None, stop: tuple[str, int] | None) -> Run:
    loop, run = _Loop(mode, stop), Run()
    roots = {"model": loop.model, "optimizer": loop.optimizer}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        monitor = None if around is None else loop.monitor(run.rows)
        buffers = list(loop.model.buffers())
        for number in range(STEPS):
            loop.number = number
            context = around(monitor) if around and monitor and number == DISTURBED else contextlib.nullcontext()
            try:
                with context:
                    loop.step()
            except KeyboardInterrupt:
                run.stopped = (loop.phase, loop.progress)
            except Exception as error:  # not one of the loop's own
                run.escaped = run.escaped or f"step {number}, {type(error).__name__} in {loop.phase}: {error}"[:200]
            run.numbers.append(-1 if monitor is None else monitor.step - 1)
            if number != DISTURBED:  # the next step or close() may put things right
                same = [a is b for a, b in zip(buffers, loop.model.buffers(), strict=True)]
                run.pictures.append(picture(roots) | global_state() | {"buffers are the same objects": same})
        if monitor is not None:
            monitor.close()
        run.pictures.append(picture(roots, hooks=True) | global_state())
    run.said = [str(w.message) for w in said if "fastfs" in str(w.message)]
    return run


# Failures at the calls that the monitor makes


Site = tuple[str, int, str]
"""File, line and what is called there."""


def _site(frame: FrameType, what: str) -> Site:
    return (frame.f_code.co_filename.removeprefix(OURS), frame.f_lineno, what)


@contextlib.contextmanager
def failing_at(seen: list[Site], number: int | None) -> Iterator[None]:
    """Raises at the ``number``-th call that code of fastfs makes, of Python or of C; ``seen`` gets all of them.

    Garbage is not collected meanwhile: what runs then is called by Python, and its exceptions go nowhere.
    """

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and frame.f_code.co_filename.startswith(OURS):
            found = _site(frame, getattr(argument, "__name__", "?"))
        elif _while_freeing(frame.f_code):
            return
        elif event == "call" and (back := frame.f_back) is not None and back.f_code.co_filename.startswith(OURS):
            found = _site(back, frame.f_code.co_name)
        else:
            return
        seen.append(found)
        if len(seen) - 1 == number:
            sys.setprofile(None)
            raise Injected(f"at {found}")

    with _garbage_kept():
        sys.setprofile(profile)
        try:
            yield
        finally:
            sys.setprofile(None)


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# Interrupts at bytecodes


Place = tuple[CodeType, int]
"""A bytecode."""


@contextlib.contextmanager
def interrupted_at(seen: dict[Place, int], at: Place | None, *, nth: int = 0) -> Iterator[None]:
    """A KeyboardInterrupt at a bytecode of fastfs, or of what it calls.

    Args:
        seen: how often every bytecode has run.
        at: at which one; None for none.
        nth: at which time that it runs.
    """

    def local(frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "opcode":
            place = (frame.f_code, frame.f_lasti)
            times = seen[place] = seen.get(place, 0) + 1
            if place == at and times == nth + 1:
                sys.settrace(None)
                raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        back = frame.f_back
        if _while_freeing(frame.f_code):
            return None
        if frame.f_code.co_filename.startswith(OURS) or (back is not None and back.f_trace is not None):
            frame.f_trace_opcodes = True
            return local
        return None

    with _garbage_kept():
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(None)


def _while_freeing(code: CodeType) -> bool:
    """Whether Python runs it when an object is freed: an exception in it goes nowhere, not even an interrupt."""
    return code.co_name in ("__del__", "_remove_id") or code.co_filename.endswith(("/weakref.py", "/_weakrefset.py"))


def said_of(place: Place) -> str:
    """In words."""
    code, offset = place
    lines = [line for start, end, line in code.co_lines() if start <= offset < end]
    return f"{code.co_filename.rsplit('/', 1)[-1]}:{lines[0] if lines else '?'} {code.co_name}"


# The judges


def faults_of_failure(mode: str, off: Run, number: int) -> list[str]:
    """A failure at that call: what of the training or the record is not as it should be."""
    seen: list[Site] = []
    on = train(mode, around=lambda _: failing_at(seen, number))
    if on.escaped or on.stopped:
        return [f"{seen[number]}: {on.escaped or on.stopped} reached the loop"]
    return [f"{seen[number]}: {fault}" for fault in [*_altered(off, on), *_unmeasured(mode, on)]]


def faults_of_interrupt(mode: str, at: Place, nth: int, plain: dict[Any, Run]) -> list[str]:
    """An interrupt there. ``plain`` keeps the runs without a monitor."""
    seen: dict[Place, int] = {}
    on = train(mode, around=lambda _: interrupted_at(seen, at, nth=nth))
    if on.stopped is None:
        return [f"{said_of(at)}: the interrupt did not reach the loop"] if seen.get(at, 0) > nth else []
    stop = ("before step", 0) if on.stopped[0] == "before the step" else on.stopped
    if stop not in plain:
        plain[stop] = train(mode, stop=stop)
    found = [on.escaped] if on.escaped else [*_altered(plain[stop], on), *_unmeasured(mode, on)]
    return [f"{said_of(at)} in {on.stopped[0]}: {fault}" for fault in found]


def _altered(off: Run, on: Run) -> list[str]:
    for number, (a, b) in enumerate(zip(off.pictures, on.pictures, strict=True)):
        if found := differences(a, b, 1):
            when = "after close()" if number == STEPS - 1 else f"step {number + (number >= DISTURBED)}"
            return [f"training altered, {when}: {found[0]}"]
    return []


def _unmeasured(mode: str, on: Run) -> list[str]:
    """The steps after the disturbed one have their rows, of one micro-batch."""
    rows = {row["step"]: row for row in on.rows if row["kind"] in ("measured", "predicted")}
    for iteration in range(DISTURBED + 1, STEPS):
        row = rows.get(on.numbers[iteration])
        if row is None and iteration == DISTURBED + 1 and any("the schedule failed" in text for text in on.said):
            continue  # whether that step was due is not known
        if row is None:
            return [f"the step {iteration - DISTURBED} after it was not measured: {on.said}"]
        if row.get("micro_batches", 1) != 1:
            return [f"the step {iteration - DISTURBED} after it has {row['micro_batches']} micro-batches"]
    return []
