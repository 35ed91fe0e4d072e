"""The sums of `fastfs.feature_stats` as one writes them without fastfs: in eager torch, and under torch.compile.

All return a (L, 8) tensor: the seven sums of FeatureStats in its order, and the count of non-finite entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Layers = Sequence[Tensor]


def _exponent_part(x: Tensor) -> Tensor:
    """2^floor(log2|x|) of a float32 tensor: its exponent bits alone."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def _rounding_factor(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps ** 2 / 12


def _layer_sums(before: Tensor, after: Tensor, backward: Tensor, rounding: bool) -> Tensor:
    """One layer in float32, written for a compiler that fuses it: every sum from one expression."""
    f, g, b = before.float(), after.float(), backward.float()
    df = g - f
    product = df * b
    bad = (f * 0 != 0).float() + (g * 0 != 0).float() + (b * 0 != 0).float()  # faster than isfinite under Inductor
    sums = [product.sum(), (df * df).sum(), (b * b).sum(), (f * f).sum(), (f * df).sum(), product.abs().sum()]
    if rounding:
        spacing_sq = _exponent_part(f).square() + _exponent_part(g).square()
        sums.append(spacing_sq.sum() * _rounding_factor(before.dtype))
    return torch.stack([*sums, bad.sum()])


def compiled(rounding: bool = True) -> Callable[[Layers, Layers, Layers], Tensor]:
    """torch.compile of one layer's sums, called layer after layer: one graph per shape and dtype.

    Without `rounding` it leaves out the rounding variance, which Inductor does not vectorise for 16-bit inputs: (L, 7).
    """
    layer = torch.compile(functools.partial(_layer_sums, rounding=rounding), fullgraph=True, dynamic=False)

    def run(before: Layers, after: Layers, backward: Layers) -> Tensor:
        return torch.stack([layer(*x) for x in zip(before, after, backward, strict=True)])

    return run


def by_hand(before: Layers, after: Layers, backward: Layers) -> Tensor:
    """Eager torch as an expert writes it: float32 once, dot products (no temporaries) wherever one serves.

    On the CPU in slices of 256K elements, which keeps the temporaries in the cache: the fastest of 16K to 1M here.
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
        p, q = _exponent_part(f), _exponent_part(g)
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
                    (torch.dot(p, p) + torch.dot(q, q)) * _rounding_factor(old.dtype),
                    bad.float(),
                ]
            )
        )
    return torch.stack(rows)


def by_hand_foreach(before: Layers, after: Layers, backward: Layers) -> Tensor:
    """Eager torch for many small layers on a GPU: the multi-tensor functions that optimizers use."""
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
            (torch.dot(p, p) + torch.dot(q, q)) * _rounding_factor(old.dtype)
            for p, q, old in zip(map(_exponent_part, f), map(_exponent_part, g), before, strict=True)
        ],
        [sum((~x.isfinite()).sum() for x in layer).float() for layer in zip(before, after, backward, strict=True)],
    ]
    return torch.stack([torch.stack(list(column)) for column in sums], dim=1)
