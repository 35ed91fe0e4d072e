"""Implementations compared by `benchmarks.ops.feature_stats`, and the reasons for which some are excluded.

Implementations shared with the command `fastfs bench` are in `fastfs._bench.baselines`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastfs
from benchmarks.ops.workloads import LADDER, Workload
from fastfs._bench import baselines
from fastfs._bench.baselines import Layers, Sums
from fastfs._bench.comparison import COMPILE, EAGER, HAND, NORMS, OURS
from fastfs._bench.inputs import Inputs

LESS = "torch.compile, no rounding_sq"
COOPERATIVE = "torch.compile, cooperative reductions"
COMBO = "torch.compile, whole list, combo_kernels"
FOREACH = "eager by hand, foreach"
TRITON = "Triton"
TRITON_LIST = "Triton, one launch"

MOST_COMBINED = 30  # layers per graph; each ten take several seconds to compile
MOST_EAGER, MOST_ROWS = 2**28, 2**25  # largest bytes of the eager reference: in general, and per row on the CPU
WHOLE = (COMPILE, COOPERATIVE, COMBO)
"""Variants of torch.compile that compute all sums."""


@dataclass(frozen=True)
class Implementation:
    """An implementation of the sums.

    Args:
        prepare: returns the call for given inputs; its own time is not measured.
        compiles: whether the first call compiles, which takes seconds.
        checked: whether its sums can be compared by `ExpectedSums.error`.
        graph: whether to time it as a replayed CUDA graph on a GPU, because it launches many kernels.
    """

    prepare: Callable[[Inputs], Callable[[], Tensor]]
    compiles: bool = False
    checked: bool = True
    graph: bool = True


def _plain(sums: Sums, *, compiles: bool = False, checked: bool = True) -> Implementation:
    return Implementation(lambda inputs: functools.partial(sums, *inputs), compiles, checked)


def whole_list() -> Sums:
    """Compile all layers as one graph, with kernels that process several layers."""

    def function(before: Layers, after: Layers, backward: Layers) -> Tensor:
        return torch.stack([baselines.layer_sums(*x) for x in zip(before, after, backward, strict=True)])

    return torch.compile(function, fullgraph=True, dynamic=False, options={"combo_kernels": True})


def _ours(per_row: bool, backend: Any, inputs: Inputs) -> Tensor:
    found = fastfs.feature_stats(*inputs, per_row=per_row, backend=backend)
    return torch.cat([x.sums for x in found]) if isinstance(found, list) else found.sums


def select_implementations(
    workload: Workload, device: torch.device, triton: Any
) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Return all implementations by name, and the excluded ones with the reason; `triton` is from triton_kernels()."""
    per_row, layers, on_gpu = workload.per_row, len(workload.shapes), device.type == "cuda"
    stats = {None: OURS, "reference": EAGER}
    found = {
        name: Implementation(lambda inputs, b=backend: functools.partial(_ours, per_row, b, inputs), graph=name != OURS)  # type: ignore[misc]
        for backend, name in stats.items()
    }
    left_out = {}
    if workload.bytes > (MOST_ROWS if per_row and not on_gpu else MOST_EAGER):
        del found[EAGER]
        left_out[EAGER] = "too slow at this size"
    found[COMPILE] = _plain(baselines.compiled(per_row=per_row), compiles=True)
    if workload.part != LADDER or workload.bytes in range(2**27, 2**29):
        found[LESS] = _plain(baselines.compiled(per_row=per_row, rounding=False), compiles=True)
    if on_gpu:
        options = {"triton.cooperative_reductions": True}
        found[COOPERATIVE] = _plain(baselines.compiled(per_row=per_row, options=options), compiles=True)
    else:
        left_out[COOPERATIVE] = "for GPUs only"
    found[HAND] = _plain(baselines.by_hand_per_row if per_row else baselines.by_hand)
    if not per_row:
        if layers > 1:
            if not on_gpu:
                left_out[COMBO] = "for GPUs only"
            elif layers > MOST_COMBINED:
                left_out[COMBO] = f"{layers} layers; at most {MOST_COMBINED} can be compiled in the available time"
            else:
                found[COMBO] = _plain(whole_list(), compiles=True)
            if on_gpu:
                found[FOREACH] = _plain(baselines.by_hand_foreach)
        found[NORMS] = _plain(baselines.norms, checked=False)
    if isinstance(triton, str):
        left_out[TRITON] = triton
    else:
        found[TRITON] = Implementation(triton.per_row if per_row else triton.per_layer, compiles=True)
        if layers > 1 and not per_row:
            found[TRITON_LIST] = Implementation(triton.all_layers, compiles=True)
    return found, left_out


def triton_kernels(device: torch.device) -> Any:
    """Return the Triton kernels, or why they are unavailable."""
    if device.type != "cuda":
        return "for GPUs only"
    try:
        from benchmarks.ops.triton_kernels import Kernels
    except ImportError as error:
        return str(error)
    return Kernels(device)
