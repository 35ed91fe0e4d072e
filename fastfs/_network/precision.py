"""Machine epsilon of an operation, by dtype and by torch's precision settings for float32 products."""

from __future__ import annotations

import torch

__all__ = ["SINGLE", "coarseness", "product_coarseness"]

SINGLE = torch.finfo(torch.float32).eps

_TF32 = 2.0**-10
_COARSEST = 0.5  # for formats that torch does not describe, such as 4-bit floats


def coarseness(dtype: torch.dtype) -> float:
    """Return the machine epsilon of a dtype: 2^-23 for float32, 2^-7 for bfloat16, 0 for integers."""
    if not dtype.is_floating_point and not dtype.is_complex:
        return 0.0
    try:
        return float(torch.finfo(dtype).eps)
    except (TypeError, RuntimeError):
        return _COARSEST


def product_coarseness(kind: str, device: str) -> float:
    """Return the effective epsilon of float32 products, convolutions or recurrent layers under torch's settings.

    Args:
        kind: ``"matmul"``, ``"conv"`` or ``"rnn"``.
        device: type of the device.

    Returns:
        2^-23, or the epsilon of TF32 or bfloat16 if torch may use these.
    """
    if device == "cuda":
        settings = torch.backends.cuda.matmul if kind == "matmul" else getattr(torch.backends.cudnn, kind)
    elif device == "cpu":
        settings = getattr(torch.backends.mkldnn, kind, None)
    else:
        return SINGLE
    chosen = getattr(settings, "fp32_precision", "none")  # "none" if neither it nor the setting it inherits from is set
    if chosen == "tf32":
        return _TF32
    return coarseness(torch.bfloat16) if chosen == "bf16" else SINGLE
