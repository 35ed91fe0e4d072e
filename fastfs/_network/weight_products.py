"""Recognises products with trained matrices among the calls of torch functions, by the memory of their operands."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ATTENTION",
    "PRODUCTS",
    "UNREADABLE",
    "MatrixView",
    "Product",
    "TrainedMatrices",
    "UnreadCallError",
    "is_plain",
    "opened",
    "product_of",
]

ATTENTION = F.multi_head_attention_forward
"""A function in Python of which function modes see only the call as a whole; see :func:`opened`."""

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_RIGHT = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_ADDED = (torch.addmm, Tensor.addmm)
PRODUCTS = frozenset((F.linear, *_RIGHT, Tensor.__rmatmul__, *_ADDED, *_CONVOLUTIONS))
"""The functions that :func:`product_of` knows."""

_UNREAD: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    *(("torch", x, (torch, Tensor)) for x in "addmv baddbmm bmm einsum inner mv tensordot _grouped_mm".split()),
    *(("F", x, (F,)) for x in "bilinear conv_transpose1d conv_transpose2d conv_transpose3d grouped_mm".split()),
    ("torch.linalg", "multi_dot", (torch.linalg,)),
)
UNREADABLE: dict[Any, str] = {
    F.embedding: "it is looked up, which is no product",
    **{
        getattr(owner, name): f"it is used in {room}.{name}, which is not read"
        for room, name, owners in _UNREAD
        for owner in owners
        if hasattr(owner, name)
    },
}
"""Other functions that take a matrix, and what is said of it then."""


class MatrixView(NamedTuple):
    """Which part of which trained parameter a tensor is: a view of it, or all of it.

    Attributes:
        parameter: Number of the parameter.
        shape, stride, offset: Of the view, within the parameter's memory.
    """

    parameter: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, values: Tensor) -> Tensor:
        """Return the same part of other values of the parameter, which have the same strides."""
        return values.as_strided(self.shape, self.stride, values.storage_offset() + self.offset)


class TrainedMatrices:
    """The trained parameters of two and more dimensions, by their memory.

    Args:
        parameters: The trained parameters.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._by_storage: dict[int, list[tuple[int, Tensor]]] = {}
        for number, p in enumerate(parameters):
            if p.dim() > 1 and is_plain(p) and _reach(p) == p.numel():
                self._by_storage.setdefault(p.untyped_storage()._cdata, []).append((number, p))

    def __len__(self) -> int:
        return sum(map(len, self._by_storage.values()))

    def find(self, operand: Any) -> MatrixView | None:
        """Return which parameter an operand is or is a part of; None if it is no part of one."""
        if not isinstance(operand, Tensor) or not is_plain(operand):
            return None
        for number, p in self._by_storage.get(operand.untyped_storage()._cdata, ()):
            offset = operand.storage_offset() - p.storage_offset()
            if operand.dtype is p.dtype and operand.numel() and 0 <= offset <= p.numel() - _reach(operand):
                return MatrixView(number, tuple(operand.shape), operand.stride(), int(offset))
        return None


class Product(NamedTuple):
    """A product y = W x of a trained matrix with the rows of a tensor.

    Attributes:
        weight: The operand that is the matrix.
        rows: The rows x, shape (N, ...).
        fan_in: Number of entries of x that an entry of y is a sum over.
        kind: ``matmul`` or ``conv``: the setting that its precision follows.
        apply: Function of a matrix and of rows, both float, that returns the rows y.
        squares: Function of rows that returns |x|^2 of each, summed over all x that the matrix is applied to.
    """

    weight: Tensor
    rows: Tensor
    fan_in: int
    kind: str
    apply: Callable[[Tensor, Tensor], Tensor]
    squares: Callable[[Tensor], Tensor]


class UnreadCallError(Exception):
    """A call is none of those that are read; the message is the reason in the record."""


def product_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: TrainedMatrices) -> Product | None:
    """Return the product that a call of one of :data:`PRODUCTS` is.

    Args:
        function: The function.
        args: Its arguments.
        kwargs: Its arguments by name.
        found: The trained matrices.

    Returns:
        The product; None if no factor is a trained matrix.

    Raises:
        UnreadCallError: It is one that is not read; the message says why.
    """
    if function in _CONVOLUTIONS:
        return _convolution(function, args, kwargs, found)
    if function is F.linear:
        weight = _argument(args, kwargs, 1, "weight")
        return None if found.find(weight) is None else _linear(_argument(args, kwargs, 0, "input"), weight, found)
    place = 1 if function in _ADDED else 0
    left = _argument(args, kwargs, place, "input", "mat1")
    right = _argument(args, kwargs, place + 1, "other", "mat2")
    if function is Tensor.__rmatmul__:
        left, right = right, left
    if found.find(right) is not None:
        _two_dimensional(right)
        return _linear(left, right.t(), found)
    if found.find(left) is not None:
        _two_dimensional(left)
        return _linear(right if right.dim() == 1 else right.transpose(-1, -2), left, found)
    return None


def opened(function: Any) -> Any:
    """Return a function of torch in Python whose body runs under the function mode that is active.

    As a rule such a function asks first whether a mode is active, and hands itself to it as a whole.
    """
    own = {**function.__globals__, "has_torch_function": lambda _tensors: False}
    return types.FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)


def _linear(x: Tensor, weight: Tensor, found: TrainedMatrices) -> Product:
    _two_dimensional(weight)
    if x.dim() == 2 and found.find(x) is not None:
        raise UnreadCallError("it is multiplied with another parameter, as for a weight that is computed of both")
    rows = x.reshape(-1, x.shape[-1])
    return Product(weight, rows, rows.shape[1], "matmul", lambda w, each: each @ w.t(), _row_squares)


def _convolution(function: Any, args: Sequence[Any], kwargs: dict[str, Any], found: TrainedMatrices) -> Product | None:
    x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    if found.find(weight) is None:
        return None
    named = dict(zip(("bias", "stride", "padding", "dilation", "groups"), args[2:], strict=False))
    settings = {name: value for name, value in {**named, **kwargs}.items() if name not in ("input", "weight", "bias")}
    if settings.pop("groups", 1) != 1:
        raise UnreadCallError("it is used in a convolution of several groups, which is not read")

    kernel = weight.shape[2:]

    def apply(w: Tensor, rows: Tensor) -> Tensor:
        output: Tensor = function(rows, w, None, **settings)
        return output

    def squares(rows: Tensor) -> Tensor:
        energy = rows.double().square().sum(dim=1, keepdim=True)
        return apply(energy.new_ones((1, 1, *kernel)), energy).flatten(1).sum(dim=1)

    rows = x if x.dim() == weight.dim() else x.unsqueeze(0)
    return Product(weight, rows, math.prod(weight.shape[1:]), "conv", apply, squares)


def _row_squares(rows: Tensor) -> Tensor:
    return rows.double().square().sum(dim=1)


def _argument(args: Sequence[Any], kwargs: dict[str, Any], place: int, *names: str) -> Any:
    """Return the argument at a place, or by the name that it has in this function."""
    return args[place] if place < len(args) else next(kwargs[name] for name in names if name in kwargs)


def _two_dimensional(weight: Tensor) -> None:
    if weight.dim() != 2:
        raise UnreadCallError(f"it is used as a factor of {weight.dim()} dimensions, which is not read")


def _reach(x: Tensor) -> int:
    """Return how many numbers lie from the first to the last one of a tensor."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def is_plain(x: Any) -> bool:
    """Return whether a tensor is plain memory with real numbers: no subclass, no wrapper of functorch."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.layout is not torch.strided or not x.is_floating_point():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)
