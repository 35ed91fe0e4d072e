"""Keys that the monitors of one run share, in the key-value store of torch.distributed.

The store is the one by which the process group was set up, over a connection of its own: calls from the writer's thread
do not block those that torch makes. Nothing here is a collective, so a rank that is slow, stopped or dead delays
nobody for longer than a timeout.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import distributed_c10d

__all__ = ["RankError", "RunStore"]

_KEPT = 4  # decisions whose keys are kept, since a slow rank may still read them


class RankError(RuntimeError):
    """The ranks of a run could not agree."""


class RunStore:
    """The shared keys of one monitor.

    The monitors that the ranks attach are matched in the order in which each rank attaches them.

    Args:
        ranks: Numbers of the ranks of the run.
        rank: This rank.
        timeout: Longest time to wait for another rank, in seconds.

    Raises:
        RankError: There is no store, or it does not answer.
    """

    def __init__(self, ranks: Sequence[int], rank: int, timeout: float) -> None:
        self.ranks = tuple(ranks)
        self.rank = rank
        self.timeout = timeout
        try:
            self._base = distributed_c10d._get_default_store()
            self._store = _connection(self._base, timeout)
            self._number = self._store.add(f"fastfs/attached/{rank}", 1)
        except Exception as error:
            raise RankError(f"the store of the process group does not answer ({error})") from error
        self._prefix = f"fastfs/{self._number}"
        self._decisions: list[list[str]] = []
        self._hasty = False  # a rank did not come in time, so the next decisions do not wait long

    def release(self) -> None:
        """Undoes the attachment, which has failed: the next monitor of this rank takes its place."""
        self._store.add(f"fastfs/attached/{self.rank}", -1)

    def other_connection(self) -> RunStore:
        """Returns the same keys over a connection of its own, for another thread."""
        other = object.__new__(RunStore)
        other.__dict__.update(self.__dict__)
        other._store = _connection(self._base, self.timeout)
        other._decisions = []
        return other

    # Values

    def first(self, name: str, value: str) -> str:
        """Sets a value unless another rank has, and returns the value that counts: the same on all ranks."""
        return _text(self._store.compare_set(self._key(name), "", value))

    def set(self, name: str, value: bytes) -> None:
        """Sets a value."""
        self._store.set(self._key(name), value)

    def take(self, name: str) -> bytes | None:
        """Returns a value and deletes it; None if it is not there yet."""
        key = self._key(name)
        if not self._store.check([key]):
            return None
        value = bytes(self._store.get(key))
        self._store.delete_key(key)
        return value

    def read(self, name: str) -> bytes | None:
        """Returns a value; None if it is not there."""
        key = self._key(name)
        return bytes(self._store.get(key)) if self._store.check([key]) else None

    def add(self, name: str, amount: int) -> int:
        """Adds to a counter and returns it."""
        return int(self._store.add(self._key(name), amount))

    # Agreement

    def gather(self, name: str, value: str) -> list[str]:
        """Waits until every rank has given its value.

        Args:
            name: Of the values.
            value: Of this rank.

        Returns:
            The values in the order of the ranks.

        Raises:
            RankError: A rank has not come in time; the message names it.
        """
        self._store.set(self._key(f"{name}/{self.rank}"), value)
        keys = [self._key(f"{name}/{rank}") for rank in self.ranks]
        try:
            self._store.wait(keys, timedelta(seconds=self.timeout))
        except Exception as error:
            missing = [rank for rank, key in zip(self.ranks, keys, strict=True) if not self._store.check([key])]
            if not missing:
                raise RankError(str(error)) from error
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise RankError(f"no answer from rank {shown} of {len(self.ranks)} within {self.timeout:g} s") from error
        return [_text(self._store.get(key)) for key in keys]

    def decide(self, name: str, vote: str, refusal: str | None) -> str | None:
        """Decides with all ranks whether to do something together. The decision is the same on every rank.

        A rank that refuses decides at once. Otherwise the last rank to vote does, or the first one whose patience ends.

        Args:
            name: Of the decision.
            vote: What the ranks have to have in common.
            refusal: Why this rank cannot take part; None if it can.

        Returns:
            None if all take part, else why not.
        """
        key = self._key(f"decide/{name}")
        self._forget_old([key, f"{key}/vote", f"{key}/votes"])
        store, go = self._store, "go"
        if refusal is not None:
            return _reason(store.compare_set(key, "", f"rank {self.rank}: {refusal}"))
        first = _text(store.compare_set(f"{key}/vote", "", vote or "-"))
        if first != (vote or "-"):
            return _reason(store.compare_set(key, "", f"rank {self.rank} has run {vote}, another rank {first}"))
        if store.add(f"{key}/votes", 1) == len(self.ranks):
            self._hasty = False
            return _reason(store.compare_set(key, "", go))
        try:
            store.wait([key], timedelta(seconds=min(self.timeout, 1.0) if self._hasty else self.timeout))
        except Exception:
            votes = store.add(f"{key}/votes", 0)
            self._hasty = True
            text = f"only {votes} of {len(self.ranks)} ranks came to the measurement within {self.timeout:g} s"
            return _reason(store.compare_set(key, "", text))
        return _reason(store.get(key))

    def _forget_old(self, keys: list[str]) -> None:
        self._decisions.append(keys)
        if len(self._decisions) > _KEPT:
            old = self._decisions.pop(0)
            if self.rank == self.ranks[0]:
                for key in old:
                    self._store.delete_key(key)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"


def _connection(store: Any, timeout: float) -> Any:
    """Returns a connection of its own to the server of a store."""
    if hasattr(store, "clone"):
        own = store.clone()
    else:  # torch before 2.9
        own = store
        while isinstance(own, PrefixStore):
            own = own.underlying_store
        if isinstance(own, TCPStore):
            own = TCPStore(own.host, own.port, None, False, timedelta(seconds=timeout))
    own.set_timeout(timedelta(seconds=timeout))
    return own


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _reason(value: bytes | str) -> str | None:
    text = _text(value)
    return None if text == "go" else text
