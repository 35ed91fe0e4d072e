"""A model of the time of a launch of `segment_sums`, in blocks: what the design costs beside reading the bytes.

Blocks stream chunks at their share of the bandwidth, or slower if few are running. Between two chunks of a slot lie
the start of a chunk, its reduction and the way of its partial sums to the segment. The model follows every chunk: which
slot takes it, when it ends, and whether its block was the last of a group or of a segment and had to add up the others.
The former design (a grid of fixed size, whose blocks stride over the chunks) and the present one (a block for every
chunk, which the hardware starts when another one ends) differ only there.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Microseconds, fitted to the run on an H100; `unevenness` is the spread of the rates of blocks, a fraction."""

    trip: float  # to the L2 and back, while the memory is busy: a store that a fence waits for, an atomic, a load
    between: float  # a block that ends, the start of the next, and its first load
    reduction: float  # of a chunk over the block
    stream: float  # from the issue of a block's loads to their use, with nothing else on the multiprocessor
    unevenness: float


@dataclass(frozen=True)
class Gpu:
    """Slots are blocks that run at the same time; the bandwidth is in bytes per microsecond."""

    multiprocessors: int
    bandwidth: float


@dataclass(frozen=True)
class Finish:
    """How partial sums come together."""

    group: int  # chunks
    arrive: float  # trips to memory until a block knows whether it is the last; a second fence counts half
    at_once: int  # partial sums that are read in one trip


FORMER = Finish(group=64, arrive=2.5, at_once=16)
PRESENT = Finish(group=1024, arrive=2.0, at_once=512)


@dataclass(frozen=True)
class Design:
    """A kernel and its grid. `grid` blocks stride over the chunks; None: a block for every chunk."""

    finish: Finish
    blocks: int = 3  # on a multiprocessor
    flight: int = 24576  # bytes that a block has in flight
    grid: int | None = None


def simulate(launches: Sequence[Sequence[tuple[int, int]]], design: Design, gpu: Gpu, c: Constants) -> float:
    """Microseconds of some launches, each a list of segments: (bytes of a whole chunk, bytes of the segment)."""
    return sum(_launch(segments, design, gpu, c) for segments in launches)


def _launch(segments: Sequence[tuple[int, int]], design: Design, gpu: Gpu, c: Constants) -> float:
    size: list[int] = []
    segment: list[int] = []
    for number, (chunk, whole) in enumerate(segments):
        chunks = max(1, -(-whole // chunk))
        size += [chunk] * (chunks - 1) + [whole - chunk * (chunks - 1)]
        segment += [number] * chunks
    first = [0] * (len(segments) + 1)
    for s in segment:
        first[s + 1] += 1
    for s in range(len(segments)):
        first[s + 1] += first[s]
    chunks = len(size)
    grid = chunks if design.grid is None else min(design.grid, chunks)
    slots = min(design.blocks * gpu.multiprocessors, grid)
    rates = random.Random(1)
    groups_left: dict[int, int] = {}
    segments_left: dict[int, int] = {}
    finish = design.finish
    cap = design.flight / c.stream
    # Streaming is followed in virtual time: bytes that a block of average rate has read since the start.
    streaming: list[tuple[float, int, int]] = []  # virtual end, block, chunk
    waiting: list[tuple[float, int, int, bool]] = []  # time, block, chunk, whether the chunk starts (or ends)
    now = virtual = end = 0.0
    next_block = slots
    for block in range(slots):
        heapq.heappush(waiting, (c.stream, block, block, True))
    while streaming or waiting:
        rate = min(cap, gpu.bandwidth / len(streaming)) if streaming else 0.0
        ends = now + (streaming[0][0] - virtual) / rate if streaming else float("inf")
        if waiting and waiting[0][0] <= ends:
            at, block, chunk, starts = heapq.heappop(waiting)
            virtual += (at - now) * rate
            now = at
            if starts:
                work = size[chunk] * (1 + c.unevenness * rates.uniform(-1, 1))
                heapq.heappush(streaming, (virtual + work, block, chunk))
                continue
            end = max(end, now)
            following = chunk + grid
            if following < chunks:
                heapq.heappush(waiting, (now, block, following, True))
            elif next_block < grid:
                heapq.heappush(waiting, (now + c.between, next_block, next_block, True))
                next_block += 1
            continue
        virtual, now = streaming[0][0], ends
        _, block, chunk = heapq.heappop(streaming)
        s = segment[chunk]
        count = first[s + 1] - first[s]
        pause = c.reduction
        if count > 1:
            group = (chunk - first[s]) // finish.group
            members = min(finish.group, count - group * finish.group)
            key = first[s] + group
            pause += finish.arrive * c.trip
            groups_left[key] = groups_left.get(key, members) - 1
            if groups_left[key] == 0:
                pause += -(-members // finish.at_once) * c.trip
                groups = -(-count // finish.group)
                if groups > 1:
                    pause += finish.arrive * c.trip
                    segments_left[s] = segments_left.get(s, groups) - 1
                    if segments_left[s] == 0:
                        pause += -(-groups // finish.at_once) * c.trip
        heapq.heappush(waiting, (now + pause, block, chunk, False))
    return end
