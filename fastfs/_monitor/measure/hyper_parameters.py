"""The hyper-parameters of an optimizer's group, which may be numbers or tensors, read without waiting for a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Group", "HyperParameters", "Number", "double", "is_zero", "narrowest_dtype"]

Group = dict[str, Any]
Number = float | Tensor


class HyperParameters:
    """A copy of a group's hyper-parameters.

    Attributes:
        values: The hyper-parameters; tensors are copied, so that later writes do not change them.
    """

    def __init__(self, group: Group) -> None:
        self._seen = group.copy()
        del self._seen["params"]
        tensors = [v for v in self._seen.values() if isinstance(v, Tensor)]
        tensors += [v for pair in (self._seen.get("betas", ()),) for v in pair if isinstance(v, Tensor)]
        self._versions = [(v, v._version) for v in tensors]
        self.values = {k: _copied(v) for k, v in self._seen.items()} if tensors else self._seen

    def unchanged(self, group: Group, ignore: Sequence[str] = ()) -> bool:
        """Returns whether the group still has these hyper-parameters, as far as the host can tell.

        Args:
            group: The group now.
            ignore: Names that are not compared. If there are any, writes to tensors are not looked for either.
        """
        for name, value in self._seen.items():
            now = group.get(name)
            if (
                now is not value
                and name not in ignore
                and (isinstance(now, Tensor) or isinstance(value, Tensor) or now != value)
            ):
                return False
        return bool(ignore) or all(tensor._version == version for tensor, version in self._versions)


def narrowest_dtype(group: Group) -> torch.dtype | None:
    """Returns the least precise dtype of the tensors among the hyper-parameters, None without any."""
    values = [group.get(name) for name in ("lr", "momentum", "weight_decay", "eps", "dampening", "alpha")]
    values += group.get("betas", ())
    dtypes = [value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def is_zero(value: Number) -> bool:
    """Returns whether a hyper-parameter is known to be zero; the value of a tensor is not known."""
    return not isinstance(value, Tensor) and value == 0


def double(value: Number) -> Number:
    """Returns a number as is, a tensor as 0-d float64."""
    return value.detach().reshape(()).to(torch.float64) if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return tuple(map(_copied, value)) if isinstance(value, (tuple, list)) else value
