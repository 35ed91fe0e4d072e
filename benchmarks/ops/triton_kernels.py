"""`fastfs.feature_stats` implemented in Triton, with the same eight sums, for the comparison.

Three variants: sums of one layer (a persistent grid, partial sums per program, a second kernel that adds them), of all
layers in one launch (tables of pointers and chunks in device memory, created once per list), and per row (a program per
row). Terms are float32 in chains of bounded length; sums over chunks are float64. Block size and number of warps are
autotuned on a GPU; with TRITON_INTERPRET=1 the kernels run on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfs._bench.baselines import COLUMNS, rounding_factor
from fastfs._bench.inputs import Inputs

CHUNK = 2**14  # elements
PROGRAMS_PER_SM = 8
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ROUNDING = tl.constexpr(6)  # the column of the rounding variance
EXPONENT = tl.constexpr(0x7F800000)  # bits of a float32


@triton.jit
def _load(pointer, i, numel, MASKED: tl.constexpr):
    if MASKED:  # noqa: SIM108 - decided when it is compiled
        x = tl.load(pointer + i, mask=i < numel, other=0.0)
    else:
        x = tl.load(pointer + i)
    return x.to(tl.float32)


@triton.jit
def _chunk(f_at, g_at, b_at, start, numel, COUNT: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Return the eight sums over COUNT elements from `start` on, in float64; elements from `numel` on count as zero."""
    dot = tl.zeros([BLOCK], tl.float32)
    update = tl.zeros([BLOCK], tl.float32)
    backward = tl.zeros([BLOCK], tl.float32)
    before = tl.zeros([BLOCK], tl.float32)
    radial = tl.zeros([BLOCK], tl.float32)
    absolute = tl.zeros([BLOCK], tl.float32)
    rounding = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for at in range(0, COUNT, BLOCK):
        i = start + at + tl.arange(0, BLOCK)
        f = _load(f_at, i, numel, MASKED)
        g = _load(g_at, i, numel, MASKED)
        b = _load(b_at, i, numel, MASKED)
        df = g - f
        product = df * b
        dot += product
        update += df * df
        backward += b * b
        before += f * f
        radial += f * df
        absolute += tl.abs(product)
        f_bits = f.to(tl.int32, bitcast=True) & EXPONENT
        g_bits = g.to(tl.int32, bitcast=True) & EXPONENT
        b_bits = b.to(tl.int32, bitcast=True) & EXPONENT
        p = f_bits.to(tl.float32, bitcast=True)
        q = g_bits.to(tl.float32, bitcast=True)
        rounding += p * p + q * q
        bad += (f_bits == EXPONENT).to(tl.int32) + (g_bits == EXPONENT).to(tl.int32) + (b_bits == EXPONENT).to(tl.int32)
    return (
        tl.sum(dot.to(tl.float64), 0),
        tl.sum(update.to(tl.float64), 0),
        tl.sum(backward.to(tl.float64), 0),
        tl.sum(before.to(tl.float64), 0),
        tl.sum(radial.to(tl.float64), 0),
        tl.sum(absolute.to(tl.float64), 0),
        tl.sum(rounding.to(tl.float64), 0),
        tl.sum(bad, 0).to(tl.float64),
    )


