"""Changes of the CUDA kernels that the tests must notice."""

from dataclasses import dataclass

__all__ = ["BUGS", "Bug"]


@dataclass(frozen=True)
class Bug:
    """A change of one place of the kernels that a check must notice."""

    file: str
    old: str
    new: str
    build: str
    sign: str  # what the sanitizer says; for the plain build, which check fails


BUGS = {
    "no barrier between the warps of a block": Bug(
        "segment_sums.cuh",
        "again = __syncthreads_or(again);",
        "again = __any_sync(kFullWarp, again);",
        "tsan",
        "data race",
    ),
    "one buffer of partial sums for all chunks": Bug("segment_sums.cuh", "side ^= 1;", "", "tsan", "data race"),
    "no barrier after the repetition in double": Bug(
        "segment_sums.cuh", "        __syncthreads();\n", "", "tsan", "data race"
    ),
    "no fence before the ticket": Bug(
        "reduce.cuh", "  __threadfence();\n  __syncwarp();", "  __syncwarp();", "tsan", "data race"
    ),
    "no fence after the ticket": Bug("reduce.cuh", "last);\n    __threadfence();", "last);", "tsan", "data race"),
    "shared array too small": Bug(
        "segment_sums.cuh", "parts[2][kWarps][N];", "parts[2][kWarps - 1][N];", "asan", "out of bounds for type"
    ),
    "tail read past the end": Bug(
        "load.cuh", "if (at + E <= count) {", "if (at < count) {", "asan", "heap-buffer-overflow"
    ),
    "strided tail read past the end": Bug(
        "strided_load.cuh", "if (step == 1 && valid == E) {", "if (step == 1) {", "asan", "heap-buffer-overflow"
    ),
    "wide loads of one input that is not aligned": Bug(
        "load.cuh",
        "for (int j = 0; j < kInputs; ++j) all = all && aligned(p[j], 16);",
        "for (int j = 0; j < 1; ++j) all = all && aligned(p[j], 16);",
        "asan",
        "misaligned address",
    ),
    "ticket that does not wrap": Bug(
        "reduce.cuh", "before = atomicInc(ticket, last);", "before = atomicAdd(ticket, 1u);", "plain", "tickets"
    ),
    "groups merged in the order of arrival": Bug(
        "reduce.cuh",
        "v += __ldcg(partials + i * step * N + lane % N);",
        "v += __ldcg(partials + (i + blockIdx.x) % count * step * N + lane % N);",
        "plain",
        "same bits",
    ),
    "groups merged from the wrong places": Bug(
        "reduce.cuh", "first * N, groups, kGroupChunks, lane", "first * N, groups, 1, lane", "plain", "sums"
    ),
    "float chains too long": Bug(
        "segment_sums.cuh",
        "kSize == 2 ? kChain / kRun<F> : 1",
        "kSize == 2 ? 16 : 1",
        "plain",
        "long sum",
    ),
    "no repetition in double": Bug(
        "segment_sums.cuh",
        "int again = skip || must_repeat<Sums, V>(lane / (32 / N), value);",
        "int again = skip;",
        "plain",
        "non-finite",
    ),
    "repetition in double with the factor of float": Bug(
        "segment_sums.cuh", "value *= again ? ", "value *= skip ? ", "plain", "extremes"
    ),
    "binary search off by one": Bug(
        "table.cuh",
        "if (table.first_item(middle) <= item) {",
        "if (table.first_item(middle) < item) {",
        "plain",
        "sums",
    ),
    "last layer of a full table lost": Bug("submit.cuh", "        table->add(layer, 0, row);\n", "", "plain", "sums"),
}
