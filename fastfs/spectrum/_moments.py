"""Moments of a spectrum, tr(K^p)/dim, from products with random vectors, with standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastfs._utils.extras import frame
from fastfs.spectrum._products import Operator, Products, count, generator_of, products_of, random_rows

if TYPE_CHECKING:
    import pandas

__all__ = ["Moments", "moments"]

_MOST_ORDER = 4


@dataclass(frozen=True)
class Moments:
    """Estimates of ``M_p = tr(K^p)/dim`` for p = 1..P, as float64 on the CPU.

    Attributes:
        dim: N, the size of the operator.
        values: (P,) estimates.
        covariance: (P, P) covariance of the estimates, from the variance over probes.
        samples: (probes, P) estimate of M_p from each probe; independent of each other given the sketch.
        products: number of products with the operator.
        sketch: number of directions that were projected out and treated exactly (Hutch++).
        converged: whether the relative standard errors reached ``rtol``.
        rtol: requested relative standard error.
    """

    dim: int
    values: Tensor
    covariance: Tensor
    samples: Tensor
    products: int
    sketch: int
    converged: bool
    rtol: float

    @property
    def probes(self) -> int:
        """Number of random vectors, without those of the sketch."""
        return len(self.samples)

    @property
    def errors(self) -> Tensor:
        """(P,) standard errors of the values."""
        return self.covariance.diagonal().clamp_min(0).sqrt()

    @property
    def traces(self) -> Tensor:
        """(P,) tr(K^p)."""
        return self.values * self.dim

    @property
    def predicted_cos_angle(self) -> Tensor:
        """Predicted cosine of the backward-feature angle, ``M_1/sqrt(M_2)``, for b isotropic and independent of K.

        0-d; nan for K = 0.

        Raises:
            ValueError: only the moment of order 1 was estimated.

        Source: section 3.1 of "The Feature Speed Formula", arXiv 2311.18718.
        """
        self._needs_two("predicted_cos_angle")
        return self.values[0] / self.values[1].sqrt()

    @property
    def predicted_cos_angle_error(self) -> Tensor:
        """Standard error of the predicted cosine by the delta method, from the covariance of M_1 and M_2: 0-d."""
        self._needs_two("predicted_cos_angle_error")
        first, second = self.values[:2]
        slope = torch.stack([second.rsqrt(), -0.5 * first * second.pow(-1.5)])
        return (slope @ self.covariance[:2, :2] @ slope).clamp_min(0).sqrt()

    def to_frame(self) -> pandas.DataFrame:
        """Return one row per p: order, value, error, trace.

        Returns:
            A DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        orders = list(range(1, len(self.values) + 1))
        return frame(
            {
                "order": orders,
                "value": self.values.tolist(),
                "error": self.errors.tolist(),
                "trace": self.traces.tolist(),
            }
        )

    def __str__(self) -> str:
        parts = zip(self.values.tolist(), self.errors.tolist(), strict=True)
        shown = ", ".join(f"M_{p} = {value:.6g} +- {error:.2g}" for p, (value, error) in enumerate(parts, start=1))
        rule = "reached" if self.converged else "not reached"
        work = f"{self.probes} probes, {self.products} products"
        return f"{shown}; dim {self.dim}, {work}, relative error {self.rtol:g} {rule}"

    def _needs_two(self, what: str) -> None:
        if len(self.values) < 2:
            raise ValueError(f"{what}: expected moments of order 2 at least, got order {len(self.values)}")


