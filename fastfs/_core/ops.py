"""The dispatcher ops: schemas, their CPU and CUDA kernels in `fastfs._C`, and their fakes. Not public.

Every call of the native core comes through here: the dispatcher materialises negative views, sends fake tensors to
the fakes and shows the op to torch.compile and the profiler. The raw functions of `_C` know none of that. A call
without layers has no device to dispatch on: callers answer it themselves.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastfs._core import checks
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._stats import FeatureStats, ParameterStats, UpdateStats

_C: Any = None
_failure: str | None = None
try:
    from fastfs import _C  # type: ignore[no-redef]
except ImportError as error:
    _failure = str(error)

FEATURES = len(FeatureStats.names)
UPDATES = len(UpdateStats.names)
PARAMETERS = len(ParameterStats.names)

# One schema each; the functions below it are its kernels. Results are detached: the autograd keys fall through.
LIBRARY = torch.library.Library("fastfs", "DEF")
LIBRARY.define("gather_rows(Tensor x, Tensor rows, int row_dims, ScalarType? dtype=None) -> (Tensor, Tensor)")
LIBRARY.define("row_squares(Tensor x, Tensor rows, int row_dims) -> Tensor")
LIBRARY.define("feature_stats(Tensor[] before, Tensor[] after, Tensor[] backward) -> Tensor")
LIBRARY.define("feature_stats_per_row(Tensor[] before, Tensor[] after, Tensor[] backward) -> Tensor")
LIBRARY.define("update_stats(Tensor[] gradients, Tensor[] updates) -> Tensor")
LIBRARY.define(
    "optimizer_stats(int rule, Tensor[] gradients, Tensor[] parameters, Tensor[] first, Tensor[] second, "
    "Tensor coefficients) -> Tensor"
)


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
    """What the native core was built with and uses; see module.cpp.

    Raises:
        RuntimeError: if the native core is missing, or FASTFS_CPU names an instruction set that it cannot use.
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


# CPU


def _feature_stats_cpu(before: list[Tensor], after: list[Tensor], backward: list[Tensor]) -> Tensor:
    out = _empty(before, len(before), FEATURES)
    _C.feature_stats_cpu((before, after, backward), False, out, torch.get_num_threads())
    return out


def _feature_stats_per_row_cpu(before: list[Tensor], after: list[Tensor], backward: list[Tensor]) -> Tensor:
    out = _empty(before, _C.count_rows(before), FEATURES)
    _C.feature_stats_cpu((before, after, backward), True, out, torch.get_num_threads())
    return out


def _update_stats_cpu(gradients: list[Tensor], updates: list[Tensor]) -> Tensor:
    out = _empty(gradients, len(gradients), UPDATES)
    _C.update_stats_cpu((gradients, updates), False, out, torch.get_num_threads())
    return out


_OPTIMIZER_CPU = {rule: f"{rule.name.lower()}_stats_cpu" for rule in OptimizerRule}
_OPTIMIZER_CUDA = {rule: f"{rule.name.capitalize()}StatsCuda" for rule in OptimizerRule}


def _optimizer_inputs(
    rule: int, gradients: list[Tensor], parameters: list[Tensor], first: list[Tensor], second: list[Tensor]
) -> tuple[list[Tensor], ...]:
    if rule == OptimizerRule.LINEAR:
        if second:
            raise ValueError("expected no second state for LINEAR")
        return gradients, parameters, first
    return gradients, parameters, first, second


def _optimizer_stats_cpu(
    rule: int,
    gradients: list[Tensor],
    parameters: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    coefficients: Tensor,
) -> Tensor:
    out = _empty(gradients, len(gradients), PARAMETERS)
    inputs = _optimizer_inputs(rule, gradients, parameters, first, second)
    getattr(_C, _OPTIMIZER_CPU[OptimizerRule(rule)])(inputs, coefficients, out, torch.get_num_threads())
    return out


# CUDA: the call plans its memory, torch allocates it on the current stream, the call launches.


