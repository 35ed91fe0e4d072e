"""Workloads of `benchmarks.ops.feature_stats`: parts, and the layers of every call in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fastfs._bench.inputs import Dtypes, Inputs, make_inputs

LADDER, LISTS, ROWS, TRANSFORMERS = "ladder", "lists", "rows", "transformers"
PARTS = (LADDER, LISTS, ROWS, TRANSFORMERS)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES: dict[str, Dtypes] = {
    "float32": (F32, F32),
    "bfloat16": (BF16, BF16),
    "float16": (F16, F16),
    "mixed": (BF16, F32),  # features as computed, backward vectors as accumulated
}
SMALL = 2**16  # elements of a layer in the lists
LAYERS = (1, 10, 100, 1000)
WIDTHS = (1024, 2048, 4096, 8192, 16384)
SIZES = tuple(2**k for k in (12, 15, 18, 20, 22, 24, 25, 26, 28, 30, 32))  # bytes: 4 KiB to 4 GiB
ORDER = (28, 25, 30, 26, 32, 24, 22, 20, 18, 15, 12)  # most important sizes first, in case compile time runs out


@dataclass(frozen=True)
class Workload:
    """The layers of one call: shapes, and the name of their dtypes unless `make` overrides it."""

    name: str
    shapes: list[tuple[int, ...]]
    part: str = LADDER
    dtype: str = "float32"
    per_row: bool = False
    cut: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of all inputs of a call."""
        features, backward = DTYPES[self.dtype]
        return sum(math.prod(shape) for shape in self.shapes) * (2 * features.itemsize + backward.itemsize)

    def inputs(self, device: torch.device, copies: int = 1) -> list[Inputs]:
        """Create copies of the inputs in the workload's dtype."""
        return make_inputs(self.shapes, DTYPES[self.dtype], device, copies)

    def make(self, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Create the inputs in one given dtype."""
        return make_inputs(self.shapes, (dtype, dtype), device)[0]


@dataclass(frozen=True)
class Decoder:
    """A transformer whose layer outputs are measured: of attention, MLP hidden layer, MLP and block."""

    name: str
    depth: int
    width: int
    hidden: int
    tokens: int

    def shapes(self, depth: int) -> list[tuple[int, ...]]:
        """Return the output shapes of all layers in the first blocks."""
        narrow, wide = (self.tokens, self.width), (self.tokens, self.hidden)
        return [narrow, wide, narrow, narrow] * depth


# Depth, width and hidden width of the public configurations of Llama 3.2 1B and Llama 2 7B.
DECODERS = (
    Decoder("12 x 768, 1024 tokens", 12, 768, 3072, 1024),
    Decoder("1B, 8192 tokens", 16, 2048, 8192, 8192),
    Decoder("7B, 8192 tokens", 32, 4096, 11008, 8192),
)
TINY = Decoder("tiny (2 x 64), 32 tokens", 2, 64, 256, 32)


def bytes_per_element(dtype: str) -> int:
    """Return the bytes per element of the three inputs together."""
    features, backward = DTYPES[dtype]
    return 2 * features.itemsize + backward.itemsize


def size_name(size: int) -> str:
    """Format a size, such as 256 MiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size / 2**10:g} KiB"


def _one(size: int, dtype: str) -> Workload:
    elements = size // bytes_per_element(dtype) // 64 * 64
    return Workload(f"1 layer, {size_name(size)}", [(elements,)], LADDER, dtype)


def ladder(largest: int, quick: bool) -> Iterator[Workload]:
    """Yield one layer of 4 KiB to 4 GiB in every dtype, at most `largest` bytes."""
    sizes = (2**15, 2**20) if quick else tuple(2**k for k in ORDER)
    for size in sizes:
        if size <= largest:
            yield from (_one(size, dtype) for dtype in DTYPES)


def lists(largest: int, quick: bool, dtypes: Sequence[str]) -> Iterator[Workload]:
    """Yield 1 to 1000 layers of 64K elements, and as many layers with 64M elements in total."""
    for dtype in dtypes:
        for layers in (1, 10) if quick else LAYERS:
            small = Workload(f"{layers} x 64K", [(64, 1024)] * layers, LISTS, dtype)
            total = 2**20 if quick else 2**26
            rows = total // 1024 // layers
            split = Workload(f"{layers} x {rows} x 1024", [(rows, 1024)] * layers, LISTS, dtype)
            yield from (w for w in (small, split) if w.bytes <= largest)


def rows(largest: int, quick: bool) -> Iterator[Workload]:
    """Yield sums per row over the widths."""
    size = 2**20 if quick else min(2**28, largest)
    for dtype in ("float32", "bfloat16"):
        for width in WIDTHS[:2] if quick else WIDTHS:
            count = max(1, size // bytes_per_element(dtype) // width)
            yield Workload(f"{count} rows of {width}", [(count, width)], ROWS, dtype, per_row=True)


def transformers(most: int, quick: bool) -> Iterator[Workload]:
    """Yield real shapes of as many blocks as fit into `most` bytes."""
    for decoder in (TINY,) if quick else DECODERS:
        for dtype in ("bfloat16", "mixed"):
            block = sum(math.prod(s) for s in decoder.shapes(1)) * bytes_per_element(dtype)
            depth = max(1, min(decoder.depth, most // block))
            blocks = f"{depth} of {decoder.depth} blocks"
            cut = "" if depth == decoder.depth else f"{blocks}, {size_name(most)} at most"
            name = f"transformer {decoder.name}" + (f", {blocks}" if cut else "")
            yield Workload(name, decoder.shapes(depth), TRANSFORMERS, dtype, cut=cut)


def workloads(part: str, device: torch.device, *, largest: int, free: int, quick: bool) -> list[Workload]:
    """Return all workloads of a part.

    Args:
        part: one of PARTS.
        device: device; the CPU has fewer dtypes, smaller sizes per row, and fewer blocks.
        largest: bytes of the largest inputs, except for transformers.
        free: bytes of available memory; on a GPU, a transformer takes up to half of it.
        quick: whether to return small workloads only.

    Returns:
        The workloads.
    """
    on_gpu = device.type == "cuda"
    if part == LADDER:
        return list(ladder(largest, quick))
    if part == LISTS:
        return list(lists(largest, quick, list(DTYPES) if on_gpu else ["float32", "bfloat16"]))
    if part == ROWS:
        return list(rows(largest if on_gpu else min(largest, 2**27), quick))
    return list(transformers(free // 2 if on_gpu else min(free // 8, 2**30), quick))
