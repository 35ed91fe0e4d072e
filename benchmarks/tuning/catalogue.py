"""The variants: the policies of the kernel that the sweep compares, with what is expected of each and why."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One policy of the kernel. The figures are those that `tuned_policy.cuh` compiles; the defaults are the library's.

    same_bits       "all": every result is that of the baseline, bit for bit; "rows": those of short rows (a warp each);
                    "none": the additions come in another order
    only            dtypes that it changes; another one is the baseline's kernel
    chunk           elements of a chunk, and of the longest row that one warp sums
    chain           elements that a float accumulator takes
    threads         of a block
    blocks          on a multiprocessor, as the launch bounds ask for
    waves           blocks are launched for so many times the multiprocessors there are
    chains_ahead    chains whose loads are issued before the first addition
    load            struct of load.cuh or load_hints.cuh by which 16 bytes are loaded
    stages          stages of the asynchronous copies of bulk_copy.cuh; 0: plain loads
    spacing_by_max  the spacing of float16 by spacing_by_max.cuh
    lowest          the first architecture that has the instructions
    quick           part of a quick run
    """

    name: str
    what: str
    prediction: str
    same_bits: str = "all"
    only: tuple[str, ...] = ("bf16", "f16", "f32")
    chunk: int = 8192
    chain: int = 16
    threads: int = 256
    blocks: int = 3
    waves: int = 1
    chains_ahead: int = 1
    load: str = "ReadOnlyLoad"
    stages: int = 0
    spacing_by_max: bool = False
    lowest: str = "80"
    quick: bool = False

    @property
    def slug(self) -> str:
        """The name as that of a file."""
        return re.sub(r"\W+", "-", self.name)


BASELINE = "baseline"

VARIANTS = (
    Variant(
        BASELINE,
        "the library's kernel: chunks of 8192, chains of 16, 256 threads, 3 blocks on a multiprocessor, __ldg",
        "near the streaming read: enough bytes in flight, few enough instructions",
        quick=True,
    ),
    Variant(
        "chunk 4096",
        "chunks of 4096 elements",
        "slower on large tensors: twice as many reductions over the block, partial sums and tickets per byte; "
        "better balance where a call has few chunks per multiprocessor",
        "rows",
        chunk=4096,
    ),
    Variant(
        "chunk 16384",
        "chunks of 16384 elements",
        "as fast or a little faster on large tensors; worse balance at 32 MiB and on many small tensors",
        "rows",
        chunk=16384,
        quick=True,
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
        "chain 32",
        "chains of 32 elements: four tiles of 16 bits at a time",
        "no faster: the registers of 3 blocks do not hold twelve loads of 16 bytes. Its error bound is 3.8e-6, beyond "
        "the 2e-6 that is promised, so it would not be adopted; it shows what the promise costs",
        "none",
        ("bf16", "f16"),
        chain=32,
    ),
    Variant(
        "two chains ahead",
        "the loads of two chains before the first addition, 3 blocks on a multiprocessor",
        "no faster: the registers of 3 blocks do not hold twelve loads of 16 bytes",
        chains_ahead=2,
    ),
    Variant(
        "two chains ahead, 2 blocks",
        "the loads of two chains before the first addition, 2 blocks on a multiprocessor",
        "as fast: more loads per thread, fewer threads; better only if warps, not bytes, are the limit",
        blocks=2,
        chains_ahead=2,
    ),
    Variant(
        "128 threads",
        "128 threads a block, 6 blocks on a multiprocessor",
        "as fast on large tensors; barriers are cheaper, but a chunk takes a block twice as long: worse at 32 MiB",
        "rows",
        threads=128,
        blocks=6,
    ),
    Variant(
        "512 threads",
        "512 threads a block, 1 block on a multiprocessor",
        "slower: nothing else runs while the block reduces and waits at its barrier",
        "rows",
        threads=512,
        blocks=1,
    ),
    Variant(
        "512 threads, 2 blocks",
        "512 threads a block, 2 blocks on a multiprocessor",
        "slower: 64 registers a thread are too few for six loads in flight",
        "rows",
        threads=512,
        blocks=2,
    ),
    Variant(
        "2 blocks",
        "2 blocks on a multiprocessor: up to 128 registers a thread",
        "slower by a little: a third fewer bytes in flight, and two blocks hide less of each other's reductions",
        blocks=2,
    ),
    Variant(
        "4 blocks",
        "4 blocks on a multiprocessor: at most 64 registers a thread",
        "more bytes in flight if the loads stay ahead of the additions; slower if the compiler spills or reorders",
        blocks=4,
    ),
    Variant(
        "grid of 4 waves",
        "four times the blocks, so that the hardware schedules a block when another one ends",
        "better balance at the end of a launch, four times the starts of blocks: within 2 % either way",
        waves=4,
    ),
    Variant(
        "L1 no allocate",
        "loads with L1::no_allocate",
        "as fast: each byte is used once, and nothing else uses the L1",
        load="NoAllocateLoad",
    ),
    Variant(
        "L2 128 bytes",
        "loads with the prefetch hint L2::128B",
        "as fast: a warp's load covers whole lines already",
        load="Prefetch128Load",
    ),
    Variant(
        "L2 256 bytes",
        "loads with the prefetch hint L2::256B",
        "a little faster or as fast: fewer, longer bursts; each of the three inputs is read in order in any case",
        load="Prefetch256Load",
        quick=True,
    ),
    Variant(
        "streaming loads",
        "ld.global.cs: first to be evicted",
        "as fast here; kernels that run concurrently and use the L2 may gain",
        load="StreamingLoad",
    ),
    Variant(
        "L2 evict first",
        "loads with an L2 policy: evict first",
        "as streaming loads",
        load="EvictFirstLoad",
    ),
    Variant(
        "f16 spacing by max",
        "the spacing of float16 below its normal numbers by a maximum instead of a comparison and a selection",
        "as fast on H100; two instructions an element fewer, which counts where float16 is near the issue limit (B200)",
        only=("f16",),
        spacing_by_max=True,
    ),
    Variant(
        "bulk copies, 2 stages",
        "chunks to shared memory by cp.async.bulk: one piece of 24 KB in use, one in flight, 3 blocks",
        "as fast as the baseline: as many bytes in flight and no registers held by loads, but a barrier per piece",
        stages=2,
        lowest="90",
    ),
    Variant(
        "bulk copies, 3 stages",
        "chunks to shared memory by cp.async.bulk: two pieces of 24 KB in flight, 3 blocks",
        "the best chance to beat the baseline: twice its bytes in flight, also across the reductions between chunks",
        stages=3,
        lowest="90",
        quick=True,
    ),
    Variant(
        "bulk copies, 4 stages",
        "chunks to shared memory by cp.async.bulk: three pieces of 24 KB in flight, 2 blocks",
        "as with 3 stages, if two blocks suffice to hide the arithmetic",
        stages=4,
        lowest="90",
        blocks=2,
    ),
)


def variant(name: str) -> Variant:
    """The variant of this name; raises ValueError with the names there are."""
    for one in VARIANTS:
        if one.name == name:
            return one
    raise ValueError(f"no variant {name!r}; there are {', '.join(v.name for v in VARIANTS)}")
