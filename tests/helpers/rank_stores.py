"""Stores of torch.distributed in one process, with faults and with a clock of the test's own."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch._C._distributed_c10d import FileStore, HashStore, TCPStore
from torch.distributed import distributed_c10d

from fastfs._record.ranks.part import Place, RankPart
from fastfs._record.ranks.run_store import RunStore
from fastfs._record.record import Record

__all__ = ["STORES", "Clock", "CountingAssembler", "FaultyStore", "make_store", "run_stores", "small_part"]

STORES = ("hash", "tcp", "file")


class Clock:
    """Stands for the module ``time``: time passes only by ``sleep``."""

    def __init__(self) -> None:
        self.now = 100.0
        self.asleep: Callable[[], None] = lambda: None  # called in every sleep

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.asleep()


class FaultyStore:
    """A store whose calls fail now and then, before or after the server has done what they ask for.

    Args:
        store: The store.
        seed: Of the faults.
        share: Of the calls that fail.
    """

    def __init__(self, store: Any, seed: int, share: float) -> None:
        self._store = store
        self._random = random.Random(seed)
        self._share = share

    def clone(self) -> FaultyStore:
        if self._share >= 1.0:
            raise ConnectionError("gone")
        other = FaultyStore(self._store, 0, self._share)
        other._random = self._random
        return other

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)

        def faulty(*args: Any) -> Any:
            fails = self._random.random() < self._share
            if fails and self._random.random() < 0.5:
                raise ConnectionError("before")
            result = call(*args)
            if fails:
                raise ConnectionError("after")
            return result

        return faulty


def make_store(kind: str, folder: Path) -> Any:
    if kind == "hash":
        return HashStore()
    if kind == "file":
        return FileStore(str(folder / "store"), -1)
    return TCPStore("localhost", 0, None, True, timedelta(seconds=20))


def run_stores(base: Any, world: int, timeout: float) -> list[RunStore]:
    """Returns what the monitors of all ranks share, as if each were a process of its own."""
    with mock.patch.object(distributed_c10d, "_get_default_store", return_value=base):
        return [RunStore(range(world), rank, timeout) for rank in range(world)]


def small_part(rank: int, step: int, world: int, kind: str = "measured", **facts: Any) -> RankPart:
    place = Place(rank, tuple(range(world)), (rank,))
    return RankPart(kind, step, float(step), place, {"loss": 1.0}, facts, {"sums": np.full((2, 9), rank + 1.0)})


class CountingAssembler:
    """Makes records that say of which ranks they are."""

    def records(self, parts: list[RankPart]) -> list[Record]:
        who = ",".join(str(part.place.rank) for part in parts)
        return [Record(parts[0].kind, parts[0].step, parts[0].time, {"ranks": len(parts), "who": who})]
