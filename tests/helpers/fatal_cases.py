"""Faults after which a process, or the store of the process group, is gone: each needs processes of its own."""

from __future__ import annotations

import atexit
import datetime
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from tests.helpers.fault_cases import SITES, STEPS, Case, judge, train
from tests.helpers.processes import RankError, run_ranks

__all__ = ["draw_fatal", "killed", "run_fatal", "without_server"]

PLACES = ("", "", "backward", "take", "observe", "push", "decode")  # where a rank dies; "" between two steps

_SERVER = """
import sys, time
from datetime import timedelta
from torch._C._distributed_c10d import TCPStore
store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60))
print(store.port, flush=True)
time.sleep(600)
"""


def draw_fatal(number: int, mesh: str, world: int) -> Case:
    """Draws a case."""
    choose = random.Random(f"{number} {mesh} {world} fatal")
    kind = choose.choice(("killed",) * 4 + ("server gone",))
    rank, at = choose.randrange(world), choose.randrange(STEPS)
    where = choose.choice(PLACES) if kind == "killed" else ""
    return Case(number, kind, mesh, choose.choice(("store", "files")), rank, at, where)


def run_fatal(folder: Path, case: Case, world: int, undisturbed: Any) -> list[str]:
    """Runs a case; returns what is wrong."""
    return (killed if case.kind == "killed" else without_server)(folder, case, world, undisturbed)


def serve() -> tuple[subprocess.Popen[bytes], int]:
    """Starts a process with the server of a store; returns it and the port."""
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE)
    assert server.stdout is not None
    with server.stdout as said:
        return server, int(said.readline())


def join(port: int) -> None:
    """Makes a new group of all ranks, by a server outside of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    store = TCPStore("127.0.0.1", port, None, False, datetime.timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))


def run_killed(values: dict[str, Any], path: str | None, port: int) -> None:
    """Trains until one rank is killed; the others end as their collectives fail."""
    case = Case(**values)
    join(port)

    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        hurt: Callable[[int], None] = lambda _: None  # noqa: E731
        if dist.get_rank() == case.rank:
            hurt = lambda step: kill() if step == case.at and not case.where else None  # noqa: E731
            if case.where and path is not None:
                owner, name = SITES[case.where]
                original, calls = vars(owner)[name], [0]

                def replaced(*args: Any, **kwargs: Any) -> Any:
                    calls[0] += 1
                    return kill() if calls[0] > case.at else original(*args, **kwargs)

                stack.enter_context(mock.patch.object(owner, name, replaced))
        try:
            train(case, None if path is None else Path(path), hurt, [])
        except BaseException:
            atexit._run_exitfuncs()  # which run_ranks leaves out
            raise


def killed(folder: Path, case: Case, world: int, undisturbed: Any) -> list[str]:
    """Kills a rank in the middle of a training; returns what is wrong."""
    path = folder / "record.jsonl"
    began = time.monotonic()
    server, port = serve()
    try:
        run_ranks(run_killed, world, values=asdict(case), path=str(path), port=port, timeout=90)
        return ["nobody was killed"]
    except RankError as error:
        said = str(error)
    finally:
        server.kill()
        server.wait()
    wrong = ["it took longer than 60 s"] if time.monotonic() - began > 60 else []
    if f"rank {case.rank}: no result" not in said:
        wrong.append(f"rank {case.rank} lives")
    for rank in set(range(world)) - {case.rank}:
        own = said.partition(f"rank {rank}: ")[2].partition("\nrank ")[0]
        if "Traceback" not in own or "fastfs/_" in own.rpartition("Traceback")[2]:
            wrong.append(f"rank {rank} has not ended as without a monitor: {own[-1500:]}")
    if case.merge == "store" and case.rank == 0 and case.at == 0 and not path.exists():
        return wrong
    return wrong + judge(path, case, world, undisturbed)


def run_without_server(values: dict[str, Any], path: str, port: int, server: int) -> tuple[bool, float]:
    """Trains while the store's server goes away; returns whether that changed the training, and how long it took."""
    case = Case(**values)
    join(port)
    fired: list[int] = []

    def hurt(step: int) -> None:
        if step == case.at and dist.get_rank() == 0:
            os.kill(server, signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = train(case, None, lambda _: None, fired)
        began = time.monotonic()
        watched = train(case, Path(path), hurt, fired)
    same = plain["losses"] == watched["losses"] and all(map(torch.equal, plain["parameters"], watched["parameters"]))
    return same, time.monotonic() - began


def without_server(folder: Path, case: Case, world: int, undisturbed: Any) -> list[str]:
    """Ends the store's server in the middle of a training; returns what is wrong."""
    path = folder / "record.jsonl"
    server, port = serve()
    try:
        found = run_ranks(
            run_without_server, world, values=asdict(case), path=str(path), port=port, server=server.pid, timeout=90
        )
    except RankError as error:
        return [str(error)[-3000:]]
    finally:
        server.kill()
        server.wait()
    wrong = [] if all(same for same, _ in found) else ["training differs"]
    return wrong + judge(path, case, world, undisturbed)
