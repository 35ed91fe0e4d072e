"""Every op of the native core, on inputs that take all ways through its kernels: short, long, rows, strides."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastfs import feature_stats, update_stats
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._functional import optimizer_stats
from tests.helpers.cases import DTYPES, RULES, inputs, layers, step_arguments, step_inputs

# From nothing to several groups of chunks, and rows of all lengths.
SHAPES = ((70 * 8192 + 11,), (3, 8193), (1000, 33), (65, 8192), (100,), (), (0, 3), (20_000,))
WIDE = (50, 9000)  # rows that several blocks share

Call = Callable[[], list[Tensor]]


def _features(device: str) -> Call:
    x = layers(SHAPES, device=device)
    return lambda: [feature_stats(*x).sums]


def _features_per_row(device: str) -> Call:
    x = layers(SHAPES, device=device)
    return lambda: [found.sums for found in feature_stats(*x, per_row=True)]


def _updates(device: str) -> Call:
    gradients, _, updates = layers(SHAPES, device=device)
    return lambda: [update_stats(gradients, updates).sums]


def _steps(rule: OptimizerRule, dtype: torch.dtype, device: str) -> Call:
    arguments = step_arguments(rule, [step_inputs(rule, shape, dtype, device=device) for shape in SHAPES])
    return lambda: [optimizer_stats(*arguments).sums]


def _gather(dtype: torch.dtype, device: str) -> Call:
    x, rows = inputs(WIDE, dtype, device=device)[0], torch.randint(WIDE[0], (64,)).to(device)
    return lambda: list(torch.ops.fastfs.gather_rows(x, rows, 1, torch.bfloat16))


def _squares(dtype: torch.dtype, device: str) -> Call:
    x, rows = inputs(WIDE, dtype, device=device)[0], torch.randint(WIDE[0], (64,)).to(device)
    return lambda: [torch.ops.fastfs.row_squares(x, rows, 1)]


# By name: from a device to a call on inputs there, drawn from the global generator of the CPU.
OPS: dict[str, Callable[[str], Call]] = {
    "feature_stats": _features,
    "feature_stats per row": _features_per_row,
    "update_stats": _updates,
    **{f"optimizer_stats {r.name} {d}": functools.partial(_steps, r, d) for r, d in RULES},
    **{f"gather_rows {d}": functools.partial(_gather, d) for d in DTYPES},
    **{f"row_squares {d}": functools.partial(_squares, d) for d in DTYPES},
}
