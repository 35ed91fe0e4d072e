"""Trainings of several ranks with a fault in one of them, and what has to hold for training and record.

A fault is drawn from a seed. Every rank runs the same list of cases (:func:`run_cases`) and reports, for each, whether
its training was that without a monitor; :func:`judge` then looks at the record.
"""

from __future__ import annotations

import errno
import faulthandler
import functools
import json
import os
import random
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fastfs
from fastfs._monitor.capture.capture import Capture
from fastfs._monitor.capture.replay import Replayer
from fastfs._monitor.capture.step_capture import StepCapture
from fastfs._monitor.engine import Engine
from fastfs._monitor.measure.learned_structure import LearnedStructure
from fastfs._monitor.measure.parameters import Parameters
from fastfs._monitor.measure.training_mode import TrainingMode
from fastfs._monitor.payload import StepCodec
from fastfs._record.encoding import TORN
from fastfs._record.ranks.assembly import Assembler
from fastfs._record.ranks.exchange import Inbox
from fastfs._record.ranks.part import RankPart
from fastfs._record.ranks.run_store import RunStore
from fastfs._record.writing.recorder import Recorder
from tests.helpers.parallel_cases import MESHES, global_batch, make_model, make_optimizer, parameters_of

__all__ = ["KINDS", "LIMIT", "SITES", "STEPS", "Case", "draw", "judge", "run_cases"]

STEPS = 5
LAYERS = r"^(embed|blocks\.\d+|norm)$"
PATIENCE = 1.0  # the monitor's rank_timeout
LIMIT = 60.0  # seconds that a case may take

SITES: dict[str, tuple[Any, str]] = {
    "forward begins": (Capture, "_begin"),
    "forward, a layer": (StepCapture, "_record_call"),
    "forward ends": (Capture, "_end"),
    "backward": (Capture, "_backward_begins"),
    "before the step": (Engine, "_before_measuring"),
    "parameters before": (Parameters, "before"),
    "parameters after": (Parameters, "after"),
    "check": (TrainingMode, "check"),
    "rows of a forward": (TrainingMode, "_triples"),
    "features of a forward": (Replayer, "_rows"),
    "collect": (Capture, "collect"),
    "take": (Parameters, "take"),
    "structure": (LearnedStructure, "learn"),
    "aligned": (Engine, "_aligned"),
    "observe": (TrainingMode, "observe"),
    "refusal": (TrainingMode, "refusal"),
    "encode": (StepCodec, "encode"),
    "push": (Recorder, "push"),
    "clear": (Engine, "clear"),
    "decode": (StepCodec, "decode"),
    "to bytes": (RankPart, "to_bytes"),
    "merge": (Assembler, "records"),
    "inbox": (Inbox, "_take"),
    "decide": (RunStore, "decide"),
    "vote": (RunStore, "_vote"),
    "store": (RunStore, "add"),
}
"""Where an exception is raised on one rank."""

AFTER = ("take", "structure", "aligned", "encode", "push")  # the step: an interrupt there takes nothing from training
APART = ("ddp", "single")  # meshes on which no second forward communicates
KINDS = ("exception",) * 12 + ("interrupt", "skipped step", "no rows", "stopped", "full disk", "torn write")
ERRORS: tuple[type[BaseException], ...] = (RuntimeError, ValueError, MemoryError, torch.OutOfMemoryError, OSError)


@dataclass
class Case:
    """One training with a fault."""

    number: int
    kind: str
    mesh: str
    merge: str
    rank: int  # on which it happens
    at: int  # number of the step, or of the call
    where: str = ""
    error: int = 0
    often: bool = False  # at every later call, too


