"""The dispatcher ops: schemas, their CPU and CUDA implementations in `fastfs._C`, and their fakes.

The ops of the measurements follow from `fastfs._core.measurements`; those of the rows are written here. Every call of
the native core comes through here: the dispatcher materialises negative views, sends fake tensors to the fakes and
shows the op to torch.compile and the profiler. The raw functions of `_C` do none of that. A call without layers has no
device to dispatch on: callers answer it themselves.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastfs._core import checks
from fastfs._core.measurements import MEASUREMENTS, MeasurementSpec


def differences(core: Any) -> list[str]:
    """What a native core declares otherwise than `fastfs._core.measurements`; empty for a core of the same sources."""
    found = core.measurements() if hasattr(core, "measurements") else {}
    declared = {
        kernel.name: (kernel.inputs, m.columns - 2, kernel.coefficients, kernel.sixteen_bit)
        for m in MEASUREMENTS
        for kernel in m.kernels
    }
    names = [*declared, *(name for name in found if name not in declared)]
    fields = "(inputs, sums, coefficients, 16-bit dtypes)"
    return [
        f"{name}: {fields} are {found.get(name)} in C++ and {declared.get(name)} in Python"
        for name in names
        if found.get(name) != declared.get(name)
    ]


_C: Any = None
_failure: str | None = None
try:
    from fastfs import _C  # type: ignore[no-redef]

    if _differences := differences(_C):
        _failure, _C = f"it was compiled from other sources: {'; '.join(_differences)}", None
except ImportError as error:
    _failure = str(error)

# Results are detached: the autograd keys fall through.
LIBRARY = torch.library.Library("fastfs", "DEF")


def native_available() -> bool:
    """Whether the native core is there."""
    return _C is not None


def why_not_native() -> str:
    """What keeps the native core from being used, with the cure."""
    return (
        f"the compiled module fastfs._C cannot be imported ({_failure}); install fastfs with a C++ compiler at hand "
        "and without FASTFS_NATIVE=0, then see `fastfs doctor`"
    )


def build_info() -> dict[str, Any]:
    """Describes the native core: what it was built with and uses, see `csrc/binding/module.cpp`.

    Returns:
        Property to value.

    Raises:
        RuntimeError: If the native core is missing, or FASTFS_CPU names an instruction set that it cannot use.
    """
    if _C is None:
        raise RuntimeError(why_not_native())
    info: dict[str, Any] = _C.build_info()
    return info


def rows_of(x: Tensor) -> int:
    """Rows of a layer: all but the last dimension; a 0-d tensor is one row."""
    return math.prod(x.shape[:-1])


def _empty(like: list[Tensor], rows: int, columns: int) -> Tensor:
    return torch.empty((rows, columns), dtype=torch.float64, device=like[0].device if like else None)


# CUDA: a call sizes its memory, torch allocates it on the current stream, the call launches.


@functools.lru_cache(maxsize=64)
def _tickets(device: torch.device, stream: int, count: int) -> Tensor:
    """Returns counters by which the last block of a group is recognized; every launch leaves them at zero."""
    # Calls on one stream run one after another, so they share the counters without a memset each.
    return torch.zeros(count, dtype=torch.int32, device=device)


def _launch(call: Any, like: Tensor, columns: int) -> Tensor:
    device = like.device
    out = torch.empty((call.rows, columns), dtype=torch.float64, device=device)
    needed = call.tickets
    if needed == 0:  # one block does all of a segment
        call.launch(out, 0, 0)
        return out
    partials = torch.empty(call.partial_bytes, dtype=torch.uint8, device=device)
    count = 1 << max(needed - 1, 1023).bit_length()
    if call.capturing:
        # A graph may be replayed while eager calls run on this stream: it gets its own counters, zeroed in the graph.
        tickets = torch.zeros(count, dtype=torch.int32, device=device)
    else:
        tickets = _tickets(device, call.stream, count)
    call.launch(out, partials.data_ptr(), tickets.data_ptr())
    return out


def _cuda_core() -> Any:
    if not hasattr(_C, f"{MEASUREMENTS[0].kernels[0].name}_cuda"):
        raise RuntimeError(
            "fastfs was built without CUDA, but got CUDA tensors: install it with nvcc at hand (FASTFS_CUDA=1 makes "
            "the build fail without), or pass backend='reference'"
        )
    return _C


# Measurements


def _define(measurement: MeasurementSpec, per_row: bool) -> None:
    """Defines the op of a measurement, with a row of sums per layer or per row of each layer."""
    columns, select, check = measurement.columns, measurement.select, measurement.check
    names = [kernel.name for kernel in measurement.kernels]
    cpu_kernels: list[Any] = [getattr(_C, f"{name}_cpu", None) for name in names]
    cuda_calls: list[Any] = [getattr(_C, f"{name}_cuda", None) for name in names]

    def cpu(*arguments: Any) -> Tensor:
        kernel, lists, coefficients, pieces = select(arguments)
        rows = _C.count_rows(lists[0]) if per_row else len(lists[0] if pieces is None else pieces)
        out = _empty(lists[0], rows, columns)
        option = per_row if coefficients is None else coefficients
        cpu_kernels[kernel](lists, option, out, torch.get_num_threads(), pieces)
        return out

    def cuda(*arguments: Any) -> Tensor:
        kernel, lists, coefficients, pieces = select(arguments)
        option = per_row if coefficients is None else coefficients
        call = cuda_calls[kernel]
        if call is None:
            _cuda_core()  # raises, and says why there are none
        return _launch(call(lists, option, pieces), lists[0][0], columns)

    def fake(*arguments: Any) -> Tensor:
        check(*arguments)
        _, (first, *_), _, pieces = select(arguments)
        rows = len(first) if pieces is None else pieces.shape[0]
        return _empty(first, sum(map(rows_of, first)) if per_row else rows, columns)

    suffix = "_per_row" if per_row else ""
    _register(f"{measurement.name}{suffix}", f"({measurement.arguments}) -> Tensor", cpu, cuda, fake)


# Rows, as in fastfs.reference. The C++ code checks its arguments; the Python checks only explain what is wrong.


def _empty_rows(x: Tensor, rows: Tensor, row_dims: int, dtype: torch.dtype | None) -> Tensor:
    width = math.prod(x.shape[row_dims:])
    return torch.empty((rows.numel(), width), dtype=dtype or x.dtype, device=x.device)


def _empty_squares(x: Tensor, rows: Tensor) -> Tensor:
    return torch.empty(rows.numel(), dtype=torch.float64, device=x.device)


def _take_rows(x: Tensor, rows: Tensor, row_dims: int, out: Tensor | None) -> Tensor:
    squares = _empty_squares(x, rows)
    try:
        if x.is_cuda:
            core = _cuda_core()
            partials = core.row_partials(rows.numel(), math.prod(x.shape[row_dims:]))
            scratch = torch.empty(partials, dtype=torch.float64, device=x.device) if partials else None
            core.gather_rows_cuda(x, rows, row_dims, out, squares, scratch)
        else:
            _C.gather_rows_cpu(x, rows, row_dims, out, squares, torch.get_num_threads())
    except (TypeError, ValueError):
        checks.check_row_inputs(x, rows, row_dims, None if out is None else out.dtype)
        raise
    return squares


def _gather_rows(x: Tensor, rows: Tensor, row_dims: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    out = _empty_rows(x, rows, row_dims, dtype)
    return out, _take_rows(x, rows, row_dims, out)


def _row_squares(x: Tensor, rows: Tensor, row_dims: int) -> Tensor:
    return _take_rows(x, rows, row_dims, None)


def _gather_rows_fake(
    x: Tensor, rows: Tensor, row_dims: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    checks.check_row_inputs(x, rows, row_dims, dtype)
    return _empty_rows(x, rows, row_dims, dtype), _empty_squares(x, rows)


def _row_squares_fake(x: Tensor, rows: Tensor, row_dims: int) -> Tensor:
    checks.check_row_inputs(x, rows, row_dims)
    return _empty_squares(x, rows)


def _register(name: str, schema: str, cpu: Any, cuda: Any, fake: Any) -> None:
    LIBRARY.define(name + schema)
    if native_available():
        LIBRARY.impl(name, cpu, "CPU")
        LIBRARY.impl(name, cuda, "CUDA")
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"fastfs::{name}", fake, lib=LIBRARY)


for _measurement in MEASUREMENTS:
    for _per_row in (False, True) if _measurement.per_row else (False,):
        _define(_measurement, _per_row)
_ROWS = "Tensor x, Tensor rows, int row_dims"
_register(
    "gather_rows",
    f"({_ROWS}, ScalarType? dtype=None) -> (Tensor, Tensor)",
    _gather_rows,
    _gather_rows,
    _gather_rows_fake,
)
_register("row_squares", f"({_ROWS}) -> Tensor", _row_squares, _row_squares, _row_squares_fake)
