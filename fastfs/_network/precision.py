"""How coarse the numbers are that an operation computes with: by dtype, and torch's settings for float32 products."""

from __future__ import annotations

import torch

__all__ = ["SINGLE", "coarseness", "product_coarseness"]

SINGLE = torch.finfo(torch.float32).eps

_TF32 = 2.0**-10
_COARSEST = 0.5  # of formats that torch does not describe: 4 bits


def coarseness(dtype: torch.dtype) -> float:
    """Spacing of the numbers at 1: 2^-23 for float32, 2^-7 for bfloat16; 0 for integers."""
    if not dtype.is_floating_point and not dtype.is_complex:
        return 0.0
    try:
        return float(torch.finfo(dtype).eps)
    except (TypeError, RuntimeError):
        return _COARSEST


def product_coarseness(kind: str, device: str) -> float:
    """The same for float32 products, convolutions or recurrent layers on a device, as torch resolves its settings.

    Args:
        kind: ``"matmul"``, ``"conv"`` or ``"rnn"``.
        device: type of the device.
    """
    if device == "cuda":
        settings = torch.backends.cuda.matmul if kind == "matmul" else getattr(torch.backends.cudnn, kind)
    elif device == "cpu":
        settings = getattr(torch.backends.mkldnn, kind, None)
    else:
        return SINGLE
    chosen = getattr(settings, "fp32_precision", "none")  # "none" where neither it nor what it inherits from is set
    if chosen == "tf32":
        return _TF32
    return coarseness(torch.bfloat16) if chosen == "bf16" else SINGLE
