"""Whether an update that a closed form tells is the one that happened, by a few elements of every parameter.

w - w' of these elements, copied before and after the step, has to be what the rule makes of the state, up to rounding:

    |(w - w') - dw| <= 4 eps (|w| + |w'|) + (16 eps + u) (|part| + ...) + the smallest normal number

with norms over the elements of one parameter. A step rounds w at most twice, by half a unit each, once more where a
factor 1 - lr wd is rounded (which the closed form divides by), and every part of dw in at most some ten operations, by
half a unit each. u is the uncertainty of bias corrections (``closed_forms``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._monitor.capture.fingerprints import Places, Samples, on_host
from fastfs._monitor.measure.closed_forms import parts_of

__all__ = ["same_gradients", "verify"]

_OF_PARAMETER, _OF_PARTS = 4.0, 16.0  # in units of eps
_TELLS = 1e-2  # relative error up to which elements tell one update from another


def verify(
    rule: OptimizerRule,
    places: Places,
    before: Samples,
    after: Samples,
    gradients: Samples | None,
    table: Tensor,
    *,
    uncertain: Tensor | None,
    made: Tensor | None,
    doubted: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Which of n parameters have moved as the rule says.

    Args:
        rule: of the closed form.
        places: of the samples.
        before: parameters before the step.
        after: parameters, first and second state after it; the first state is left out where it is the gradient.
        gradients: where the rule has them.
        table: coefficients, (n, C).
        uncertain: relative error of the update that is to be expected, (n,).
        made: whether the step happened at all, bool (); None if it did.
        doubted: whether hyper-parameters may be others than those that the step used.

    Returns:
        None if it is known that all have. Else whether the update is as it should be, bool (n,); and if it is doubted,
        whether rounding hides so much of it that another learning rate might pass, too.
    """
    good: list[Tensor] = []
    vague: list[Tensor] = []
    known = made is None and not doubted
    for number, block in enumerate(places.blocks):
        flats = [before.flats[number], after.flats[number]]
        if gradients is not None:
            flats.append(gradients.flats[number])
        columns, relative = table.to(block.device, non_blocking=True), uncertain
        if relative is not None:
            relative = relative.to(block.device, non_blocking=True)
        if not places.whole:
            columns = columns.index_select(0, block.place)
            relative = None if relative is None else relative.index_select(0, block.place)
        rows, columns = places.host_rows(number, *flats), on_host(columns)
        with numpy.errstate(all="ignore"):
            fits, limit, size = _fits(
                rule, list(rows), gradients is not None, columns[:, :, None], block.dtype, relative
            )
        known = known and not isinstance(fits, Tensor) and bool(fits.all())
        good.append(torch.as_tensor(fits))
        if made is not None:
            still = torch.as_tensor(((rows[1] - rows[0]) == 0).all(-1))
            good[-1] = torch.where(made.to(block.device, non_blocking=True), good[-1], still)
        if doubted:
            vague.append(torch.as_tensor((limit > _TELLS * size) & (size > 0)))
    if known:
        return None
    if not good:  # nothing but empty tensors
        nothing = torch.zeros(places.count, dtype=torch.bool, device=places.home)
        return ~nothing, nothing
    return places.gather(good, missing=True), places.gather(vague, missing=False) if doubted else None


def _fits(
    rule: OptimizerRule, rows: list[Any], has_gradient: bool, columns: Any, dtype: torch.dtype, relative: Tensor | None
) -> tuple[Any, Any, Any]:
    """For arrays as for tensors, (P,) each: whether parameters moved as they should; limit of the error; size."""
    old, new, *state = rows
    gradient = state.pop() if has_gradient else None
    first = state[0] if state else gradient
    second = state[1] if len(state) > 1 else None
    parts = parts_of(rule, new, gradient, first, second, [columns[:, i] for i in range(columns.shape[1])])
    rest, size = new - old, 0.0
    for part in parts:
        rest = rest - part
        size = size + (part * part).sum(-1) ** 0.5
    info = torch.finfo(dtype)
    weight = ((old * old).sum(-1) + (new * new).sum(-1)) ** 0.5
    limit = weight * (2.0**0.5 * _OF_PARAMETER * info.eps) + size * (_OF_PARTS * info.eps) + info.smallest_normal
    if relative is not None:
        limit = limit + size * on_host(relative)
    # Not greater than: where something is not a number nothing fits.
    return (rest * rest).sum(-1) <= limit * limit, limit, size


def same_gradients(before: Samples, after: Samples, added: Samples | None, factor: Tensor | float) -> Tensor:
    """Whether gradients are still, up to rounding, what they were once an addition, or a factor, is taken out.

    Args:
        before, after: their samples.
        added: samples of what is added to them, ``factor`` times; None: they are multiplied by the factor.

    Returns:
        Bool (P,).
    """
    parts = []
    for number, block in enumerate(before.places.blocks):
        old, new = before.rows(number)[0], after.rows(number)[0]
        by = factor.to(block.device, torch.float64, non_blocking=True) if isinstance(factor, Tensor) else factor
        pieces: Sequence[Tensor] = [new / by] if added is None else [new, added.rows(number)[0] * -by]
        size = sum((piece.abs() for piece in pieces), torch.zeros_like(old))
        info = torch.finfo(block.dtype)
        distance = (old - sum(pieces, torch.zeros_like(old))).abs_()
        close = distance <= size * (2.0 * info.eps) + info.smallest_normal
        parts.append((close | (old.isnan() & new.isnan()) | (old == new)).all(dim=1))
    if not parts:
        return torch.ones(before.places.count, dtype=torch.bool, device=before.places.home)
    return before.places.gather(parts, missing=True)
