"""The variants: what each changes in a copy of csrc, and what is expected of it and why.

The sources of the kernels have no switches for this. A variant is a list of text replacements, each of which must find
its place exactly once, so a change of the kernels that a variant does not fit is an error and not another kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """In a file below csrc, `old` becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Variant:
    """One version of the kernel.

    same_bits   "all": every result is that of the baseline, bit for bit; "rows": those of short rows (a warp each);
                "none": the additions come in another order
    only        dtypes that it changes; another one is the baseline's kernel
    chunk       elements of a chunk
    threads     of a block
    blocks      on a multiprocessor, as the launch bounds ask for
    waves       blocks are launched for so many times the multiprocessors there are
    stages      stages of asynchronous copies; 0: plain loads
    lowest      the first architecture that has the instructions
    quick       part of a quick run
    """

    name: str
    what: str
    prediction: str
    mutations: tuple[Mutation, ...] = ()
    same_bits: str = "all"
    only: tuple[str, ...] = ("bf16", "f16", "f32")
    chunk: int = 8192
    threads: int = 256
    blocks: int = 3
    waves: int = 1
    stages: int = 0
    lowest: str = "80"
    quick: bool = False

    @property
    def slug(self) -> str:
        """The name as that of a file."""
        return re.sub(r"\W+", "-", self.name)


BASELINE = "baseline"
LOAD, SUMS, SUBMIT = "cuda/load.cuh", "cuda/segment_sums.cuh", "cuda/submit.cuh"


def _chunk(elements: int) -> Mutation:
    return Mutation("layers.h", "constexpr int64_t kChunk = 8192;", f"constexpr int64_t kChunk = {elements};")


def _chain(elements: int) -> Mutation:
    return Mutation("sums.h", "constexpr int kChain = 16;", f"constexpr int kChain = {elements};")


def _threads(count: int) -> Mutation:
    return Mutation("cuda/runtime.h", "constexpr int kThreads = 256;", f"constexpr int kThreads = {count};")


def _blocks(count: int) -> Mutation:
    return Mutation(SUMS, "same_dtype<L, Any>::value ? 2 : 3)", f"same_dtype<L, Any>::value ? 2 : {count})")


# The wide loop with two chains under way: all loads, then chain after chain, so the order of additions stays.
_AHEAD = Mutation(
    SUMS,
    """    for (; begin + kStep * tile <= source.count; begin += kStep * tile, at += kStep * tile) {
      Run<Sums, F, L> run[kStep];
#pragma unroll
      for (int t = 0; t < kStep; ++t) source.load(at + t * tile, run[t]);
      Chain<Sums, F, L, N> chain(sums);
#pragma unroll
      for (int t = 0; t < kStep; ++t) chain.add(run[t], source.any, c);
      chain.flush(sums);
    }
""",
    """    for (; begin + 2 * kStep * tile <= source.count; begin += 2 * kStep * tile, at += 2 * kStep * tile) {
      Run<Sums, F, L> run[2 * kStep];
#pragma unroll
      for (int t = 0; t < 2 * kStep; ++t) source.load(at + t * tile, run[t]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Chain<Sums, F, L, N> chain(sums);
#pragma unroll
        for (int t = 0; t < kStep; ++t) chain.add(run[half * kStep + t], source.any, c);
        chain.flush(sums);
      }
    }
""",
)


_F16_SPACING = Mutation(
    "sums.h",
    "    e = where_at_least(x, F16::kMinNormal, e, F16::kMinNormal);\n",
    "    e = fmax(e, static_cast<V>(F16::kMinNormal));\n",
)


