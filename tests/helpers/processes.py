"""Runs a function in several processes that form a group of ``torch.distributed``, as ``torchrun`` would."""

from __future__ import annotations

import datetime
import importlib
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.source_tree import ROOT

__all__ = ["RankError", "reset_accelerate", "run_ranks"]

_OF_TORCH = (".torch.jit.*is deprecated", "The .grad attribute of a Tensor that is not a leaf")  # as in pyproject.toml
_GRACE = 3.0  # seconds for the other ranks to fail by themselves, once one has failed


class RankError(RuntimeError):
    """A rank has failed, or not ended in time."""


def run_ranks(function: str | Callable[..., Any], world: int, *, timeout: float = 120, **arguments: Any) -> list[Any]:
    """Calls a function on every rank of a new group of processes (gloo), and returns the results in order.

    Every rank has one thread of torch, and warnings are errors in it. The group exists when the function is called.

    Args:
        function: A function at the top of a module, or its place as ``"package.module:name"``.
        world: The number of processes.
        timeout: Seconds after which all of them are killed.
        **arguments: Of the function, and anything that can be pickled, as its results.

    Returns:
        What each rank has returned.

    Raises:
        RankError: A rank has failed, with its traceback, or the time was up.
    """
    place = function if isinstance(function, str) else _place(function)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job").write_bytes(pickle.dumps((place, timeout, arguments)))
        ranks = [_start(folder, rank, world) for rank in range(world)]
        try:
            late = _wait(ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        results = [_result(folder, rank) for rank in range(world)]
        errors = [text for ok, text in results if not ok]
        if not errors:
            return [value for _, value in results]
        said = "\n".join((folder / f"output.{rank}").read_text(errors="replace")[-4000:] for rank in range(world))
        head = f"{place}: not over after {timeout} s" if late else f"{place} failed"
        raise RankError(f"{head}\n" + "\n".join(errors) + f"\noutput:\n{said}")


def reset_accelerate() -> None:
    """Forgets the settings that Accelerate keeps for the process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def _place(function: Callable[..., Any]) -> str:
    """Returns where a function is, from the root of the repository: pytest gives the modules of tests other names."""
    path = Path(inspect.getfile(function)).resolve().relative_to(ROOT)
    return ".".join(path.with_suffix("").parts) + f":{function.__name__}"


def _start(folder: Path, rank: int, world: int) -> subprocess.Popen[bytes]:
    group = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    environment = {**os.environ, **group, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (folder / f"output.{rank}").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "tests.helpers.processes", str(folder)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _wait(ranks: list[subprocess.Popen[bytes]], end: float) -> bool:
    """Waits until all have ended, or a little longer than until one has failed; returns whether the time was up."""
    failed = False
    while any(process.poll() is None for process in ranks):
        if not failed and any(process.poll() for process in ranks):
            failed, end = True, min(end, time.monotonic() + _GRACE)
        if time.monotonic() > end:
            return not failed
        time.sleep(0.02)
    return False


def _result(folder: Path, rank: int) -> tuple[bool, Any]:
    path = folder / f"result.{rank}"
    if not path.exists():
        return False, f"rank {rank}: no result"
    ok, value = pickle.loads(path.read_bytes())
    return ok, value if ok else f"rank {rank}: {value}"


def _run(folder: Path) -> bool:
    """Runs one rank, in its own process; returns whether it has succeeded."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place, timeout, arguments = pickle.loads((folder / "job").read_bytes())
    try:
        module, _, name = place.partition(":")
        function = getattr(importlib.import_module(module), name)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for message in _OF_TORCH:
                warnings.filterwarnings("ignore", message)
            value = function(**arguments)
        dist.barrier()
        dist.destroy_process_group()
        result = True, value
    except BaseException:
        result = False, traceback.format_exc()
    part = folder / f"part.{rank}"
    part.write_bytes(pickle.dumps(result))
    part.replace(folder / f"result.{rank}")
    return result[0]


if __name__ == "__main__":
    ended = _run(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0 if ended else 1)  # not by the destructors of a group that another rank has left
