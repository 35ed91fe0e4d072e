"""Whether an update that a closed form tells is the one that happened, by a few elements of every parameter.

w - w' of these elements, copied before and after the step, has to be what the rule makes of the state, up to rounding:

    |(w - w') - dw| <= 4 eps (|w| + |w'|) + (16 eps + u) (|part| + ...) + the smallest normal number

with norms over the elements of one parameter. A step rounds w at most twice, by half a unit each, once more where a
factor 1 - lr wd is rounded (which the closed form divides by), and every part of dw in at most some ten operations, by
half a unit each. u is the uncertainty of bias corrections (``closed_forms``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastfs.monitor.measure.closed_forms import parts_of
from fastfs.monitor.measure.fingerprints import Places, Samples
from fastfs.rules import Rule

__all__ = ["same_gradients", "verify"]

_OF_PARAMETER, _OF_PARTS = 4.0, 16.0  # in units of eps
_TELLS = 1e-2  # relative error up to which elements tell one update from another


def verify(
    rule: Rule,
    places: Places,
    before: Samples,
    after: Samples,
    gradients: Samples | None,
    table: Tensor,
    *,
    uncertain: Tensor | None,
    made: Tensor | None,
    doubted: bool,
) -> tuple[Tensor, Tensor | None]:
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
        Whether the update is as it should be, bool (n,); and if it is doubted, whether rounding hides so much of it that
        another learning rate might pass, too.
    """
    good, vague = [], []
    whole = len(places.blocks) == 1 and len(places.blocks[0].order) == places.count
    for number, block in enumerate(places.blocks):
        flats = [before.flats[number], after.flats[number]]
        if gradients is not None:
            flats.append(gradients.flats[number])
        old, new, *state = places.rows(number, torch.cat(flats)).unbind()
        gradient = state.pop() if gradients is not None else None
        columns, relative = table.to(block.device, non_blocking=True), uncertain
        if relative is not None:
            relative = relative.to(block.device, non_blocking=True)
        if not whole:
            order = torch.tensor(block.order, dtype=torch.int64, device="cpu").to(block.device, non_blocking=True)
            columns = columns.index_select(0, order)
            relative = None if relative is None else relative.index_select(0, order)
        first = state[0] if state else gradient
        assert first is not None
        second = state[1] if len(state) > 1 else None
        parts, widened = parts_of(rule, new, gradient, first, second, columns.unsqueeze(2).unbind(dim=1))
        rest = new - old
        for part in parts:
            rest = rest - part
        norms = torch.linalg.vector_norm(torch.stack([rest, old, new, *parts]), dim=2)
        info = torch.finfo(block.dtype)
        weights = [0.0, *[_OF_PARAMETER * info.eps] * 2, *[_OF_PARTS * info.eps] * len(parts)]
        limit = norms.T @ _constant(tuple(weights), block.device) + info.smallest_normal
        if widened is not None:
            limit = limit + torch.linalg.vector_norm(widened, dim=1) * (_OF_PARTS * info.eps)
        if relative is not None:
            limit = limit + norms[3:].sum(dim=0) * relative
        if made is None:
            good.append(norms[0] <= limit)
        else:
            still = torch.linalg.vector_norm(new - old, dim=1) == 0
            good.append(torch.where(made.to(block.device, non_blocking=True), norms[0] <= limit, still))
        if doubted:
            size = norms[3:].sum(dim=0)
            vague.append((limit > _TELLS * size) & (size > 0))
    if not good:  # nothing but empty tensors
        nothing = torch.zeros(places.count, dtype=torch.bool, device=places.home)
        return ~nothing, nothing
    return places.gather(good, missing=True), places.gather(vague, missing=False) if doubted else None


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu").to(device, non_blocking=True)


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
