"""Verifies that an update is that of its closed form, by a few elements of every parameter.

The difference of these elements, copied before (w') and after the step (w), has to be the update that the rule gives,
up to rounding:

    |(w - w') - dw| <= 4 eps (|w| + |w'|) + (16 eps + u) (|term| + ...) + the smallest normal number

with norms over the elements of one parameter and the terms of dw. A step rounds w at most twice, by half a unit each,
once more where a factor 1 - lr wd is rounded (by which the closed form divides), and every term of dw in at most about
ten operations, by half a unit each. u is the uncertainty of bias corrections (``closed_forms``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from fastfs._core.optimizer_rules import OptimizerRule, update_terms
from fastfs._monitor.capture.fingerprints import Places, Samples, on_host

__all__ = ["same_gradients", "verify"]

_OF_PARAMETER, _OF_TERMS = 4.0, 16.0  # in units of eps
_TELLING = 1e-2  # relative error up to which elements tell one learning rate from another


def verify(
    rule: OptimizerRule,
    places: Places,
    before: Samples,
    after: Samples,
    gradients: Samples | None,
    table: Tensor,
    *,
    uncertainty: Tensor | None,
    made: Tensor | None,
    doubted: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Verifies the updates of n parameters.

    Args:
        rule: The rule of the closed form.
        places: Places of the samples.
        before: Samples of the parameters before the step.
        after: Samples of parameters, first and second state after it; without the first state where the rule is given
            the gradient instead.
        gradients: Samples of the gradients, for rules that read them.
        table: Coefficients, float64 (n, C).
        uncertainty: Relative error of the update that is to be expected, float64 (n,); None for none.
        made: Whether the step was made at all, bool (); None if it was.
        doubted: Whether hyper-parameters may be others than those that the step used.

    Returns:
        None if the host knows that all updates are right. Else whether they are, bool (n,); and if `doubted`, whether
        rounding hides so much of an update that another learning rate might pass, too.
    """
    right: list[Tensor] = []
    vague: list[Tensor] = []
    known = made is None and not doubted
    for number, block in enumerate(places.blocks):
        flats = [before.flats[number], after.flats[number]]
        if gradients is not None:
            flats.append(gradients.flats[number])
        columns, relative = table.to(block.device, non_blocking=True), uncertainty
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
        right.append(torch.as_tensor(fits))
        if made is not None:
            unmoved = torch.as_tensor(((rows[1] - rows[0]) == 0).all(-1))
            right[-1] = torch.where(made.to(block.device, non_blocking=True), right[-1], unmoved)
        if doubted:
            vague.append(torch.as_tensor((limit > _TELLING * size) & (size > 0)))
    if known:
        return None
    if not right:  # empty tensors only
        nothing = torch.zeros(places.count, dtype=torch.bool, device=places.home)
        return ~nothing, nothing
    return places.gather(right, missing=True), places.gather(vague, missing=False) if doubted else None


def _fits(
    rule: OptimizerRule, rows: list[Any], has_gradient: bool, columns: Any, dtype: torch.dtype, relative: Tensor | None
) -> tuple[Any, Any, Any]:
    """For tensors or arrays of NumPy, (P,) each: whether updates are right, the limit of the error, their size."""
    old, new, *state = rows
    gradient = state.pop() if has_gradient else None
    first = state[0] if state else gradient
    second = state[1] if len(state) > 1 else None
    terms = update_terms(rule, new, gradient, first, second, [columns[:, i] for i in range(columns.shape[1])])
    rest, size = new - old, 0.0
    for term in terms:
        rest = rest - term
        size = size + (term * term).sum(-1) ** 0.5
    info = torch.finfo(dtype)
    weight = ((old * old).sum(-1) + (new * new).sum(-1)) ** 0.5
    limit = weight * (2.0**0.5 * _OF_PARAMETER * info.eps) + size * (_OF_TERMS * info.eps) + info.smallest_normal
    if relative is not None:
        limit = limit + size * on_host(relative)
    # Not `>`, so that NaN does not fit.
    return (rest * rest).sum(-1) <= limit * limit, limit, size


def same_gradients(before: Samples, after: Samples, added: Samples | None, factor: Tensor | float) -> Tensor:
    """Returns whether gradients are what they were, up to rounding, once an addition or a factor is taken out.

    Args:
        before: Their samples before.
        after: Their samples after.
        added: Samples of what was added to them, `factor` times; None if they were multiplied by the factor.
        factor: The factor.

    Returns:
        Bool (P,).
    """
    parts = []
    for number, block in enumerate(before.places.blocks):
        old, new = before.rows(number)[0], after.rows(number)[0]
        by = factor.to(block.device, torch.float64, non_blocking=True) if isinstance(factor, Tensor) else factor
        terms: Sequence[Tensor] = [new / by] if added is None else [new, added.rows(number)[0] * -by]
        size = sum((term.abs() for term in terms), torch.zeros_like(old))
        info = torch.finfo(block.dtype)
        distance = (old - sum(terms, torch.zeros_like(old))).abs_()
        close = distance <= size * (2.0 * info.eps) + info.smallest_normal
        parts.append((close | (old.isnan() & new.isnan()) | (old == new)).all(dim=1))
    if not parts:
        return torch.ones(before.places.count, dtype=torch.bool, device=before.places.home)
    return before.places.gather(parts, missing=True)
