"""The stateless measurements: each calls its native op and wraps the result.

Inputs are not checked before the call. If the op fails, `fastfs._core.checks` finds the error, which names the layer
and the cause.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastfs import reference
from fastfs._core import checks, ops
from fastfs._core.checks import Layers
from fastfs._network import placements
from fastfs._stats import FeatureStats, ParameterStats, UpdateStats

Backend = Literal["native", "reference"] | None

_BEFORE, _RADIAL, _ROUNDING = map(FeatureStats.names.index, ("before_sq", "before_dot_update", "rounding_sq"))


@overload
def feature_stats(
    before: Layers,
    after: Layers,
    backward: Layers,
    *,
    per_row: Literal[False] = False,
    backend: Backend = None,
) -> FeatureStats: ...
@overload
def feature_stats(
    before: Tensor, after: Tensor, backward: Tensor, *, per_row: Literal[True], backend: Backend = None
) -> FeatureStats: ...
@overload
def feature_stats(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    backward: Sequence[Tensor],
    *,
    per_row: Literal[True],
    backend: Backend = None,
) -> list[FeatureStats]: ...
@overload
def feature_stats(
    before: Layers, after: Layers, backward: Layers, *, per_row: bool, backend: Backend = None
) -> FeatureStats | list[FeatureStats]: ...
def feature_stats(
    before: Layers,
    after: Layers,
    backward: Layers,
    *,
    per_row: bool = False,
    backend: Backend = None,
) -> FeatureStats | list[FeatureStats]:
    """Measures how features moved in a step and how their update is aligned with the backward pass.

    One pass over the memory computes all sums of all layers in float64, without synchronizing with the device. The bits
    of the result depend neither on the number of threads nor on the other layers. The result is detached.

    Args:
        before: Features before the update of the parameters: a tensor of any shape and layout, or a sequence of one
            tensor per layer. float16, bfloat16, float32 or float64; layers may differ in shape and dtype. Of a DTensor
            the part is measured that this rank holds: the sums over shards add up to those of the whole over the ranks
            (:meth:`FeatureStats.all_reduce`), and replicated tensors have the same sums on every rank.
        after: Features after the update, on the same rows; shape and dtype of `before`.
        backward: Backward vector, dLoss/d(features); shape of `before`, any of the dtypes.
        per_row: Whether to sum per row (last dimension) instead of per layer.
        backend: None for the native core where it is built, or "native", or "reference" (plain torch).

    Returns:
        FeatureStats of shape () for tensors and (L,) for sequences of L. With `per_row`, of shape (rows,) for tensors
        and a list of one per layer for sequences.

    Raises:
        TypeError: if the arguments are not all tensors or all sequences of tensors, or `per_row` is not a bool.
        ValueError: for a wrong dtype, layout, shape, device or number of layers, or a DTensor that is a partial sum
            over ranks; the message names the layer.
        RuntimeError: if `backend="native"` is not built.

    Source: sections 1 and 2 of "The Feature Speed Formula", arXiv 2311.18718.
    """
    if not isinstance(per_row, bool):
        raise TypeError(f"per_row: expected True or False, got {per_row!r}")
    if (backend is not None or not ops.native_available()) and _use_reference(backend):
        parts = _local_parts(before=before, after=after, backward=backward)
        return reference.feature_stats(*(parts or (before, after, backward)), per_row=per_row)

    single = isinstance(before, Tensor)
    if isinstance(after, Tensor) is not single or isinstance(backward, Tensor) is not single:
        checks.check_feature_inputs(before, after, backward)  # raises
    op = torch.ops.fastfs.feature_stats_per_row if per_row else torch.ops.fastfs.feature_stats
    try:
        if single:
            sums = op([before], [after], [backward])
        elif len(before) > 0:
            sums = op(_listed(before), _listed(after), _listed(backward))
        else:  # no layers: nothing that has a device, which the dispatcher goes by
            return reference.feature_stats(before, after, backward, per_row=per_row)
    except Exception as failure:
        parts = _local_parts(before=before, after=after, backward=backward)
        if parts is not None:
            return feature_stats(*parts, per_row=per_row, backend=backend)
        error = _clearest(failure, checks.check_feature_inputs, before, after, backward)
        raise error from None

    if single:
        return FeatureStats(sums if per_row else sums.squeeze(0))
    if per_row:
        rows = [math.prod(x.shape[:-1]) for x in before]
        return [FeatureStats(part) for part in sums.split(rows)]
    return FeatureStats(sums)


def first_order_stats(
    features: Sequence[Tensor], changes: Sequence[Tensor], backward: Sequence[Tensor], *, per_row: bool = False
) -> list[FeatureStats]:
    """What :func:`feature_stats` says of feature updates that are given themselves, as a derivative is.

    Nothing is subtracted, so there is no rounding noise: ``rounding_sq`` is zero.

    Args:
        features: before the update, one tensor per layer.
        changes: the feature updates, of the same shapes.
        backward: the backward vectors.
        per_row: sums per row instead of per layer.

    Returns:
        One FeatureStats per layer, of shape () or, with ``per_row``, (rows,).
    """
    zeros = [torch.zeros_like(change) for change in changes]
    result = [_first_order(s) for s in _each(feature_stats(zeros, changes, backward, per_row=per_row))]
    # <f, df> and |f|^2, which the call above has taken of zeros.
    same = [f.to(change.dtype) for f, change in zip(features, changes, strict=True)]
    for sums, radial in zip(result, _each(feature_stats(zeros, same, changes, per_row=per_row)), strict=True):
        sums[..., _BEFORE] = radial.update_sq
        sums[..., _RADIAL] = radial.update_dot_backward
    return [FeatureStats(sums) for sums in result]


def _first_order(stats: FeatureStats) -> Tensor:
    sums = stats.sums.clone()
    sums[..., _ROUNDING] = 0.0
    return sums


def _each(stats: FeatureStats | list[FeatureStats]) -> list[FeatureStats]:
    return stats if isinstance(stats, list) else [FeatureStats(row) for row in stats.sums.unbind(0)]


def update_stats(gradients: Layers, updates: Layers, *, backend: Backend = None) -> UpdateStats:
    """Measures how parameter updates are aligned with the gradients.

    Args:
        gradients: Gradient of the loss, a tensor, or a sequence of one tensor per parameter. Unclipped and unscaled,
            for the feature speed formula to hold. Any shape and layout; float16, bfloat16, float32 or float64. Of a
            DTensor the part of this rank is measured, as by `feature_stats`.
        updates: Change of the parameter in the step, w_after - w_before; shape of the gradient, any of the dtypes.
        backend: None for the native core where it is built, or "native", or "reference" (plain torch).

    Returns:
        UpdateStats of shape () for tensors and (L,) for sequences of L; detached.

    Raises:
        TypeError: if the arguments are not all tensors or all sequences of tensors.
        ValueError: for a wrong dtype, layout, shape, device or number of layers, or a DTensor that is a partial sum
            over ranks; the message names the layer.
        RuntimeError: if `backend="native"` is not built.

    Source: D of section 2 of "The Feature Speed Formula", arXiv 2311.18718, in the form with dw.
    """
    if (backend is not None or not ops.native_available()) and _use_reference(backend):
        return reference.update_stats(*(_local_parts(gradients=gradients, updates=updates) or (gradients, updates)))

    single = isinstance(gradients, Tensor)
    if isinstance(updates, Tensor) is not single:
        checks.check_update_inputs(gradients, updates)  # raises
    try:
        if single:
            sums = torch.ops.fastfs.update_stats([gradients], [updates])
        elif len(gradients) > 0:
            sums = torch.ops.fastfs.update_stats(_listed(gradients), _listed(updates))
        else:  # as above
            return reference.update_stats(gradients, updates)
    except Exception as failure:
        parts = _local_parts(gradients=gradients, updates=updates)
        if parts is not None:
            return update_stats(*parts, backend=backend)
        error = _clearest(failure, checks.check_update_inputs, gradients, updates)
        raise error from None
    return UpdateStats(sums.squeeze(0) if single else sums)


def optimizer_stats(
    rule: int,
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    coefficients: Tensor,
    *,
    pieces: Tensor | None = None,
    backend: Backend = None,
) -> ParameterStats:
    """Measures the updates of P parameters in an optimizer step, from the state after the step.

    The update dw follows from gradient, parameter and optimizer state by a closed form, and is not written to memory.
    With `pieces`, only these parts of the parameters are read, for estimates from a sample.

    Args:
        rule: A `fastfs.OptimizerRule`: how dw follows from the tensors and the coefficients.
        gradients: Gradients, one tensor per parameter. Any layout. All tensors of one parameter have its shape and
            dtype: float32 or float64, with `OptimizerRule.LINEAR` also float16 or bfloat16. Of DTensors the part of
            this rank is measured, as by `feature_stats`; pieces count its elements.
        parameters: The parameters after the step.
        first: The first state of every parameter; the gradients where an optimizer has none.
        second: The second state; an empty list for `OptimizerRule.LINEAR`.
        coefficients: float64 (P, C), contiguous, with the columns `rule.coefficients`. On the CPU (passed with
            the launch) or on the parameters' device (read by the kernel, without synchronization). With pieces, one
            row for each piece.
        pieces: Parts of the parameters to be read, each with a row of sums of its own: int64 (Q, 3) on the CPU, with
            the index of a parameter, the first element and the number of elements. All tensors of a parameter that is
            read in part have to be contiguous. None for all of every parameter.
        backend: None for the native core where it is built, or "native", or "reference" (plain torch).

    Returns:
        ParameterStats of shape (P,), or (Q,) with pieces; detached. nonfinite counts entries of gradients and
        parameters.

    Raises:
        TypeError: for anything that is not a sequence of tensors.
        ValueError: for an unknown rule, a wrong dtype, layout, shape, device or number of tensors, or a piece that is
            not within its parameter.
        RuntimeError: if `backend="native"` is not built.
    """
    arguments = (rule, gradients, parameters, first, second, coefficients)
    if (backend is not None or not ops.native_available()) and _use_reference(backend):
        parts = _local_parts(gradients=gradients, parameters=parameters, first=first, second=second)
        if parts is not None:
            gradients, parameters, first, second = parts
            arguments = (rule, gradients, parameters, first, second, coefficients)
        return reference.optimizer_stats(*arguments, pieces=pieces)
    if isinstance(gradients, Sequence) and len(gradients) == 0:
        return reference.optimizer_stats(*arguments, pieces=pieces)  # nothing that has a device
    try:
        return ParameterStats(torch.ops.fastfs.optimizer_stats(*arguments, pieces))
    except Exception as failure:
        parts = _local_parts(gradients=gradients, parameters=parameters, first=first, second=second)
        if parts is not None:
            gradients, parameters, first, second = parts
            return optimizer_stats(
                rule, gradients, parameters, first, second, coefficients, pieces=pieces, backend=backend
            )
        error = _clearest(failure, _check_optimizer_call, *arguments, pieces)
        raise error from None


def _local_parts(**arguments: Any) -> tuple[Any, ...] | None:
    """Returns the arguments with the part of this rank in the place of every DTensor; None if there is no DTensor."""
    names, single = list(arguments), isinstance(next(iter(arguments.values())), Tensor)
    lists = [[value] if isinstance(value, Tensor) else value for value in arguments.values()]
    if not all(isinstance(value, Sequence) for value in lists) or not any(
        isinstance(x, Tensor) and placements.is_distributed(x) for value in lists for x in value
    ):
        return None
    for index, tensors in enumerate(zip(*(value for value in lists if len(value)), strict=False)):
        spread = [(n, x) for n, x in zip(names, tensors, strict=False) if placements.is_distributed(x)]
        for name, x in spread:
            where, shown = "" if single else f"layer {index}: ", placements.spread(x)
            if placements.is_partial(x):
                raise ValueError(
                    f"{where}{name} is a partial sum over ranks ({shown}), of which this rank has a summand only: "
                    "redistribute it first, to Shard or Replicate"
                )
            if not placements.same_placements(x, spread[0][1]):
                other = f"{placements.spread(spread[0][1])}, as {spread[0][0]}"
                raise ValueError(f"{where}{name} has the placements {shown}, expected {other}: redistribute it first")
    parts = [[placements.local(x) if isinstance(x, Tensor) else x for x in value] for value in lists]
    return tuple(part[0] if isinstance(v, Tensor) else part for part, v in zip(parts, arguments.values(), strict=True))


def _check_optimizer_call(*arguments: Any) -> None:
    _, layers = checks.check_optimizer_inputs(*arguments)
    if arguments[-1] is not None:
        checks.check_pieces(layers, arguments[-1])


def _listed(layers: Any) -> list[Tensor] | tuple[Tensor, ...]:
    """Returns a sequence as a list or tuple, which the op accepts; other iterables are an error."""
    kind = type(layers)
    if kind is list or kind is tuple:
        return layers  # type: ignore[no-any-return]
    if not isinstance(layers, Sequence):
        raise TypeError(f"expected a sequence of tensors, got {kind}")
    return list(layers)


def _clearest(failure: Exception, check: Callable[..., object], *arguments: object) -> Exception:
    """Returns the error that `check` raises for the arguments, or the failure itself if it raises none."""
    try:
        check(*arguments)
    except (TypeError, ValueError) as error:
        return error
    return failure


def _use_reference(backend: Any) -> bool:
    if backend == "reference":
        return True
    if backend is not None and backend != "native":
        raise ValueError(f"backend: expected None, 'native' or 'reference', got {backend!r}")
    if ops.native_available():
        return False
    if backend == "native":
        raise RuntimeError(f"backend 'native': the native core of fastfs is not in use: {ops.why_not_native()}")
    _warn_once()
    return True


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"fastfs uses its slow reference implementation, because the native core is not in use: {ops.why_not_native()} "
        "(backend='reference' chooses the reference without this warning)",
        RuntimeWarning,
        stacklevel=4,
    )