def _hint(instruction: str, policy: str = "") -> tuple[Mutation, ...]:
    """The 16-byte loads by another instruction, with an eviction policy where one is given."""
    operand = ', "l"(policy)' if policy else ""
    setup = f'  uint64_t policy;\n  asm("createpolicy.fractional.{policy}.b64 %0, 1.0;" : "=l"(policy));\n'
    asm = f"{instruction}.v4.u32 {{%0, %1, %2, %3}}, [%4]{', %5' if policy else ''};"
    load = f"""__device__ __forceinline__ uint4 load_hinted(const uint4* p) {{
#if defined(__CUDA_ARCH__)
{setup if policy else ""}  uint4 q;
  asm("{asm}" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "l"(p){operand});
  return q;
#else
  return __ldg(p);
#endif
}}

"""
    place = "// kWords words by loads of 16 bytes (of 8 if they are two); p is a multiple of that.\n"
    old = "const uint4 q = __ldg(reinterpret_cast<const uint4*>(p) + i);"
    new = "const uint4 q = load_hinted(reinterpret_cast<const uint4*>(p) + i);"
    return Mutation(LOAD, place, load + place), Mutation(LOAD, old, new)


def _bulk(stages: int, blocks: int) -> tuple[Mutation, ...]:
    """The chunks of block mode by way of shared memory: bulk_copy.cuh, which lies beside the kernels in the copy."""
    place = "// Blocks on a multiprocessor that registers allow;"
    include = '}  // namespace fastfs::cuda\n#include "bulk_copy.cuh"\nnamespace fastfs::cuda {\n'
    state = "  int entry = 0, side = 0;\n"
    kernel = "segment_sums<Sums, F, L, Table, kThreads>"
    copies = f"BulkCopies<Sums, F, L, Table, kThreads, {stages}>"
    return (
        Mutation(SUMS, place, include + place),
        Mutation(SUMS, state, f"{state}  {copies} copies(table, !row_mode, number, step);\n"),
        Mutation(SUMS, "if (!skip) sum_chunk<Sums, F, L>(", "if (!skip) copies.sum_chunk("),
        Mutation(SUBMIT, f"start({kernel},", f"start_shared(launch.row_mode ? 0 : {copies}::kBytes, {kernel},"),
        *([_blocks(blocks)] if blocks != 3 else []),
    )


