"""The sums of `fastfs.feature_stats` implemented without fastfs: in eager torch, and under torch.compile.

All functions return a (L, 8) tensor: the seven sums of FeatureStats in its order, and the number of non-finite entries.
With `per_row`, they return (rows of all layers, 8).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "COLUMNS",
    "Layers",
    "Sums",
    "by_hand",
    "by_hand_foreach",
    "by_hand_per_row",
    "compiled",
    "exponent_part",
    "layer_sums",
    "norms",
    "rounding_factor",
]

Layers = Sequence[Tensor]
Sums = Callable[[Layers, Layers, Layers], Tensor]

COLUMNS = 8
"""Number of sums that an implementation returns."""


def exponent_part(x: Tensor) -> Tensor:
    """Return 2^floor(log2|x|) of a float32 tensor, from its exponent bits."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def rounding_factor(dtype: torch.dtype) -> float:
    """Return the variance of rounding in units of the squared exponent part."""
    return torch.finfo(dtype).eps ** 2 / 12


def layer_sums(
    before: Tensor, after: Tensor, backward: Tensor, *, rounding: bool = True, per_row: bool = False
) -> Tensor:
    """Return the sums of one layer in float32, written for a compiler that fuses one expression per sum.

    Without `rounding`, the rounding variance is omitted, which Inductor does not vectorize for 16-bit inputs.

    Args:
        before: features before the update.
        after: features after the update.
        backward: backward vectors.
        rounding: whether to include the rounding variance.
        per_row: whether to sum over the last dimension only.

    Returns:
        (8,) sums, or (7,) without `rounding`; with `per_row`, (rows, 8).
    """
    f, g, b = before.float(), after.float(), backward.float()
    df = g - f
    product = df * b
    bad = (f * 0 != 0).float() + (g * 0 != 0).float() + (b * 0 != 0).float()  # faster than isfinite under Inductor
    terms = [product, df * df, b * b, f * f, f * df, product.abs()]
    if rounding:
        terms.append((exponent_part(f).square() + exponent_part(g).square()) * rounding_factor(before.dtype))
    terms.append(bad)
    if per_row:
        return torch.stack([x.sum(dim=-1).view(-1) for x in terms], dim=-1)
    return torch.stack([x.sum() for x in terms])


def compiled(*, rounding: bool = True, per_row: bool = False, options: dict[str, Any] | None = None) -> Sums:
    """Return torch.compile of one layer's sums, called layer by layer: one graph per shape and dtype.

    Args:
        rounding: see :func:`layer_sums`.
        per_row: see :func:`layer_sums`.
        options: options of Inductor.

    Returns:
        The implementation.
    """
    function = functools.partial(layer_sums, rounding=rounding, per_row=per_row)
    layer = torch.compile(function, fullgraph=True, dynamic=False, options=options)

    def run(before: Layers, after: Layers, backward: Layers) -> Tensor:
        sums = [layer(*x) for x in zip(before, after, backward, strict=True)]
        return torch.cat(sums) if per_row else torch.stack(sums)

    return run


def by_hand(before: Layers, after: Layers, backward: Layers) -> Tensor:
    """Compute the sums in eager torch as an expert writes it: one cast to float32, dot products without temporaries.

    On the CPU, slices of 256K elements keep the temporaries in the cache (the fastest size from 16K to 1M).

    Args:
        before: features before the update.
        after: features after the update.
        backward: backward vectors.

    Returns:
        (L, 8) sums.
    """
    rows = []
    for layer in zip(before, after, backward, strict=True):
        slices = [x.reshape(-1).split(2**18) if x.device.type == "cpu" else [x] for x in layer]
        rows.append(_sums_by_hand(*slices).double().sum(dim=0))
    return torch.stack(rows)


def _sums_by_hand(before: Layers, after: Layers, backward: Layers) -> Tensor:
    rows = []
    for old, new, bw in zip(before, after, backward, strict=True):
        f, g, b = old.reshape(-1).float(), new.reshape(-1).float(), bw.reshape(-1).float()
        df = g - f
        p, q = exponent_part(f), exponent_part(g)
        bad = sum((~x.isfinite()).sum() for x in (old, new, bw))
        rows.append(
            torch.stack(
                [
                    torch.dot(df, b),
                    torch.dot(df, df),
                    torch.dot(b, b),
                    torch.dot(f, f),
                    torch.dot(f, df),
                    (df * b).abs().sum(),
                    (torch.dot(p, p) + torch.dot(q, q)) * rounding_factor(old.dtype),
                    torch.as_tensor(bad).float(),
                ]
            )
        )
    return torch.stack(rows)


def by_hand_per_row(before: Layers, after: Layers, backward: Layers) -> Tensor:
    """Compute sums per row in eager torch. On the CPU, slices of rows stay in the cache."""
    rows = []
    for layer in zip(before, after, backward, strict=True):
        parts = [x.reshape(-1, x.shape[-1]) for x in layer]
        height = max(1, 2**18 // parts[0].shape[1]) if parts[0].device.type == "cpu" else max(1, parts[0].shape[0])
        rows += [_rows_by_hand(*slices) for slices in zip(*(x.split(height) for x in parts), strict=True)]
    return torch.cat(rows)


def _rows_by_hand(before: Tensor, after: Tensor, backward: Tensor) -> Tensor:
    f, g, b = before.float(), after.float(), backward.float()
    df = g - f
    dot = torch.linalg.vecdot
    p, q = exponent_part(f), exponent_part(g)
    bad = sum((~x.isfinite()).sum(dim=-1) for x in (before, after, backward))
    return torch.stack(
        [
            dot(df, b),
            dot(df, df),
            dot(b, b),
            dot(f, f),
            dot(f, df),
            (df * b).abs().sum(dim=-1),
            (dot(p, p) + dot(q, q)) * rounding_factor(before.dtype),
            torch.as_tensor(bad).float(),
        ],
        dim=-1,
    )


def by_hand_foreach(before: Layers, after: Layers, backward: Layers) -> Tensor:
    """Compute the sums of many small layers on a GPU with the multi-tensor functions that optimizers use."""
    f, g, b = ([x.reshape(-1).float() for x in layers] for layers in (before, after, backward))
    df = torch._foreach_sub(g, f)
    product = torch._foreach_mul(df, b)
    sums = [
        [x.sum() for x in product],
        [x.square() for x in torch._foreach_norm(df)],
        [x.square() for x in torch._foreach_norm(b)],
        [x.square() for x in torch._foreach_norm(f)],
        [x.sum() for x in torch._foreach_mul(f, df)],
        torch._foreach_norm(product, 1),
        [
            (torch.dot(p, p) + torch.dot(q, q)) * rounding_factor(old.dtype)
            for p, q, old in zip(map(exponent_part, f), map(exponent_part, g), before, strict=True)
        ],
        [
            torch.as_tensor(sum((~x.isfinite()).sum() for x in layer)).float()
            for layer in zip(before, after, backward, strict=True)
        ],
    ]
    return torch.stack([torch.stack(list(column)) for column in sums], dim=1)


def norms(before: Layers, after: Layers, backward: Layers) -> Tensor:
    """Compute norms of the inputs with torch's functions for lists, in their dtype: a lower bound, with fewer sums."""
    return torch.stack(torch._foreach_norm([*before, *after, *backward]))
