"""The variants: the policies of the kernel that the sweep compares, with what is expected of each and why."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One policy of the kernel. The figures are those that `tuned_policy.cuh` compiles; the defaults are the library's.

    same_bits       "all": every result is that of the baseline, bit for bit; "rows": those of rows of up to 8192
                    elements; "layers": those of whole layers and of longer rows; "none": no result is
    only            dtypes that it changes; another one is the baseline's kernel
    chunk_bits      bytes of the first input in a chunk, as a power of two
    largest_bits    the same in the widest layers
    group_bits      partial sums that one block adds, as a power of two
    chain           elements that a float accumulator takes
    threads         of a block
    blocks          on a multiprocessor, as the launch bounds ask for
    lane_elements   elements of a row that a lane should have before another lane shares the row
    load            struct of load.cuh or load_hints.cuh by which 16 bytes are loaded
    quick           part of a quick run
    """

    name: str
    what: str
    prediction: str
    same_bits: str = "all"
    only: tuple[str, ...] = ("bf16", "f16", "f32")
    chunk_bits: int = 15
    largest_bits: int = 17
    group_bits: int = 10
    chain: int = 16
    threads: int = 256
    blocks: int = 3
    lane_elements: int = 64
    load: str = "StreamingLoad"
    quick: bool = False

    @property
    def slug(self) -> str:
        """The name as that of a file."""
        return re.sub(r"\W+", "-", self.name)

    def chunk(self, itemsize: int, width: int) -> int:
        """Elements of a chunk, where the first input has elements of this size: chunk_bits() of policy.cuh."""
        bits, largest = (n - (itemsize.bit_length() - 1) for n in (self.chunk_bits, self.largest_bits))
        if width <= 1 << largest:
            return 1 << largest
        while bits < largest and width > 1 << (bits + self.group_bits):
            bits += 1
        return 1 << bits


BASELINE = "baseline"

VARIANTS = (
    Variant(
        BASELINE,
        "the library's kernel: chunks of 32 KB of the first input, up to 128 KB in wide layers; 256 threads, 3 blocks "
        "on a multiprocessor, ld.global.cs",
        "0.95 of the streaming read and more from 256 MiB on",
        quick=True,
    ),
    Variant(
        "chunks of 16 KB at first",
        "chunks from 16 KB on, larger ones in wide layers",
        "a little slower from 256 MiB on, as fast at 32 MiB: better balance against twice as many partial sums",
        "rows",
        chunk_bits=14,
    ),
    Variant(
        "chunks of 64 KB at first",
        "chunks from 64 KB on, larger ones in wide layers",
        "as fast on large tensors; slower at 32 MiB in float32, where there are fewer chunks than multiprocessors",
        "rows",
        chunk_bits=16,
        quick=True,
    ),
    Variant(
        "chunks of 32 KB only",
        "the same chunks in wide layers",
        "slower by 1 to 2 % at 256 MiB and 1 GiB: more partial sums, two levels at 256 MiB",
        "rows",
        largest_bits=15,
    ),
    Variant(
        "chunks of 64 KB at most",
        "larger chunks in wide layers, up to 64 KB",
        "as fast at 1 GiB; a little slower at 256 MiB in 16 bits, which then has two levels",
        "rows",
        largest_bits=16,
    ),
    Variant(
        "groups of 512",
        "a block adds 512 partial sums",
        "within 1 %: chunks grow at half the width, and there are two levels from half the width on",
        "rows",
        group_bits=9,
    ),
    Variant(
        "groups of 2048",
        "a block adds 2048 partial sums",
        "within 1 %: chunks grow at twice the width",
        "rows",
        group_bits=11,
    ),
    Variant(
        "chain 8",
        "chains of 8 elements: one tile of 16 bits at a time",
        "slower in 16 bits: half the loads in flight, and twice as many conversions and additions in double",
        "none",
        ("bf16", "f16"),
        chain=8,
    ),
    Variant(
        "128 threads",
        "128 threads a block, 6 blocks on a multiprocessor",
        "as fast on large tensors; a chunk takes a block twice as long: slower at 32 MiB",
        "rows",
        threads=128,
        blocks=6,
    ),
    Variant(
        "512 threads",
        "512 threads a block, 1 block on a multiprocessor",
        "slower: nothing else runs while the block adds up and counts itself in",
        "rows",
        threads=512,
        blocks=1,
    ),
    Variant(
        "2 blocks",
        "2 blocks on a multiprocessor: up to 128 registers a thread",
        "slower by a little: two blocks hide less of each other's ends",
        blocks=2,
    ),
    Variant(
        "4 blocks",
        "4 blocks on a multiprocessor: at most 64 registers a thread",
        "slower if the compiler spills or reorders; otherwise more blocks hide each other's ends",
        blocks=4,
    ),
    Variant(
        "rows by whole warps",
        "32 lanes for every row of more than 16 elements",
        "slower in rows of 1024: 0.90 of the read in bf16, as measured of the former kernel; elsewhere as fast",
        "layers",
        lane_elements=1,
    ),
    Variant(
        "rows by fewer lanes",
        "8 lanes for rows of up to 1024 elements, 16 up to 2048",
        "a little faster in rows of 1024; a call of few rows takes longer",
        "layers",
        lane_elements=128,
    ),
    Variant(
        "no cache hint",
        "ld.global.nc: the read-only path, as before",
        "slower by 1 %, as measured of warps in row mode",
        load="ReadOnlyLoad",
    ),
    Variant(
        "L1 no allocate",
        "loads with L1::no_allocate",
        "as fast: each byte is used once, and nothing else uses the L1",
        load="NoAllocateLoad",
    ),
    Variant(
        "L2 256 bytes",
        "loads with the prefetch hint L2::256B",
        "as without a hint, as measured of the former kernel",
        load="Prefetch256Load",
    ),
    Variant(
        "L2 evict first",
        "loads with an L2 policy: evict first",
        "as the baseline",
        load="EvictFirstLoad",
    ),
)


def variant(name: str) -> Variant:
    """The variant of this name; raises ValueError with the names there are."""
    for one in VARIANTS:
        if one.name == name:
            return one
    raise ValueError(f"no variant {name!r}; there are {', '.join(v.name for v in VARIANTS)}")