@functools.lru_cache(maxsize=64)
def _tickets(device: torch.device, stream: int, count: int) -> Tensor:
    """Counters that say which block of a group finishes last: zero here, and left at zero by every launch.

    So calls on one stream, which follow one another, share them without a memset each.
    """
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
        # A graph may be replayed beside eager calls on this stream: it gets counters of its own, zeroed in the graph.
        tickets = torch.zeros(count, dtype=torch.int32, device=device)
    else:
        tickets = _tickets(device, call.stream, count)
    call.launch(out, partials.data_ptr(), tickets.data_ptr())
    return out


def _cuda_core() -> Any:
    if not hasattr(_C, "FeatureStatsCuda"):
        raise RuntimeError(
            "fastfs was built without CUDA, but got CUDA tensors: install it with nvcc at hand (FASTFS_CUDA=1 makes "
            "the build fail without), or pass backend='reference'"
        )
    return _C


def _feature_stats_cuda(before: list[Tensor], after: list[Tensor], backward: list[Tensor]) -> Tensor:
    call = _cuda_core().FeatureStatsCuda((before, after, backward), False)
    return _launch(call, before[0], FEATURES)


def _feature_stats_per_row_cuda(before: list[Tensor], after: list[Tensor], backward: list[Tensor]) -> Tensor:
    call = _cuda_core().FeatureStatsCuda((before, after, backward), True)
    return _launch(call, before[0], FEATURES)


def _update_stats_cuda(gradients: list[Tensor], updates: list[Tensor]) -> Tensor:
    call = _cuda_core().UpdateStatsCuda((gradients, updates), False)
    return _launch(call, gradients[0], UPDATES)


def _optimizer_stats_cuda(
    rule: int,
    gradients: list[Tensor],
    parameters: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    coefficients: Tensor,
) -> Tensor:
    inputs = _optimizer_inputs(rule, gradients, parameters, first, second)
    call = getattr(_cuda_core(), _OPTIMIZER_CUDA[OptimizerRule(rule)])(inputs, coefficients)
    return _launch(call, gradients[0], PARAMETERS)


# Fakes: shapes and errors without data.


def _feature_stats_fake(before: list[Tensor], after: list[Tensor], backward: list[Tensor]) -> Tensor:
    checks.check_feature_inputs(before, after, backward)
    return _empty(before, len(before), FEATURES)


def _feature_stats_per_row_fake(before: list[Tensor], after: list[Tensor], backward: list[Tensor]) -> Tensor:
    checks.check_feature_inputs(before, after, backward)
    return _empty(before, sum(map(rows_of, before)), FEATURES)


def _update_stats_fake(gradients: list[Tensor], updates: list[Tensor]) -> Tensor:
    checks.check_update_inputs(gradients, updates)
    return _empty(gradients, len(gradients), UPDATES)


# Rows. Documented in fastfs.reference; the C++ checks are the guard, those of Python tell what is wrong.


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


def _optimizer_stats_fake(
    rule: int,
    gradients: list[Tensor],
    parameters: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    coefficients: Tensor,
) -> Tensor:
    checks.check_optimizer_inputs(rule, gradients, parameters, first, second, coefficients)
    return _empty(gradients, len(gradients), PARAMETERS)


def _register(name: str, cpu: Any, cuda: Any, fake: Any) -> None:
    if native_available():
        LIBRARY.impl(name, cpu, "CPU")
        LIBRARY.impl(name, cuda, "CUDA")
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"fastfs::{name}", fake, lib=LIBRARY)


_register("gather_rows", _gather_rows, _gather_rows, _gather_rows_fake)
_register("row_squares", _row_squares, _row_squares, _row_squares_fake)
_register("feature_stats", _feature_stats_cpu, _feature_stats_cuda, _feature_stats_fake)
_register("feature_stats_per_row", _feature_stats_per_row_cpu, _feature_stats_per_row_cuda, _feature_stats_per_row_fake)
_register("update_stats", _update_stats_cpu, _update_stats_cuda, _update_stats_fake)
_register("optimizer_stats", _optimizer_stats_cpu, _optimizer_stats_cuda, _optimizer_stats_fake)
