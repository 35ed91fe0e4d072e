"""The measurements in plain PyTorch: the specification of the native core.

The functions have the names, arguments and results of their native counterparts, compute in float64 and run on every
device. They are written to be read and are slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastfs._core.checks import (
    Layers,
    check_feature_inputs,
    check_optimizer_inputs,
    check_pieces,
    check_row_inputs,
    check_update_inputs,
)
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._stats import FeatureStats, ParameterStats, Stats, UpdateStats

__all__ = ["feature_stats", "gather_rows", "optimizer_stats", "row_squares", "spacing", "update_stats"]

# Elements taken at once, so that the float64 copies of a large layer stay small: in the processor's cache.
SLICE = 2**16


def __dir__() -> list[str]:
    return __all__


def feature_stats(
    before: Layers, after: Layers, backward: Layers, *, per_row: bool = False
) -> FeatureStats | list[FeatureStats]:
    """Computes what `fastfs.feature_stats` computes; errors are the same.

    Args:
        before: Features before the update of the parameters: a tensor, or a sequence of one tensor per layer.
        after: Features after the update, on the same rows.
        backward: Backward vectors, dLoss/d(features).
        per_row: Whether to sum per row (last dimension) instead of per layer.

    Returns:
        FeatureStats of shape () for tensors and (L,) for sequences; with `per_row`, of shape (rows,) for tensors and a
        list of one per layer for sequences.
    """
    single, layers = check_feature_inputs(before, after, backward)
    if per_row:
        rows = [FeatureStats(_feature_sums(*(_rows(x) for x in tensors))) for tensors in zip(*layers, strict=True)]
        return rows[0] if single else rows
    sums = [_in_slices(_feature_sums, tensors) for tensors in zip(*layers, strict=True)]
    return FeatureStats(sums[0] if single else _stack(sums, len(FeatureStats.names)))


def update_stats(gradients: Layers, updates: Layers) -> UpdateStats:
    """Computes what `fastfs.update_stats` computes; errors are the same.

    Args:
        gradients: Gradients of the loss: a tensor, or a sequence of one tensor per parameter.
        updates: Updates of the parameters, of the gradients' shapes.

    Returns:
        UpdateStats of shape () for tensors and (L,) for sequences.
    """
    single, layers = check_update_inputs(gradients, updates)
    sums = [_in_slices(_update_sums, tensors) for tensors in zip(*layers, strict=True)]
    return UpdateStats(sums[0] if single else _stack(sums, len(UpdateStats.names)))


def gather_rows(x: Tensor, rows: Tensor, row_dims: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Copies rows of a tensor, casts them, and computes the squared norm of each as it is in `x`.

    Args:
        x: tensor of any strides; its first `row_dims` dimensions, flattened row-major, number the rows, and the
            others are the width of a row. With `row_dims` 0 it is one row.
        rows: int64 (k,) on the device of `x`: which rows, in any order, repeats allowed.
        row_dims: 0 to `x.dim()`.
        dtype: of the copy, rounded to nearest even; None for that of `x`.

    Returns:
        The rows, contiguous (k, width), and their squared norms, float64 (k,).

    Raises:
        TypeError: If an argument has the wrong type, or `x` is no dense real floating-point tensor.
        ValueError: If dtype, shape or device of `rows`, or `row_dims`, is wrong.
        IndexError: On the CPU, for an out-of-range index in `rows`. On other devices, where checking would wait for the
            device, such a row and its norm are NaN.
    """
    check_row_inputs(x, rows, row_dims, dtype)
    kept = _take_rows(x, rows, row_dims)
    return kept.to(dtype or x.dtype), kept.to(torch.float64).square().sum(dim=1)


def row_squares(x: Tensor, rows: Tensor, row_dims: int) -> Tensor:
    """Computes the squared norms of rows of a tensor, without copying the rows; errors are those of `gather_rows`.

    Args:
        x: Tensor of any strides.
        rows: int64 (k,) on the device of `x`: indices of rows.
        row_dims: How many of the first dimensions number the rows, 0 to `x.dim()`.

    Returns:
        The squared norms, float64 (k,).
    """
    return gather_rows(x, rows, row_dims)[1]


def _take_rows(x: Tensor, rows: Tensor, row_dims: int) -> Tensor:
    count = math.prod(x.shape[:row_dims])
    table = x.detach().reshape(count, math.prod(x.shape[row_dims:]))
    valid = (rows >= 0) & (rows < count)
    if x.device.type == "cpu" and not bool(valid.all()):
        at = int((~valid).nonzero()[0])
        raise IndexError(
            f"rows[{at}] is {int(rows[at])}, expected the number of one of the {count} rows of x: "
            f"at least 0 and less than {count}"
        )
    if count == 0:
        return table.new_full((rows.numel(), table.shape[1]), torch.nan)
    return torch.where(valid[:, None], table[torch.where(valid, rows, 0)], torch.nan)


