"""Memory-bandwidth ceilings: a streaming read of the same tensors, and a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastfs._bench.inputs import Inputs
from fastfs._core import ops

__all__ = ["COPY", "READ", "SUM", "copy", "streaming_read", "sum_of_all", "thirds"]

READ = "streaming read"
COPY = "copy"
SUM = "torch.sum"


def streaming_read(inputs: Inputs) -> Callable[[], object]:
    """Return a call that reads every byte of the inputs and discards it. Requires the native core.

    Args:
        inputs: contiguous tensors; the first two of a layer have the same dtype.

    Returns:
        The call.
    """
    device = inputs[0][0].device
    if device.type == "cuda":
        sink = torch.empty((1, 1), dtype=torch.float64, device=device)
        return lambda: ops._C.stream_read_cuda(inputs, sink)
    return lambda: ops._C.stream_read_cpu(inputs, torch.get_num_threads())


def thirds(tensors: Sequence[Tensor]) -> Inputs:
    """Split tensors into three lists of equal size, so that the streaming read accepts any number of tensors.

    Elements that do not fill three blocks of 64 are dropped, so the time of the read is underestimated by less than
    their share of the bytes.

    Args:
        tensors: contiguous tensors.

    Returns:
        Views of the first, second and last third of each tensor.
    """
    lists: Inputs = ([], [], [])
    for x in tensors:
        length = x.numel() // (3 * 64) * 64
        for part, third in zip(lists, x.view(-1)[: 3 * length].view(3, length).unbind(0), strict=True):
            part.append(third)
    return lists


def copy(inputs: Inputs) -> tuple[Callable[[], object], int]:
    """Return a call that copies the features before the update, and the bytes it moves, reads and writes together."""
    targets = [torch.empty_like(x) for x in inputs[0]]
    size = 2 * sum(x.numel() * x.element_size() for x in inputs[0])
    if len(targets) == 1:
        return lambda: targets[0].copy_(inputs[0][0]), size
    return lambda: torch._foreach_copy_(targets, inputs[0]), size


def sum_of_all(inputs: Inputs) -> Callable[[], object]:
    """Return a call that sums all bytes as float32: the ceiling without the native core."""
    words = [x.view(-1).view(torch.uint8) for tensors in inputs for x in tensors]
    floats = [x[: x.numel() // 4 * 4].view(torch.float32) for x in words]
    return lambda: [x.sum() for x in floats]
