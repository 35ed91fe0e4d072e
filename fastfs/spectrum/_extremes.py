"""Extreme eigenvalues and the condition number of a positive semi-definite operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigvalsh
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from fastfs.spectrum._operator import BFK
from fastfs.spectrum._products import Operator, Products, count, products_of

__all__ = ["Extremes", "condition_of", "extremes"]

_DENSE = 512
_KRYLOV = 64


@dataclass(frozen=True)
class Extremes:
    """The extreme eigenvalues of a positive semi-definite operator.

    Attributes:
        largest: largest eigenvalue.
        smallest: smallest eigenvalue; 0 if it is known to be 0 or below rounding, nan if it was not found.
        condition: largest/smallest; inf if the smallest is 0.
        reason: why the smallest is 0 or nan; None if it was found.
        method: "dense" (all eigenvalues) or "lanczos" (scipy's eigsh).
        products: number of products with the operator.
    """

    largest: float
    smallest: float
    condition: float
    reason: str | None
    method: str
    products: int

    def __str__(self) -> str:
        why = "" if self.reason is None else f" ({self.reason})"
        return f"eigenvalues {self.smallest:.6g} to {self.largest:.6g}, condition number {self.condition:.6g}{why}"


def extremes(operator: Operator, *, dense_below: int = _DENSE, tol: float = 0.0, max_iterations: int = 50) -> Extremes:
    """Return the largest and the smallest eigenvalue of an operator.

    The rank of a kernel is at most the number of parameters in its sum (``BFK.rank_bound``). If this is less than
    N, the smallest eigenvalue is 0 and is not computed. An eigenvalue of absolute value at most N eps times the
    largest, with eps of the precision of the products, is rounding and returned as 0.

    Args:
        operator: symmetric, positive semi-definite operator of size N.
        dense_below: operators of at most this size are formed as a matrix (N products), which gives the smallest
            eigenvalue up to rounding. Lanczos converges slowly to a smallest eigenvalue with many others close to it.
        tol: relative accuracy of Lanczos; 0 for that of float64.
        max_iterations: restarts of Lanczos, of at most 64 products each, for each end of the spectrum.

    Returns:
        The two eigenvalues and the condition number.

    Raises:
        TypeError: ``operator`` is not an operator or matrix.
        ValueError: products are not finite, or an eigenvalue is negative beyond rounding.
        RuntimeError: lanczos did not find the largest eigenvalue.

    Source: Lehoucq, Sorensen and Yang, ARPACK Users' Guide (1998), for the iterative method.
    """
    products = products_of(operator)
    count(dense_below, "dense_below", 0)
    count(max_iterations, "max_iterations", 1)
    made = 0

    def multiply(columns: Any) -> Any:
        nonlocal made
        rows = torch.from_numpy(np.ascontiguousarray(columns.reshape(products.dim, -1).T)).to(products.device)
        made += len(rows)
        return products(rows.double()).cpu().numpy().T.reshape(columns.shape)

    bound = operator.rank_bound if isinstance(operator, BFK) else products.dim
    deficient = (
        f"rank at most {bound}, the number of parameters, below {products.dim}" if bound < products.dim else None
    )
    if products.dim <= max(dense_below, 2):
        values = eigvalsh(_matrix(products, multiply))
        return _checked(products, float(values[-1]), float(values[0]), deficient, "dense", made)
    shape = (products.dim, products.dim)

    def find(shift: float, sign: float) -> float:
        """Return the largest eigenvalue of shift + sign K."""
        counted = LinearOperator(shape, matvec=lambda x: shift * x + sign * multiply(x), dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(products.dim)  # a new array each time, as ARPACK writes to it
        options = {"k": 1, "v0": start, "tol": tol, "maxiter": max_iterations, "ncv": min(products.dim, _KRYLOV)}
        return float(eigsh(counted, which="LA", return_eigenvectors=False, **options)[0])

    if not multiply(np.random.default_rng(0).standard_normal(products.dim)).any():
        return _checked(products, 0.0, 0.0, deficient, "lanczos", made)
    try:
        largest = find(0.0, 1.0)
    except ArpackNoConvergence as error:
        raise RuntimeError(f"the largest eigenvalue was not found in {made} products") from error
    if deficient is not None:
        return _checked(products, largest, 0.0, deficient, "lanczos", made)
    try:
        # eigsh measures accuracy relative to the eigenvalue that it computes, and so misses an eigenvalue of 0.
        smallest = largest - find(largest, -1.0)
    except ArpackNoConvergence:
        reason = f"the smallest eigenvalue was not found in {made} products"
        return Extremes(largest, math.nan, math.nan, reason, "lanczos", made)
    return _checked(products, largest, smallest, None, "lanczos", made)


def condition_of(largest: float, smallest: float) -> float:
    """Return largest/smallest; inf if only the smallest is 0, nan if both are."""
    if smallest > 0:
        return largest / smallest
    return math.inf if largest > 0 else math.nan


def _checked(
    products: Products, largest: float, smallest: float, deficient: str | None, method: str, made: int
) -> Extremes:
    noise = products.dim * torch.finfo(products.dtype).eps * abs(largest)
    reason = deficient
    if largest <= 0 and abs(smallest) <= noise:
        largest, smallest, reason = max(largest, 0.0), 0.0, reason or "all eigenvalues are 0"
    if smallest < -noise:
        raise ValueError(f"operator: expected a positive semi-definite one, got the eigenvalue {smallest:.6g}")
    if reason is None and smallest <= noise:
        reason = f"below the rounding of the products, {noise:.3g}"
    if reason is not None:
        smallest = 0.0
    return Extremes(largest, smallest, condition_of(largest, smallest), reason, method, made)


def _matrix(products: Products, multiply: Any) -> Any:
    parts = [
        multiply(np.eye(products.dim, min(products.chunk, products.dim - start), -start))
        for start in range(0, products.dim, products.chunk)
    ]
    matrix = np.concatenate(parts, axis=1)
    return 0.5 * (matrix + matrix.T)
