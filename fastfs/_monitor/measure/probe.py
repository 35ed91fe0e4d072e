"""A batch and a loss that the user gives to measure on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastfs._network.input_copies import copy_arguments

__all__ = ["Probe"]


class Probe:
    """A fixed batch and loss to measure on, instead of the training batch.

    The same rows at every measured step make curves comparable, and float32 keeps 16-bit rounding out of the angle.

    Args:
        inputs: What the model is called with: a tensor, a tuple of positional or a dictionary of keyword arguments.
        loss: Function of the model's output that returns a scalar; it holds the targets.
        dtype: What parameters and floating-point inputs are cast to for the probe. None leaves them as they are, and
            autocast as it is around ``optimizer.step()``; otherwise autocast is off.

    Raises:
        TypeError: If ``inputs`` cannot be copied, ``loss`` is no function, or ``dtype`` is no floating-point dtype.
    """

    def __init__(
        self, inputs: Any, loss: Callable[[Any], Tensor], *, dtype: torch.dtype | None = torch.float32
    ) -> None:
        if not callable(loss):
            raise TypeError(f"probe: expected a function of the model's output as the loss, got {loss!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"probe: expected a floating-point dtype or None, got {dtype!r}")
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        inputs = copy_arguments(inputs, lambda x: self._cast(x.detach().clone(), dtype))
        if isinstance(inputs, Mapping):
            self.kwargs = dict(inputs)
        else:
            self.args = inputs if isinstance(inputs, tuple) else (inputs,)
        self.loss = loss
        self.dtype = dtype

    def cast(self, x: Tensor) -> Tensor:
        """Casts a tensor to the dtype of the probe.

        Args:
            x: Any tensor.

        Returns:
            The tensor in ``dtype`` if it is floating-point and the probe has one, else ``x``.
        """
        return self._cast(x, self.dtype)

    @staticmethod
    def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
        return x.to(dtype) if dtype is not None and x.is_floating_point() else x
