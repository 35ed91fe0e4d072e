"""A GPU that is busy while a test queues work on it."""

from __future__ import annotations

import torch

from fastfs._bench.timing import occupy

__all__ = ["occupied"]


def occupied(seconds: float) -> torch.cuda.Event:
    """Keep the current CUDA stream busy for at least so many seconds, whatever the clock of the GPU.

    Args:
        seconds: several times as long as the host takes for what the test queues meanwhile.

    Returns:
        An event whose ``query()`` is False as long as the stream is busy.
    """
    occupy(seconds)
    free = torch.cuda.Event()
    free.record()
    return free