@triton.jit
def _sums(f, g, b, start, numel, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    # Full chunks use no mask, because a mask with an unknown size makes the loads scalar.
    if start + COUNT <= numel:
        s0, s1, s2, s3, s4, s5, s6, s7 = _chunk(f, g, b, start, numel, COUNT, BLOCK, False)
    else:
        s0, s1, s2, s3, s4, s5, s6, s7 = _chunk(f, g, b, start, numel, COUNT, BLOCK, True)
    return s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit
def _store(out, s0, s1, s2, s3, s4, s5, s6, s7):
    tl.store(out + 0, s0)
    tl.store(out + 1, s1)
    tl.store(out + 2, s2)
    tl.store(out + 3, s3)
    tl.store(out + 4, s4)
    tl.store(out + 5, s5)
    tl.store(out + 6, s6)
    tl.store(out + 7, s7)


@triton.jit
def layer_kernel(f, g, b, numel, chunks, partials, size_class, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Process one layer: every program takes every n-th chunk and writes one row of partial sums."""
    a0 = tl.zeros([], tl.float64)
    a1 = tl.zeros([], tl.float64)
    a2 = tl.zeros([], tl.float64)
    a3 = tl.zeros([], tl.float64)
    a4 = tl.zeros([], tl.float64)
    a5 = tl.zeros([], tl.float64)
    a6 = tl.zeros([], tl.float64)
    a7 = tl.zeros([], tl.float64)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        start = (tl.zeros([], tl.int64) + chunk) * CHUNK
        s0, s1, s2, s3, s4, s5, s6, s7 = _sums(f, g, b, start, numel, CHUNK, BLOCK)
        a0 += s0
        a1 += s1
        a2 += s2
        a3 += s3
        a4 += s4
        a5 += s5
        a6 += s6
        a7 += s7
    _store(partials + tl.program_id(0) * 8, a0, a1, a2, a3, a4, a5, a6, a7)


@triton.jit
def list_kernel(
    addresses,
    sizes,
    chunk_layer,
    chunk_start,
    chunks,
    partials,
    size_class,
    FEATURES: tl.constexpr,
    BACKWARD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Process all layers: a persistent grid over the chunks of a table, with one row of partial sums per chunk."""
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        layer = tl.load(chunk_layer + chunk)
        start = tl.load(chunk_start + chunk)
        start = tl.multiple_of(start, 16)
        numel = tl.load(sizes + layer)
        f = tl.multiple_of(tl.load(addresses + 3 * layer + 0).to(tl.pointer_type(FEATURES)), 16)
        g = tl.multiple_of(tl.load(addresses + 3 * layer + 1).to(tl.pointer_type(FEATURES)), 16)
        b = tl.multiple_of(tl.load(addresses + 3 * layer + 2).to(tl.pointer_type(BACKWARD)), 16)
        s0, s1, s2, s3, s4, s5, s6, s7 = _sums(f, g, b, start, numel, CHUNK, BLOCK)
        _store(partials + chunk * 8, s0, s1, s2, s3, s4, s5, s6, s7)


@triton.jit
def finish_kernel(partials, first, out, factor, ROWS: tl.constexpr):
    """Add up the partial sums of each layer, rows first[layer] to first[layer + 1], in a fixed order."""
    layer = tl.program_id(0)
    begin = tl.load(first + layer)
    end = tl.load(first + layer + 1)
    columns = tl.arange(0, 8)
    total = tl.zeros([ROWS, 8], tl.float64)
    for at in range(begin, end, ROWS):
        rows = at + tl.arange(0, ROWS)
        inside = (rows < end)[:, None] & (columns >= 0)[None, :]
        total += tl.load(partials + rows[:, None] * 8 + columns[None, :], mask=inside, other=0.0)
    sums = tl.sum(total, 0)
    sums = tl.where(columns == ROUNDING, sums * factor, sums)
    tl.store(out + layer * 8 + columns, sums)


@triton.jit
def rows_kernel(f, g, b, width, out, factor, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Process one row of width WIDTH per program."""
    COUNT: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK * BLOCK
    row = tl.program_id(0).to(tl.int64)
    at = row * width
    s0, s1, s2, s3, s4, s5, s6, s7 = _sums(f + at, g + at, b + at, 0, width, COUNT, BLOCK)
    _store(out + row * 8, s0, s1, s2, s3, s4, s5, s6 * factor, s7)


_CONFIGS = [(1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16)]


def _tuned(kernel: Any, key: Sequence[str]) -> Any:
    configs = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in _CONFIGS]
    return triton.autotune(configs=configs, key=list(key))(kernel)


def _size_class(elements: int) -> int:
    """Return the size class (small, middle, large) by which kernels are tuned."""
    return (elements >= 2**20) + (elements >= 2**24)


class Kernels:
    """The three variants on one device, with the results of autotuning."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            self.programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
            self._layer = _tuned(layer_kernel, ["size_class"])
            self._list = _tuned(list_kernel, ["size_class", "FEATURES", "BACKWARD"])
            self._rows, self._fixed = _tuned(rows_kernel, ["width"]), {}
        else:  # interpreted
            self.programs = 3
            self._layer, self._list, self._rows = layer_kernel, list_kernel, rows_kernel
            self._fixed = {"BLOCK": 1024}

    def per_layer(self, inputs: Inputs) -> Callable[[], Tensor]:
        """Return a call that computes (L, 8) with two launches per layer."""
        device, layers = inputs[0][0].device, len(inputs[0])
        factor = rounding_factor(inputs[0][0].dtype)
        plans = []
        for i in range(layers):
            f, g, b = (x[i].view(-1) for x in inputs)
            chunks = triton.cdiv(f.numel(), CHUNK)
            programs = min(chunks, self.programs)
            first = torch.tensor([0, programs], dtype=torch.int64, device=device)
            plans.append((f, g, b, chunks, programs, first))

        def call() -> Tensor:
            out = torch.empty((layers, COLUMNS), dtype=torch.float64, device=device)
            for i, (f, g, b, chunks, programs, first) in enumerate(plans):
                partials = torch.empty((programs, COLUMNS), dtype=torch.float64, device=device)
                n = f.numel()
                self._layer[(programs,)](f, g, b, n, chunks, partials, _size_class(n), CHUNK=CHUNK, **self._fixed)
                finish_kernel[(1,)](partials, first, out[i], factor, ROWS=128)
            return out

        return call

    def all_layers(self, inputs: Inputs) -> Callable[[], Tensor]:
        """Return a call that computes (L, 8) with two launches. The tables are created here and not timed.

        Raises:
            ValueError: a tensor is not aligned to 16 bytes.
        """
        device, layers = inputs[0][0].device, len(inputs[0])
        if any(x.data_ptr() % 16 for tensors in inputs for x in tensors):
            raise ValueError("expected tensors that are aligned to 16 bytes")

        def table(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        sizes = [x.numel() for x in inputs[0]]
        counts = [triton.cdiv(n, CHUNK) for n in sizes]
        first = [0]
        for count in counts:
            first.append(first[-1] + count)
        addresses = table([x[i].data_ptr() for i in range(layers) for x in inputs])
        tables = (
            addresses,
            table(sizes),
            table([i for i, count in enumerate(counts) for _ in range(count)]),
            table([CHUNK * c for count in counts for c in range(count)]),
        )
        firsts, chunks = table(first), first[-1]
        features, backward = TYPES[inputs[0][0].dtype], TYPES[inputs[2][0].dtype]
        factor, size_class = rounding_factor(inputs[0][0].dtype), _size_class(sum(sizes))

        def call() -> Tensor:
            out = torch.empty((layers, COLUMNS), dtype=torch.float64, device=device)
            partials = torch.empty((chunks, COLUMNS), dtype=torch.float64, device=device)
            self._list[(min(chunks, self.programs),)](
                *tables, chunks, partials, size_class, FEATURES=features, BACKWARD=backward, CHUNK=CHUNK, **self._fixed
            )
            finish_kernel[(layers,)](partials, firsts, out, factor, ROWS=16)
            return out

        return call

    def per_row(self, inputs: Inputs) -> Callable[[], Tensor]:
        """Return a call that computes (rows of all layers, 8), with one launch per layer."""
        device = inputs[0][0].device
        factor = rounding_factor(inputs[0][0].dtype)
        layers = [tuple(t.view(-1, t.shape[-1]) for t in layer) for layer in zip(*inputs, strict=True)]

        def call() -> Tensor:
            outs = []
            for f, g, b in layers:
                rows, width = f.shape
                out = torch.empty((rows, COLUMNS), dtype=torch.float64, device=device)
                self._rows[(rows,)](f, g, b, width, out, factor, WIDTH=width, **self._fixed)
                outs.append(out)
            return outs[0] if len(outs) == 1 else torch.cat(outs)

        return call