VARIANTS = (
    Variant(
        BASELINE,
        "the kernel as it is: chunks of 8192, chains of 16, 256 threads, 3 blocks on a multiprocessor, __ldg",
        "near the streaming read: enough bytes in flight, few enough instructions",
        quick=True,
    ),
    Variant(
        "chunk 4096",
        "chunks of 4096 elements",
        "slower on large tensors: twice as many reductions over the block, partial sums and tickets per byte; "
        "better balance where a call has few chunks per multiprocessor",
        (_chunk(4096),),
        "rows",
        chunk=4096,
    ),
    Variant(
        "chunk 16384",
        "chunks of 16384 elements",
        "as fast or a little faster on large tensors; worse balance at 32 MiB and on many small tensors",
        (_chunk(16384),),
        "rows",
        chunk=16384,
        quick=True,
    ),
    Variant(
        "chain 8",
        "chains of 8 elements: one tile of 16 bits at a time",
        "slower in 16 bits: half the loads under way, and twice as many conversions and additions in double",
        (_chain(8),),
        "none",
        ("bf16", "f16"),
    ),
    Variant(
        "chain 32",
        "chains of 32 elements: four tiles of 16 bits at a time",
        "no faster: the registers of 3 blocks do not hold twelve loads of 16 bytes. Its error bound is 3.8e-6, beyond "
        "the 2e-6 that is promised, so it would not be adopted; it shows what the promise costs",
        (_chain(32),),
        "none",
        ("bf16", "f16"),
    ),
    Variant(
        "two chains ahead",
        "the loads of two chains before the first addition, 3 blocks on a multiprocessor",
        "no faster: the registers of 3 blocks do not hold twelve loads of 16 bytes",
        (_AHEAD,),
    ),
    Variant(
        "two chains ahead, 2 blocks",
        "the loads of two chains before the first addition, 2 blocks on a multiprocessor",
        "as fast: more loads per thread, fewer threads; better only if warps are what lacks, not bytes",
        (_AHEAD, _blocks(2)),
        blocks=2,
    ),
    Variant(
        "128 threads",
        "128 threads a block, 6 blocks on a multiprocessor",
        "as fast on large tensors; barriers are cheaper, but a chunk takes a block twice as long: worse at 32 MiB",
        (_threads(128), _blocks(6)),
        "rows",
        threads=128,
        blocks=6,
    ),
    Variant(
        "512 threads",
        "512 threads a block, 1 block on a multiprocessor",
        "slower: nothing else runs while the block reduces and waits at its barrier",
        (_threads(512), _blocks(1)),
        "rows",
        threads=512,
        blocks=1,
    ),
    Variant(
        "512 threads, 2 blocks",
        "512 threads a block, 2 blocks on a multiprocessor",
        "slower: 64 registers a thread are too few for six loads under way",
        (_threads(512), _blocks(2)),
        "rows",
        threads=512,
        blocks=2,
    ),
    Variant(
        "2 blocks",
        "2 blocks on a multiprocessor: up to 128 registers a thread",
        "slower by a little: a third fewer bytes in flight, and two blocks hide less of each other's reductions",
        (_blocks(2),),
        blocks=2,
    ),
    Variant(
        "4 blocks",
        "4 blocks on a multiprocessor: at most 64 registers a thread",
        "more bytes in flight if the loads stay ahead of the additions; slower if the compiler spills or reorders",
        (_blocks(4),),
        blocks=4,
    ),
    Variant(
        "grid of 4 waves",
        "four times the blocks, so that the hardware hands out the chunks as blocks end",
        "better balance at the end of a launch, four times the starts of blocks: within 2 % either way",
        waves=4,
    ),
    Variant(
        "L1 no allocate",
        "loads with L1::no_allocate",
        "as fast: each byte is used once, and nothing else wants the L1",
        _hint("ld.global.nc.L1::no_allocate"),
    ),
    Variant(
        "L2 128 bytes",
        "loads with the prefetch hint L2::128B",
        "as fast: a warp's load covers whole lines already",
        _hint("ld.global.nc.L2::128B"),
    ),
    Variant(
        "L2 256 bytes",
        "loads with the prefetch hint L2::256B",
        "a little faster or as fast: fewer, longer bursts; three streams of 4 KB are read in order in any case",
        _hint("ld.global.nc.L2::256B"),
        quick=True,
    ),
    Variant(
        "streaming loads",
        "ld.global.cs: first to be evicted",
        "as fast here; a gain would be seen by what runs beside it and wants the L2",
        _hint("ld.global.cs"),
    ),
    Variant(
        "L2 evict first",
        "loads with an L2 policy: evict first",
        "as streaming loads",
        _hint("ld.global.nc.L2::cache_hint", "L2::evict_first"),
    ),
    Variant(
        "f16 spacing by max",
        "the spacing of float16 below its normal numbers by a maximum instead of a comparison and a selection",
        "as fast on H100; two instructions an element fewer, which counts where float16 is near the issue limit (B200)",
        (_F16_SPACING,),
        only=("f16",),
    ),
    Variant(
        "bulk copies, 2 stages",
        "chunks to shared memory by cp.async.bulk: one piece of 24 KB in use, one under way, 3 blocks",
        "as fast as the baseline: as many bytes in flight, no registers held by loads, but a barrier per piece",
        _bulk(2, 3),
        stages=2,
        lowest="90",
    ),
    Variant(
        "bulk copies, 3 stages",
        "chunks to shared memory by cp.async.bulk: two pieces of 24 KB under way, 3 blocks",
        "the best chance to beat the baseline: twice its bytes in flight, also across the reductions between chunks",
        _bulk(3, 3),
        stages=3,
        lowest="90",
        quick=True,
    ),
    Variant(
        "bulk copies, 4 stages",
        "chunks to shared memory by cp.async.bulk: three pieces of 24 KB under way, 2 blocks",
        "as with 3 stages, if two blocks are enough to cover the arithmetic",
        _bulk(4, 2),
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