def draw(number: int, mesh: str, world: int) -> Case:
    """Draws a case."""
    choose = random.Random(f"{number} {mesh} {world}")
    case = Case(
        number,
        choose.choice(KINDS),
        mesh,
        choose.choice(("store", "store", "files")),
        choose.randrange(world),
        choose.randrange(STEPS),
        choose.choice([name for name in SITES if mesh not in APART or name not in ("decide", "vote")]),
        choose.randrange(len(ERRORS)),
        choose.random() < 0.3,
    )
    if case.kind == "interrupt":
        case.where = choose.choice(AFTER)
        if mesh not in APART:  # the other ranks are in a collective, with and without a monitor
            case.kind = "exception"
    if case.where in ("merge", "inbox"):
        case.rank, case.merge = 0, "store"
    if case.where == "to bytes" and case.merge == "store" and case.rank == 0:
        case.rank = 1
    if case.where in ("forward, a layer", "rows of a forward", "features of a forward"):
        case.at = choose.randrange(3 * STEPS)
    if case.where == "check" or case.kind in ("full disk", "torn write"):  # which happens seldom
        case.at = 0
    if case.kind == "full disk" and case.merge == "store":
        case.rank = 0
    return case


# On the ranks


@contextmanager
def failing(owner: Any, name: str, case: Case, error: type[BaseException], fired: list[int]) -> Iterator[None]:
    """Makes a method raise at its n-th call, and perhaps at all later ones."""
    original, calls = vars(owner)[name], 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == case.at + 1 or (case.often and calls > case.at):
            fired.append(calls)
            raise error("injected")
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, replaced):
        yield