def optimizer_stats(
    rule: int,
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    coefficients: Tensor,
    *,
    pieces: Tensor | None = None,
) -> ParameterStats:
    """Computes what `fastfs.optimizer_stats` computes; errors are the same.

    Args:
        rule: A `fastfs.OptimizerRule`: how the update follows from the tensors and the coefficients.
        gradients: One gradient per parameter.
        parameters: The parameters after the step.
        first: The first state of every parameter.
        second: The second state of every parameter; an empty list for `OptimizerRule.LINEAR`.
        coefficients: float64 (P, C), with the columns `rule.coefficients`.
        pieces: Parts of the tensors, int64 (Q, 3); None for all of every parameter.

    Returns:
        ParameterStats of shape (P,), or (Q,) with pieces.
    """
    kind, layers = check_optimizer_inputs(rule, gradients, parameters, first, second, coefficients, pieces)
    if pieces is not None:
        check_pieces(layers, pieces)
        parts = pieces.tolist()
        layers = [[_part(each[index], begin, count) for index, begin, count in parts] for each in layers]
    sums = []
    for row, tensors in zip(coefficients, zip(*layers, strict=True), strict=True):
        c = row.to(tensors[0].device)
        sums.append(_in_slices(lambda *x, c=c: _optimizer_sums(kind, c, *x), tensors))
    return ParameterStats(_stack(sums, len(ParameterStats.names)))


def _part(tensor: Tensor, begin: int, count: int) -> Tensor:
    return tensor if count == tensor.numel() else tensor.reshape(-1)[begin : begin + count]


def _optimizer_sums(rule: OptimizerRule, c: Tensor, gradient: Tensor, parameter: Tensor, *state: Tensor) -> Tensor:
    """Sums over the last dimension, (..., n) to (..., names), in the order of `ParameterStats.names`."""
    g, w, *s = (x.to(torch.float64) for x in (gradient, parameter, *state))
    nonfinite = _nonfinite(g) + _nonfinite(w)
    if rule is OptimizerRule.LINEAR:
        dw = c[0] * w + c[1] * g + c[2] * s[0]
        g = g + c[3] * s[0]
    elif rule is OptimizerRule.ADAM:
        dw = c[0] * w + c[1] * s[0] / _denominator(c[2] * s[1].sqrt() + c[3])
    elif rule is OptimizerRule.ADAMAX:
        dw = c[0] * s[0] / _denominator(s[1])
    else:
        dw = (c[0] * w + c[1] * g) / _denominator((s[0] - c[2] * s[1].square()).sqrt() + c[3])
    return _products(ParameterStats, {"gradient": g, "update": dw, "parameter": w}, nonfinite)


def _denominator(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0, x)


def _feature_sums(before: Tensor, after: Tensor, backward: Tensor) -> Tensor:
    """Sums over the last dimension: (..., n) three times to (..., 9), in the order of `FeatureStats.names`."""
    f, g, b = before.to(torch.float64), after.to(torch.float64), backward.to(torch.float64)
    df = g - f
    terms = [
        df * b,
        df * df,
        b * b,
        f * f,
        f * df,
        (df * b).abs(),
        (spacing(before).square() + spacing(after).square()) / 12,
        _nonfinite(f) + _nonfinite(g) + _nonfinite(b),
        torch.ones_like(f),
    ]
    return torch.stack([term.sum(dim=-1) for term in terms], dim=-1)


def _update_sums(gradient: Tensor, update: Tensor) -> Tensor:
    """Sums over the last dimension: (..., n) twice to (..., 5), in the order of `UpdateStats.names`."""
    g, dw = gradient.to(torch.float64), update.to(torch.float64)
    return _products(UpdateStats, {"gradient": g, "update": dw}, _nonfinite(g) + _nonfinite(dw))


def _products(kind: type[Stats], vectors: dict[str, Tensor], nonfinite: Tensor) -> Tensor:
    """Sums over the last dimension of the products that `kind.factors` names, and the counts."""
    terms = [vectors[a] * vectors[b] for a, b in kind.factors.values()]
    return torch.stack([term.sum(dim=-1) for term in (*terms, nonfinite, torch.ones_like(nonfinite))], dim=-1)


def spacing(x: Tensor) -> Tensor:
    """Computes the distance between neighboring numbers of the dtype of `x` at each value of `x`, in float64.

    A value rounded to nearest is off by a uniform error of variance spacing^2 / 12. The spacing is
    2^floor(log2|x|) eps. Zero counts as exact (ReLU, masks, padding), as does everything below the smallest normal
    number, except in float16, whose subnormal numbers features do reach; they are all 2^-24 apart.

    Args:
        x: Tensor of a floating-point dtype.

    Returns:
        float64 tensor of the shape of `x`; nan where `x` is not finite.
    """
    info = torch.finfo(x.dtype)
    size = x.to(torch.float64).abs()
    mantissa, _ = torch.frexp(size)  # size = mantissa * 2^exponent with mantissa in [1/2, 1)
    power_of_two = size / (2 * mantissa)  # exact
    below_normal = info.tiny * info.eps if x.dtype == torch.float16 else 0.0
    result = torch.where(size < info.tiny, below_normal, power_of_two * info.eps)
    return torch.where(size == 0, 0.0, result)


def _nonfinite(x: Tensor) -> Tensor:
    return (~x.isfinite()).to(torch.float64)


def _rows(x: Tensor) -> Tensor:
    """A detached (rows, width) view or copy of `x`: rows are all but the last dimension; 0-d is one row of one."""
    width = x.shape[-1] if x.dim() else 1
    return x.detach().reshape(math.prod(x.shape[:-1]), width)


def _in_slices(sums: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
    """`sums` over all elements of the tensors, taken in slices: (names,)."""
    slices = zip(*(torch.split(x.detach().reshape(-1), SLICE) for x in tensors), strict=True)
    return torch.stack([sums(*parts) for parts in slices]).sum(dim=0)


def _stack(sums: list[Tensor], names: int) -> Tensor:
    return torch.stack(sums) if sums else torch.zeros(0, names, dtype=torch.float64, device="cpu")
