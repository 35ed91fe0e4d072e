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
    """The ends of the spectrum of a positive semi-definite operator.

    Attributes:
        largest: largest eigenvalue.
        smallest: smallest one; 0 where it is known to be 0 or below rounding, nan where it was not found.
        condition: largest/smallest; inf for a smallest of 0.
        reason: why the smallest is 0 or nan; None if it was found.
        method: "dense" (all eigenvalues) or "lanczos" (scipy's eigsh).
        products: products with the operator that were made.
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
    """The largest and the smallest eigenvalue.

    A kernel has at most the rank of the number of parameters in its sum (:attr:`BFK.rank_bound`); if that is less than
    N its smallest eigenvalue is 0 and is not looked for. One at or below N eps times the largest, eps of the precision
    of the products, is rounding and given as 0, as is a negative one of that size.

    Args:
        operator: symmetric and positive semi-definite.
        dense_below: operators of at most this size are made dense (N products), which gives the smallest eigenvalue to
            rounding; Lanczos finds a smallest eigenvalue slowly where many are close to it.
        tol: relative accuracy of Lanczos; 0 for that of float64.
        max_iterations: restarts of Lanczos, of at most 64 products each, for each end.

    Raises:
        TypeError: the operator is none.
        ValueError: products that are not finite, or an eigenvalue that is negative beyond rounding.
        RuntimeError: Lanczos did not find the largest eigenvalue.
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
        return _judged(products, float(values[-1]), float(values[0]), deficient, "dense", made)
    shape = (products.dim, products.dim)

    def find(shift: float, sign: float) -> float:
        """The largest eigenvalue of shift + sign K."""
        counted = LinearOperator(shape, matvec=lambda x: shift * x + sign * multiply(x), dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(products.dim)  # a new one each time: ARPACK writes to it
        options = {"k": 1, "v0": start, "tol": tol, "maxiter": max_iterations, "ncv": min(products.dim, _KRYLOV)}
        return float(eigsh(counted, which="LA", return_eigenvectors=False, **options)[0])

    if not multiply(np.random.default_rng(0).standard_normal(products.dim)).any():
        return _judged(products, 0.0, 0.0, deficient, "lanczos", made)
    try:
        largest = find(0.0, 1.0)
    except ArpackNoConvergence as error:
        raise RuntimeError(f"the largest eigenvalue was not found in {made} products") from error
    if deficient is not None:
        return _judged(products, largest, 0.0, deficient, "lanczos", made)
    try:
        # eigsh counts accuracy relative to the eigenvalue that it finds, and misses one that is 0.
        smallest = largest - find(largest, -1.0)
    except ArpackNoConvergence:
        reason = f"the smallest eigenvalue was not found in {made} products"
        return Extremes(largest, math.nan, math.nan, reason, "lanczos", made)
    return _judged(products, largest, smallest, None, "lanczos", made)


def condition_of(largest: float, smallest: float) -> float:
    """largest/smallest; inf if the smallest is 0 and the largest is not, nan if both are."""
    if smallest > 0:
        return largest / smallest
    return math.inf if largest > 0 else math.nan


def _judged(
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
