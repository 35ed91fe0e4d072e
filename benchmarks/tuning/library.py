"""A compiled variant, called with tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Inputs = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
COLUMNS = 9  # seven sums, non-finite entries, count
_TEXT = 512


@dataclass(frozen=True)
class Call:
    """The arguments of one call, ready: before, after and backward of some layers, and where the result goes."""

    library: ctypes.CDLL
    dtype: torch.dtype
    inputs: Inputs  # kept alive
    pointers: ctypes.Array[ctypes.c_void_p]
    widths: ctypes.Array[ctypes.c_int64]
    segments: ctypes.Array[ctypes.c_int64]
    out: Tensor  # (segments of all layers, 9), float64
    partials: Tensor
    tickets: Tensor

    def sums(self) -> Tensor:
        """Launches the kernel on the current stream; returns `out`."""
        self._run(f"variant_{NAMES[self.dtype]}", [], [self.out, self.partials, self.tickets], [])
        return self.out

    def read(self, multiprocessors: int) -> None:
        """Launches the streaming read of the same inputs, with a grid for that many multiprocessors."""
        grid = [ctypes.c_int(multiprocessors)]
        self._run("variant_read", [ctypes.c_int(self.dtype.itemsize)], [self.partials], grid)

    def _run(self, name: str, more: list[ctypes.c_int], results: list[Tensor], grid: list[ctypes.c_int]) -> None:
        error = ctypes.create_string_buffer(_TEXT)
        device = self.out.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        arguments = [self.pointers, self.widths, self.segments, ctypes.c_int64(len(self.widths)), *more]
        arguments += [ctypes.c_void_p(x.data_ptr()) for x in results]
        arguments += [*grid, ctypes.c_void_p(stream), error, ctypes.c_int64(_TEXT)]
        if getattr(self.library, name)(*arguments) != 0:
            raise RuntimeError(error.value.decode())


class Library:
    """The shared library of a variant."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name in ("variant_chunks", "variant_slots"):
            getattr(self._library, name).restype = ctypes.c_int64

    def prepare(self, inputs: Inputs, per_row: bool) -> Call:
        """A call on layers of contiguous tensors of one dtype; `per_row`: a row of sums for each row of them."""
        first = inputs[0][0]
        if any(not x.is_contiguous() or x.dtype != first.dtype for layers in inputs for x in layers):
            raise ValueError("the inputs must be contiguous and of one dtype")
        count = len(inputs[0])
        widths = [x.shape[-1] if per_row else x.numel() for x in inputs[0]]
        segments = [x.numel() // w if per_row else 1 for x, w in zip(inputs[0], widths, strict=True)]
        slots = self._library.variant_slots()
        size = ctypes.c_int64(first.dtype.itemsize)
        chunks = (self._library.variant_chunks(ctypes.c_int64(w), size) for w in widths)
        items = sum(n * k for n, k in zip(segments, chunks, strict=True))
        pointers = [x.data_ptr() for layer in zip(*inputs, strict=True) for x in layer]
        device = first.device
        return Call(
            self._library,
            first.dtype,
            inputs,
            (ctypes.c_void_p * (3 * count))(*pointers),
            (ctypes.c_int64 * count)(*widths),
            (ctypes.c_int64 * count)(*segments),
            torch.empty((sum(segments), COLUMNS), dtype=torch.float64, device=device),
            torch.empty((max(1, items * slots),), dtype=torch.float64, device=device),
            torch.zeros((max(1, items),), dtype=torch.int32, device=device),
        )
