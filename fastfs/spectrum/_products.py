"""Products of a symmetric operator with rows of a matrix, and random vectors, as the estimators need them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fastfs.spectrum._operator import TorchOperator

__all__ = ["Operator", "Products", "count", "generator_of", "products_of", "random_rows"]

Operator: TypeAlias = Any
"""A symmetric operator: a :class:`BFK`, a scipy ``LinearOperator``, a matrix of torch or NumPy."""

_SYMMETRIC = 1e-5


@dataclass(frozen=True)
class Products:
    """Multiplies a symmetric N x N operator with the rows of (n, N) matrices in float64."""

    dim: int
    device: torch.device
    dtype: torch.dtype
    chunk: int
    multiply: Callable[[Tensor], Tensor]

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply (n, N) float64, in the precision of the operator: (n, N) float64.

        Args:
            rows: the vectors.

        Returns:
            The products.

        Raises:
            ValueError: a product is not finite.
        """
        products = self.multiply(rows.to(self.dtype)).double()
        if not bool(products.isfinite().all()):
            bad = int((~products.isfinite()).sum())
            raise ValueError(f"operator: expected finite products, got {bad} of {products.numel()} entries NaN or Inf")
        return products


def products_of(operator: Operator) -> Products:
    """Return the products of any supported kind of symmetric operator.

    Args:
        operator: a :class:`BFK`, a scipy ``LinearOperator``, or a torch or NumPy matrix.

    Returns:
        A function of rows.

    Raises:
        TypeError: the operator is of another kind or not real.
        ValueError: the operator is not square, is empty, or is a matrix that is not symmetric.
    """
    if isinstance(operator, np.ndarray):
        operator = torch.from_numpy(np.ascontiguousarray(operator))
    if isinstance(operator, Tensor):
        matrix = operator.detach()
        if matrix.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"operator: expected float32 or float64, got {matrix.dtype}")
        _square(tuple(matrix.shape))
        if bool(((matrix - matrix.T).abs() > _SYMMETRIC * matrix.abs().max()).any()):
            raise ValueError("operator: expected a symmetric matrix")
        return Products(matrix.shape[0], matrix.device, matrix.dtype, 64, lambda rows: rows @ matrix)
    if isinstance(operator, TorchOperator):
        _square(operator.shape)
        return Products(operator.shape[0], operator.device, operator.torch_dtype, operator.chunk, operator.rows)
    if isinstance(operator, LinearOperator):
        _square(operator.shape)
        if np.dtype(operator.dtype).kind not in "biuf":
            raise TypeError(f"operator: expected a real operator, got {operator.dtype}")

        def multiply(rows: Tensor) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(operator.matmat(rows.numpy().T).T))

        return Products(operator.shape[0], torch.device("cpu"), torch.float64, 16, multiply)
    raise TypeError(f"operator: expected a BFK, a scipy LinearOperator or a matrix, got {type(operator).__name__}")


def _square(shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"operator: expected a square operator, got shape {shape}")


def count(value: object, what: str, least: int) -> int:
    """Return the value if it is a whole number and large enough.

    Args:
        value: the argument.
        what: its name, for the message.
        least: smallest permitted value.

    Returns:
        The value.

    Raises:
        ValueError: it is not a whole number, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what}: expected a whole number >= {least}, got {value!r}")
    return value


def generator_of(seed: int | torch.Generator) -> torch.Generator:
    """Return the generator, or a new one on the CPU with the given seed."""
    if isinstance(seed, torch.Generator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected a whole number or a torch.Generator, got {seed!r}")
    return torch.Generator().manual_seed(seed)


def random_rows(kind: str, rows: int, products: Products, generator: torch.Generator) -> Tensor:
    """Return random vectors with E v v^T = identity: (rows, N), float64.

    A generator on the CPU gives the same vectors on all devices.

    Args:
        kind: "rademacher" (entries +1 and -1, with the smaller variance for traces) or "gaussian".
        rows: number of vectors.
        products: the operator's products, for size and device.
        generator: source of random numbers.

    Returns:
        The vectors on the device of the operator.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    shape, device = (rows, products.dim), generator.device
    if kind == "rademacher":
        bits = torch.randint(0, 2, shape, generator=generator, device=device)
        return (2.0 * bits - 1.0).to(products.device, torch.float64)
    if kind == "gaussian":
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64).to(products.device)
    raise ValueError(f'distribution: expected "rademacher" or "gaussian", got {kind!r}')
