"""Keys that the monitors of one run share, in the key-value store of torch.distributed.

The store is the one by which the process group was set up, over a connection of its own: calls from the writer's thread
do not block those that torch makes. Nothing here is a collective, so a rank that is slow, stopped or dead delays
nobody for longer than a timeout.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import distributed_c10d

__all__ = ["RankError", "RunStore"]

_KEPT = 4  # decisions whose keys are kept, since a slow rank may still read them
_HASTY = 1.0  # seconds that a rank waits for the others after one has not come
_GO = "go"
_ROOT = "fastfs"


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
            self._number = self._store.add(f"{_ROOT}/{_attempt()}/attached/{rank}", 1)
        except Exception as error:
            raise RankError(f"the store of the process group does not answer ({error})") from error
        self._prefix = f"{_ROOT}/{_attempt()}/{self._number}"
        self._decisions: list[list[str]] = []
        self._hasty = False  # a rank did not come in time, so the next decisions do not wait long

    def release(self) -> None:
        """Undoes the attachment, which has failed: the next monitor of this rank takes its place."""
        self._store.add(f"{_ROOT}/{_attempt()}/attached/{self.rank}", -1)

    def other_connection(self) -> RunStore:
        """Returns the same keys over a connection of its own, for another thread."""
        other = object.__new__(RunStore)
        other.__dict__.update(self.__dict__)
        other._store = _connection(self._base, self.timeout)
        other._decisions = []
        return other

    def reconnect(self, error: Exception) -> None:
        """Makes a new connection after a call has failed. If that fails, all later calls do, and at once.

        Args:
            error: Of the call.
        """
        if not isinstance(error, RankError):
            try:
                self._store = _connection(self._store, self.timeout)
            except Exception as failure:
                self._store = _Gone(failure)

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
        with suppress(Exception):  # the value counts; the next call will tell
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

    def collect(self, name: str, value: str) -> list[str]:
        """Waits until every rank has given its value. The work of a rank does not grow with the number of ranks.

        Args:
            name: Of the values.
            value: Of this rank.

        Returns:
            The different values, in the same order on every rank.

        Raises:
            RankError: A rank has not come in time; the message names it.
        """
        store, kinds = self._store, self._key(f"{name}/kinds")
        digest = hashlib.sha256(value.encode()).hexdigest()
        if store.add(self._key(f"{name}/of/{digest}"), 1) == 1:  # the first one with this value
            store.set(f"{kinds}/{store.add(kinds, 1)}", value)
        store.set(self._key(f"{name}/here/{self.rank}"), "here")
        complete = self._key(f"{name}/complete")
        if store.add(self._key(f"{name}/count"), 1) == len(self.ranks):
            store.set(complete, "complete")
        try:
            store.wait([complete], timedelta(seconds=self.timeout))
        except Exception as error:
            missing = [rank for rank in self.ranks if not store.check([self._key(f"{name}/here/{rank}")])]
            store.add(self._key(f"{name}/count"), -1)  # this rank may try again
            if not missing:
                raise RankError(str(error)) from error
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise RankError(f"no answer from rank {shown} of {len(self.ranks)} within {self.timeout:g} s") from error
        return [_text(store.get(f"{kinds}/{number}")) for number in range(1, store.add(kinds, 0) + 1)]

    def decide(self, name: str, vote: str, refusal: str | None) -> str | None:
        """Decides with all ranks whether to do something together. The decision is the same on every rank.

        A rank that refuses decides at once. Otherwise the last rank to vote does, or the first one whose patience ends.
        Whoever decides writes the decision only if there is none, and returns what is there: after a failure, too, it
        is asked for over a new connection, since the ranks that have it may already be waiting for this one.

        Args:
            name: Of the decision; each rank may ask for it once.
            vote: What the ranks have to have in common.
            refusal: Why this rank cannot take part; None if it can.

        Returns:
            None if all take part, else why not.
        """
        key = self._key(f"decide/{name}")
        try:
            decision = self._vote(key, vote, refusal)
        except Exception as error:
            self.reconnect(error)
            text = f"rank {self.rank}: the store did not answer ({type(error).__name__}: {error})"
            decision = _text(self._store.compare_set(key, "", text))
        self._hasty = self._hasty and decision != _GO
        self._forget_old([key, f"{key}/vote", f"{key}/votes"], self.rank == self.ranks[0] or decision != _GO)
        return None if decision == _GO else decision

    def _vote(self, key: str, vote: str, refusal: str | None) -> str:
        """Returns the decision."""
        store, patience = self._store, min(self.timeout, _HASTY) if self._hasty else self.timeout
        if refusal is not None:
            return _text(store.compare_set(key, "", f"rank {self.rank}: {refusal}"))
        vote = vote or "-"  # the empty value would count as none
        first = _text(store.compare_set(f"{key}/vote", "", vote))
        if first != vote:
            return _text(store.compare_set(key, "", f"rank {self.rank} has run {vote}, another rank {first}"))
        if store.add(f"{key}/votes", 1) == len(self.ranks):
            return _text(store.compare_set(key, "", _GO))
        try:
            store.wait([key], timedelta(seconds=patience))
        except Exception:
            self._hasty = True
            votes = store.add(f"{key}/votes", 0)
            text = f"only {votes} of {len(self.ranks)} ranks came to the measurement within {patience:g} s"
            return _text(store.compare_set(key, "", text))
        return _text(store.get(key))

    def _forget_old(self, keys: list[str], own: bool) -> None:
        """Deletes keys of earlier decisions: the first rank does, and every rank those that not all have taken part in.

        Args:
            keys: Of the decision that is over.
            own: Whether this rank deletes them later.
        """
        self._decisions.append(keys if own else [])
        if len(self._decisions) > _KEPT:
            with suppress(Exception):  # the decision counts, whatever becomes of old ones
                for key in self._decisions.pop(0):
                    self._store.delete_key(key)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"


def _attempt() -> str:
    """Returns the number of torchrun's attempt: after a restart, its store may still have the keys of the last one."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


class _Gone:
    """Stands for a store that cannot be reached."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise RankError(f"the store of the process group cannot be reached ({self._error})")


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
