"""Selection of devices for commands, and settings that they need on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["fastest_device", "named_device", "repeatable_attention"]


def fastest_device() -> torch.device:
    """Return a GPU if torch can use one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def named_device(name: str) -> torch.device:
    """Return the device given by the option ``--device``, such as "cuda:1".

    Args:
        name: the value of the option.

    Returns:
        The device.

    Raises:
        ValueError: the device is neither CPU nor CUDA, or torch does not see it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices")
    return device


@contextmanager
def repeatable_attention(device: torch.device) -> Iterator[None]:
    """Disable fused attention on a GPU, so that gradients are summed in the same order in every run."""
    if device.type == "cuda":
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield
