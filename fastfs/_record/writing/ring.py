"""A double buffer of payloads on the device, copied to the host in batches.

    push: payload --copy on the device--> active buffer | spare buffer <--given back-- the writer thread
    swap:                                 active <-> spare; the full one goes to the writer thread
    fetch (writer thread): wait for the pushes on a stream of its own, copy to pinned memory, wait for that copy

The two buffers have a fixed size and are reused, so device memory is bounded. On the CPU the same happens without
streams, events and pinned memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfs._record.ranks.part import RankPart
from fastfs._record.record import Record

__all__ = ["Batch", "Decode", "Ring"]

Decode = Callable[[Tensor], Sequence[RankPart | Record]]
"""Converts a payload that has arrived on the host, a 1-D float64 tensor on the CPU, to parts of records."""


@dataclass(frozen=True)
class _Entry:
    """A payload at ``start:stop`` of the buffer with its decoder, or a part or record that is on the host."""

    start: int
    stop: int
    decode: Decode | None
    record: RankPart | Record | None


@dataclass(frozen=True)
class _Buffer:
    data: Tensor
    pushed: Any  # torch.cuda.Event recorded after the last push; None on the CPU


@dataclass(frozen=True)
class Batch:
    """What a swap returns: entries in order, and the buffer that holds their payloads."""

    entries: list[_Entry]
    buffer: _Buffer | None
    used: int


class Ring:
    """A bounded queue of payloads and records.

    It is not thread-safe: callers hold a lock around every method except :meth:`fetch`, which only one thread calls.

    Args:
        capacity: float64 numbers in each of the two buffers.
        most_entries: payloads and records in a batch.
    """

    def __init__(self, capacity: int, most_entries: int) -> None:
        self.capacity = capacity
        self._most_entries = most_entries
        self._entries: list[_Entry] = []
        self._used = 0
        self._active: _Buffer | None = None
        self._spare: _Buffer | None = None
        self._since = 0.0
        # Used by the writer thread alone, created at the first transfer from a GPU:
        self._pinned: Tensor | None = None
        self._stream: Any = None
        self._done: Any = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def since(self) -> float | None:
        """Time at which the oldest entry was added, by ``time.monotonic()``; None without entries."""
        return self._since if self._entries else None

    @property
    def half_full(self) -> bool:
        return 2 * self._used >= self.capacity or 2 * len(self._entries) >= self._most_entries

    @property
    def device_bytes(self) -> int:
        """Upper bound of the memory on the device, as long as no payload is larger than a buffer."""
        return 2 * 8 * self.capacity

    def put(self, record: RankPart | Record) -> bool:
        """Adds a part or record that is on the host. Returns False if there is no room."""
        return self._add(_Entry(0, 0, None, record))

    def push(self, payload: Tensor, decode: Decode) -> bool:
        """Copies a payload into the buffer on the current stream. Returns False if there is no room."""
        size = payload.numel()
        buffer = self._active
        if len(self._entries) >= self._most_entries:
            return False
        if buffer is None or buffer.data.device != payload.device or size > buffer.data.numel():
            buffer = self._make_room(payload.device, size)
        start, stop = self._used, self._used + size
        if stop > buffer.data.numel():
            return False
        if buffer.pushed is not None:
            stream = torch.cuda.current_stream(payload.device)
            stream.wait_event(buffer.pushed)  # the last push may be on another stream: the device waits, not the host
            buffer.data[start:stop].copy_(payload.detach())
            buffer.pushed.record(stream)
        else:
            buffer.data[start:stop].copy_(payload.detach())
        self._used = stop
        return self._add(_Entry(start, stop, decode, None))

    def swap(self) -> Batch | None:
        """Removes and returns all entries. Later pushes go to the other buffer."""
        if not self._entries:
            return None
        batch = Batch(self._entries, self._active if self._used else None, self._used)
        if self._used:
            self._active, self._spare = self._spare, None
        self._entries, self._used = [], 0
        return batch

    def give_back(self, batch: Batch) -> None:
        """Makes the buffer of a fetched batch available again."""
        buffer = batch.buffer
        if buffer is None or buffer.data.numel() < self.capacity:
            return
        if self._active is None:
            self._active = buffer
        elif self._spare is None:
            self._spare = buffer

    def fetch(self, batch: Batch) -> Tensor:
        """Waits for the payloads of a batch and returns a copy on the host. Called by one thread."""
        if batch.buffer is None:
            return torch.empty(0, dtype=torch.float64)
        data = batch.buffer.data[: batch.used]
        if batch.buffer.pushed is not None:
            return self._fetch_cuda(data, batch.buffer.pushed)
        if data.device.type != "cpu":
            return data.cpu()
        # NumPy copies it: a large copy by torch would start a second pool of OpenMP threads for this thread.
        return torch.from_numpy(data.numpy().copy())

    def _fetch_cuda(self, data: Tensor, pushed: Any) -> Tensor:
        with torch.cuda.device(data.device):
            if self._stream is None or self._stream.device != data.device:
                self._stream = torch.cuda.Stream(data.device)
                self._done = torch.cuda.Event(blocking=True)  # the host sleeps instead of spinning
            if self._pinned is None or self._pinned.numel() < data.numel():
                self._pinned = torch.empty(max(self.capacity, data.numel()), dtype=torch.float64, pin_memory=True)
            host = self._pinned[: data.numel()]
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(pushed)
                host.copy_(data, non_blocking=True)
                self._done.record(self._stream)
            self._done.synchronize()
        return torch.from_numpy(host.numpy().copy())

    def _add(self, entry: _Entry) -> bool:
        if len(self._entries) >= self._most_entries:
            return False
        if not self._entries:
            self._since = time.monotonic()
        self._entries.append(entry)
        return True

    def _make_room(self, device: torch.device, size: int) -> _Buffer:
        """Allocates a buffer on this device with room for a payload of this size, and moves waiting payloads to it."""
        if size > self.capacity:
            self.capacity = 4 * size
        old = self._active
        with torch.inference_mode(False):  # a tensor created in inference mode cannot be written to outside of it
            data = torch.empty(max(self.capacity, self._used + size), dtype=torch.float64, device=device)
            event = torch.cuda.Event() if device.type == "cuda" else None
            if old is not None and self._used:
                if old.pushed is not None:
                    stream = torch.cuda.current_stream(old.data.device)
                    stream.wait_event(old.pushed)
                    old.data.record_stream(stream)
                data[: self._used].copy_(old.data[: self._used])
        if self._spare is not None and (self._spare.data.device != device or self._spare.data.numel() < self.capacity):
            self._spare = None
        self._active = _Buffer(data, event)
        return self._active