def moments(
    operator: Operator,
    *,
    order: int = 2,
    rtol: float = 0.02,
    min_probes: int = 16,
    max_probes: int = 512,
    sketch: int = 0,
    distribution: str = "rademacher",
    seed: int | torch.Generator = 0,
) -> Moments:
    """Estimate ``tr(K^p)/dim`` for p = 1..order by Hutchinson's estimator, or by Hutch++ with a sketch.

    One product w = K v gives v^T w, whose mean is tr K, and |w|^2 for tr K^2; a product with w gives p = 3 and 4. With
    ``sketch`` = s > 0 (Hutch++), an orthonormal basis Q of K S, with S Gaussian of s columns, is projected out. Its
    share tr(Q^T K^p Q) is exact (2 s products for p <= 2), and only the rest is estimated. This helps if few
    eigenvalues carry the trace; for s >= rank(K) the result is exact up to rounding.

    Probes are added, a chunk at a time, until every relative standard error is at most ``rtol``. This stopping rule
    biases the errors down by about a tenth: an interval of 1.96 standard errors covered the true value in 92 % of 400
    repetitions with eigenvalues i^-1.5, i up to 60. With ``rtol=0`` there is no such bias.

    Args:
        operator: symmetric operator: a :class:`BFK`, a scipy ``LinearOperator``, or a torch or NumPy matrix.
        order: highest power P, 1 to 4.
        rtol: relative standard error at which to stop; 0 for exactly ``max_probes``.
        min_probes: smallest number of probes, at least 2; with few probes the standard error itself is unreliable.
        max_probes: largest number of probes.
        sketch: number of columns of the sketch, at most N; 0 for Hutchinson's estimator.
        distribution: distribution of the probes: "rademacher" or "gaussian".
        seed: seed of the probes, or a ``torch.Generator``.

    Returns:
        Estimates with their covariance.

    Raises:
        TypeError: ``operator`` is not an operator or matrix.
        ValueError: an argument is out of range, or products are not finite.

    Source: Hutchinson (1990); Meyer, Musco, Musco, Woodruff, "Hutch++", arXiv 2010.09649.
    """
    products = products_of(operator)
    count(order, "order", 1)
    count(min_probes, "min_probes", 2)
    count(max_probes, "max_probes", min_probes)
    count(sketch, "sketch", 0)
    if order > _MOST_ORDER:
        raise ValueError(f"order: expected at most {_MOST_ORDER}, got {order}")
    if isinstance(rtol, bool) or not isinstance(rtol, (int, float)) or not 0 <= rtol < math.inf:
        raise ValueError(f"rtol: expected a number >= 0, got {rtol!r}")
    if sketch > products.dim:
        raise ValueError(f"sketch: expected at most {products.dim} columns, the size of the operator, got {sketch}")
    generator = generator_of(seed)
    per_probe = (order + 1) // 2
    made = 0
    basis, exact = None, torch.zeros(order, dtype=torch.float64)
    if sketch:
        basis = _range(products, sketch, generator)
        exact = _powers(products, basis, order).sum(dim=0).cpu()
        made += len(basis) * per_probe + sketch
    samples = torch.zeros(0, order, dtype=torch.float64)
    while True:
        goal = min_probes if len(samples) < min_probes else max_probes
        rows = random_rows(distribution, min(products.chunk, goal - len(samples)), products, generator)
        if basis is not None:
            rows = rows - (rows @ basis.T) @ basis
        samples = torch.cat([samples, (_powers(products, rows, order).cpu() + exact) / products.dim])
        made += len(rows) * per_probe
        if len(samples) < min_probes:
            continue
        values = samples.mean(dim=0)
        covariance = torch.atleast_2d(torch.cov(samples.T)) / len(samples)
        converged = bool((covariance.diagonal().clamp_min(0).sqrt() <= rtol * values.abs()).all())
        if len(samples) >= max_probes or (converged and rtol > 0):
            return Moments(products.dim, values, covariance, samples, made, sketch, converged, float(rtol))


def _range(products: Products, columns: int, generator: torch.Generator) -> Tensor:
    """Return orthonormal rows that span products with random vectors, except for rounding: (<= columns, N).

    The vectors are Gaussian even if the probes are not, because a small square matrix of signs is often singular.
    """
    images = [
        products(random_rows("gaussian", min(products.chunk, columns - done), products, generator))
        for done in range(0, columns, products.chunk)
    ]
    _, sizes, directions = torch.linalg.svd(torch.cat(images), full_matrices=False)
    noise = products.dim * torch.finfo(products.dtype).eps
    basis: Tensor = directions[sizes > noise * sizes.max()]
    return basis


def _powers(products: Products, rows: Tensor, order: int) -> Tensor:
    """Return v^T K^p v for p = 1..order: (n, order)."""
    found = []
    for part in rows.split(products.chunk):
        powers, image = [], part
        for p in range(1, order + 1):
            if p % 2:
                source, image = image, products(image)
                powers.append((source * image).sum(dim=1))
            else:
                powers.append(image.square().sum(dim=1))
        found.append(torch.stack(powers, dim=1))
    return torch.cat(found) if found else rows.new_zeros(0, order)