@contextmanager
def full_disk(case: Case, fired: list[int], torn: bool) -> Iterator[None]:
    """Makes writes to the record fail from one on; with ``torn``, part of it is written, and later ones succeed."""
    original, calls = os.write, 0

    def write(descriptor: int, data: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > case.at + 1 and (not torn or calls % 2 == 0):
            fired.append(calls)
            if torn and calls % 4 == 0:
                return original(descriptor, bytes(data)[: max(1, len(data) // 3)])
            raise OSError(errno.ENOSPC, "no space left on device")
        return original(descriptor, data)

    with mock.patch.object(os, "write", write):
        yield


def stop_at(when: int, fired: list[int], step: int) -> None:
    """Stops this process for longer than the monitor waits."""
    if step == when:
        fired.append(step)
        with subprocess.Popen(["sh", "-c", f"sleep {2.5 * PATIENCE}; kill -CONT {os.getpid()}"]):
            os.kill(os.getpid(), signal.SIGSTOP)


def batch(case: Case, step: int, batches: int, own: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (part.chunk(batches)[own] for part in global_batch(step))
    if case.kind == "no rows" and step >= case.at and own == case.rank % batches and batches > 1:
        return x[:0], y[:0]
    return x, y


def train(case: Case, path: Path | None, hurt: Callable[[int], None], fired: list[int]) -> dict[str, Any]:
    """Trains, with a monitor if there is a path."""
    model = make_model()
    wrapped, batches, own = MESHES[case.mesh](model)
    optimizer = make_optimizer(wrapped, "adamw")
    monitor = None
    if path is not None:
        monitor = fastfs.Monitor(
            wrapped, optimizer, layers=LAYERS, every=1, aligned_every=1, aligned_fraction=1.0, path=path,
            merge=case.merge, rank_timeout=PATIENCE, flush_seconds=0.2, verbose=False, alerts=(),
        )  # fmt: skip
    losses = []
    for step in range(STEPS):
        if monitor is not None:
            hurt(step)
        optimizer.zero_grad()
        x, y = batch(case, step, batches, own)
        loss = F.cross_entropy(wrapped(x).flatten(0, -2), y.flatten(), reduction="sum") / 8
        loss.backward()
        losses.append(loss.item())
        if case.kind == "skipped step" and step == case.at:
            fired.append(step)
            continue
        if monitor is not None:
            monitor.log(loss=loss)
        with suppress(KeyboardInterrupt):
            optimizer.step()
    dist.barrier()
    if monitor is not None:
        with suppress(*(ERRORS if case.where == "clear" else ())):
            monitor.close()
    return {"losses": losses, "parameters": parameters_of(model)}


def run_cases(cases: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Runs cases on all ranks; returns for each whether training on this rank was as without a monitor."""
    rank = dist.get_rank()
    found = []
    plain: dict[str, dict[str, Any]] = {}
    for values in cases:
        case = Case(**values)
        path = Path(folder) / f"{case.number}" / "record.jsonl"
        fired: list[int] = []
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        began = time.monotonic()
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")
            data = case.kind in ("no rows", "skipped step")
            key = json.dumps(values if data else case.mesh)
            if key not in plain:
                plain[key] = train(case, None, lambda _: None, [])
            hurt: Callable[[int], None] = lambda _: None  # noqa: E731
            if case.rank == rank:
                if case.kind in ("exception", "interrupt"):
                    error = KeyboardInterrupt if case.kind == "interrupt" else ERRORS[case.error]
                    stack.enter_context(failing(*SITES[case.where], case, error, fired))
                elif case.kind in ("full disk", "torn write"):
                    stack.enter_context(full_disk(case, fired, case.kind == "torn write"))
                elif case.kind == "stopped":
                    hurt = functools.partial(stop_at, case.at, fired)
            watched = train(case, path, hurt, fired)
        expected = plain.pop(key) if data else plain[key]
        same = watched["losses"] == expected["losses"] and all(
            torch.equal(a, b) for a, b in zip(watched["parameters"], expected["parameters"], strict=True)
        )
        seconds = time.monotonic() - began
        faulthandler.cancel_dump_traceback_later()
        found.append({"same": same, "fired": len(fired), "seconds": seconds})
        with (Path(folder) / f"done.{rank}").open("a") as file:
            file.write(json.dumps({"case": asdict(case), **found[-1]}) + "\n")
        dist.barrier()
    return found


# The record


def judge(path: Path, case: Case, world: int, undisturbed: Any) -> list[str]:
    """Returns what is wrong with the record of a case."""
    wrong: list[str] = []
    for file in sorted(path.parent.glob("*.jsonl")):
        *lines, rest = file.read_bytes().split(b"\n")
        whole = [line for line in lines if line and not line.endswith(TORN)]
        for line in whole:
            try:
                json.loads(line)
            except ValueError:
                wrong.append(f"{file.name}: half a line: {line[:60]!r}")
        if rest and case.kind not in ("full disk", "torn write", "killed"):
            wrong.append(f"{file.name}: no end of a line: {rest[:60]!r}")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            table = fastfs.load(path)
        except Exception as error:
            header_lost = case.kind in ("full disk", "torn write")
            return wrong if header_lost else [*wrong, f"does not load: {type(error).__name__}: {error}"]
    wrong += [f"warns: {each.message}" for each in warned]
    measured = table.reindex(columns=[*table, *{"ranks"} - set(table)])[table["kind"] == "measured"]
    short = measured["ranks"] < world
    if measured["valid"][short].astype(bool).any():
        wrong.append("a row without all ranks is valid")
    if measured.duplicated(["step", "layer"]).any():
        wrong.append("a step is measured twice")
    if not table["step"].is_monotonic_increasing:
        wrong.append("the steps are not in order")
    wrong += _compared(measured[measured["valid"].astype(bool)], case, undisturbed)
    said = {int(line["step"]) for line in table.attrs["skipped"]}
    steps = STEPS - (case.kind == "skipped step")
    silent = set(range(steps)) - said - set(measured["step"])
    lossy = case.kind in ("full disk", "killed") or case.where in (
        "decode",
        "to bytes",
        "inbox",
        "push",
        "encode",
        "store",
    )
    if silent and not lossy:
        wrong.append(f"nothing is said of steps {sorted(silent)}")
    return wrong


def _compared(valid: Any, case: Case, undisturbed: Any) -> list[str]:
    if case.kind in ("no rows", "skipped step"):
        return []
    names = ["angle", "update_rms", "backward_rms", "aligned_decrease", "residual", "parameter_update_norm"]
    both = valid.merge(undisturbed, on=["step", "layer"], suffixes=("", "_expected"))
    if len(both) != len(valid):
        return ["rows of unknown steps"]
    wrong = []
    for name in names:
        mine, theirs = both[name].to_numpy(float), both[f"{name}_expected"].to_numpy(float)
        known = ~np.isnan(mine)
        if not np.allclose(mine[known], theirs[known], rtol=1e-9, atol=1e-13):
            wrong.append(f"{name} of a valid row is not that of the undisturbed run")
    return wrong
