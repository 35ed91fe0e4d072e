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
    sign: str  # what the sanitizer says; without one, which check fails
    mixed: bool = False  # shows with a last input of another dtype


BUGS = {
    "no barrier between the warps of a block": Bug(
        "segment_sums.cuh",
        "any = again = __syncthreads_or(again);",
        "any = again = __any_sync(kFullWarp, again);",
        "tsan",
        "data race",
    ),
    "no barrier after the repetition in double": Bug(
        "segment_sums.cuh", "        __syncthreads();\n", "", "tsan", "data race"
    ),
    "count that releases nothing": Bug(
        "reduce.cuh", "  __threadfence();\n  const uint32_t before", "  const uint32_t before", "tsan", "data race"
    ),
    "count that acquires nothing": Bug("reduce.cuh", "last);\n  __threadfence();\n", "last);\n", "tsan", "data race"),
    "lanes do not wait before lane 0 counts": Bug(
        "reduce.cuh", "    __syncwarp();\n    if (thread == 0) {", "    if (thread == 0) {", "tsan", "data race"
    ),
    "no barrier before the last block reads": Bug(
        "reduce.cuh", "  }\n  __syncthreads();\n  return is_last;", "  }\n  return is_last;", "tsan", "data race"
    ),
    "no barrier between the warps of the last block": Bug(
        "reduce.cuh", "  }\n  __syncthreads();\n  return thread < 32", "  }\n  return thread < 32", "tsan", "data race"
    ),
    "shared array too small": Bug(
        "segment_sums.cuh",
        "double parts[kWarps][N];\n  __shared__",
        "double parts[kWarps - 1][N];\n  __shared__",
        "asan",
        "out of bounds for type",
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
        "reduce.cuh", "before = atomicInc(ticket, last);", "before = atomicAdd(ticket, 1u);", "small", "tickets"
    ),
    "partial sums added in the order of arrival": Bug(
        "reduce.cuh",
        "(int64_t{thread / kPairs * kPairs} << kStepBits)",
        "(int64_t{(thread / kPairs + int(blockIdx.x)) % count * kPairs} << kStepBits)",
        "small",
        "same bits",
    ),
    "groups added from the wrong places": Bug(
        "reduce.cuh", "sum_partials<kGroupBits>(", "sum_partials<0>(", "small", "sums at the borders"
    ),
    "last group counts the chunks of a whole one": Bug(
        "reduce.cuh",
        "min64(kGroup, first + at.chunks - leader)",
        "kGroup",
        "small",
        "sums at the borders",
    ),
    "group off by one": Bug(
        "reduce.cuh",
        "(at.chunk >> kGroupBits << kGroupBits)",
        "((at.chunk + 1) >> kGroupBits << kGroupBits)",
        "small",
        "sums at the borders",
    ),
    "one group too few": Bug(
        "reduce.cuh",
        "(at.chunks + kGroup - 1) >> kGroupBits",
        "at.chunks >> kGroupBits",
        "small",
        "sums at the borders",
    ),
    "host and device cut differently": Bug(
        "submit.cuh",
        "item_size(layer.first), layer.width",
        "item_size(layer.last), layer.width",
        "asan",
        "heap-buffer-overflow",
        mixed=True,
    ),
    "a repeated row takes its neighbours along": Bug(
        "segment_sums.cuh", "value = again ? repeated : value;", "value = repeated;", "plain", "rows"
    ),
    "rows of a team that has none": Bug(
        "segment_sums.cuh",
        "if (idle || (!row_mode",
        "if ((!row_mode",
        "plain",
        "rows",
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
        "bool again = skip || must_repeat<Sums, V>(held, value);",
        "bool again = skip;",
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
