"""Eigenvalue densities by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from fastfs._utils.extras import frame
from fastfs.spectrum._products import Operator, Products, count, generator_of, products_of, random_rows

if TYPE_CHECKING:
    import pandas

__all__ = ["Quadrature", "quadrature"]


_ROUNDING = 100.0
"""Rounding error of a product in eps of its norm, with a margin for long sums; smaller residuals end a Krylov space."""


@dataclass(frozen=True)
class Quadrature:
    """Gaussian quadratures of a spectrum: ``tr f(K)/dim`` is about the mean over probes of ``sum of weight f(node)``.

    Nodes are the Ritz values of a probe v, weights the squared first components of their vectors. A probe with s nodes
    gives ``v^T K^p v / |v|^2`` exactly for p <= 2 s - 1, and for all p if its Krylov space was exhausted.

    Attributes:
        dim: N, the size of the operator.
        nodes: per probe, (s,) in ascending order, float64 on the CPU.
        weights: per probe, (s,) with sum 1.
        exhausted: per probe, whether its Krylov space ended before the requested number of steps, so that the nodes are
            eigenvalues up to rounding.
        products: number of products with the operator.
    """

    dim: int
    nodes: list[Tensor]
    weights: list[Tensor]
    exhausted: list[bool]
    products: int

    @property
    def probes(self) -> int:
        """Number of random vectors."""
        return len(self.nodes)

    def moment(self, order: int) -> Tensor:
        """Return ``tr(K^order)/dim`` and its standard error over probes (nan for one probe): (2,).

        Args:
            order: power of K, at least 0.

        Returns:
            float64 (2,).

        Raises:
            ValueError: ``order`` is not a whole number >= 0.
        """
        count(order, "order", 0)
        each = torch.stack([(w * x**order).sum() for x, w in zip(self.nodes, self.weights, strict=True)])
        error = each.std() / math.sqrt(len(each)) if len(each) > 1 else each.new_tensor(math.nan)
        return torch.stack([each.mean(), error])

    def density(self, grid: Tensor, sigma: float) -> Tensor:
        """Return the density of eigenvalues as a share of all per unit, with each node smoothed to a Gaussian bump.

        Args:
            grid: (n,) points.
            sigma: standard deviation of the bumps, in the unit of the eigenvalues.

        Returns:
            (n,) densities; the integral over all eigenvalues is 1.

        Raises:
            ValueError: ``sigma`` is not positive and finite, or ``grid`` is not one-dimensional.
        """
        if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0 < sigma < math.inf:
            raise ValueError(f"sigma: expected a positive number, got {sigma!r}")
        nodes, weights = self._merged()
        result = torch.zeros_like(self._points(grid, "grid"))
        for x, w in zip(nodes.split(1024), weights.split(1024), strict=True):
            bumps = torch.exp(-0.5 * ((self._points(grid, "grid")[:, None] - x) / sigma).square())
            result += bumps @ w
        return result / (sigma * math.sqrt(2 * math.pi))

    def cumulative(self, grid: Tensor) -> Tensor:
        """Return the share of eigenvalues at or below each point of a grid.

        Args:
            grid: Points, shape (n,).

        Returns:
            Shares in [0, 1], shape (n,).
        """
        nodes, weights = self._merged()
        total = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
        return total[torch.searchsorted(nodes, self._points(grid, "grid"), right=True)].clamp_max(1.0)

    def quantile(self, q: float) -> float:
        """Return the smallest node at or below which at least the share q of the weight lies.

        Args:
            q: share, in [0, 1].

        Returns:
            The node, in the unit of the eigenvalues.

        Raises:
            ValueError: ``q`` is not in [0, 1].
        """
        if isinstance(q, bool) or not isinstance(q, (int, float)) or not 0 <= q <= 1:
            raise ValueError(f"q: expected a share in [0, 1], got {q!r}")
        nodes, weights = self._merged()
        # If rounding of the running sum exceeds the weight of a node, the share still belongs to that node.
        place = int(torch.searchsorted(weights.cumsum(0), q - 1e-12))
        return float(nodes[min(place, len(nodes) - 1)])

    def to_frame(self) -> pandas.DataFrame:
        """Return one row per node: probe, node, weight.

        Returns:
            A DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame(
            {
                "probe": [i for i, x in enumerate(self.nodes) for _ in range(len(x))],
                "node": torch.cat(self.nodes).tolist(),
                "weight": torch.cat(self.weights).tolist(),
            }
        )

    def __str__(self) -> str:
        low, middle, high = (self.quantile(q) for q in (0.0, 0.5, 1.0))
        nodes = f"{self.probes} probes, {sum(map(len, self.nodes))} nodes"
        return f"{nodes} from {low:.4g} to {high:.4g}, median {middle:.4g}; dim {self.dim}, {self.products} products"

    def _merged(self) -> tuple[Tensor, Tensor]:
        nodes, order = torch.cat(self.nodes).sort()
        return nodes, torch.cat(self.weights)[order] / len(self.nodes)

    @staticmethod
    def _points(grid: Tensor, what: str) -> Tensor:
        if not isinstance(grid, Tensor) or grid.dim() != 1:
            raise ValueError(f"{what}: expected a tensor of one dimension, got {grid!r}")
        return grid.detach().cpu().double()


def quadrature(
    operator: Operator,
    *,
    probes: int = 8,
    steps: int = 50,
    distribution: str = "rademacher",
    seed: int | torch.Generator = 0,
) -> Quadrature:
    """Estimate the spectral density of a symmetric operator by stochastic Lanczos quadrature.

    Every probe starts a Lanczos process with full reorthogonalization, in float64 whatever the precision of the
    products. As many probes run together as the operator multiplies at once, in steps x chunk x N x 8 bytes of memory.

    Args:
        operator: symmetric operator: a :class:`BFK`, a scipy ``LinearOperator``, or a torch or NumPy matrix.
        probes: number of random vectors.
        steps: number of Lanczos steps, which is the number of nodes per probe, at most N.
        distribution: distribution of the probes: "rademacher" or "gaussian".
        seed: seed of the probes, or a ``torch.Generator``.

    Returns:
        Nodes and weights per probe.

    Raises:
        TypeError: ``operator`` is not an operator or matrix.
        ValueError: an argument is out of range, or products are not finite.

    Source: Ubaru, Chen, Saad, SIAM J. Matrix Anal. Appl. 38 (2017); Golub and Welsch (1969).
    """
    products = products_of(operator)
    count(probes, "probes", 1)
    count(steps, "steps", 1)
    generator = generator_of(seed)
    nodes: list[Tensor] = []
    weights: list[Tensor] = []
    exhausted: list[bool] = []
    made = 0
    while len(nodes) < probes:
        start = random_rows(distribution, min(products.chunk, probes - len(nodes)), products, generator)
        diagonals, offs, lengths, used = _lanczos(products, start, min(steps, products.dim))
        made += used
        for diagonal, off, length in zip(diagonals, offs, lengths, strict=True):
            values, vectors = eigh_tridiagonal(diagonal[:length].numpy(), off[: length - 1].numpy())
            nodes.append(torch.from_numpy(values))
            weights.append(torch.from_numpy(vectors[0] ** 2))
            exhausted.append(length < steps)
    return Quadrature(products.dim, nodes, weights, exhausted, made)


def _lanczos(products: Products, start: Tensor, steps: int) -> tuple[Tensor, Tensor, list[int], int]:
    """Return tridiagonal matrices of several starts: diagonals (n, steps), off-diagonals, lengths, product count."""
    rows, dim = start.shape
    basis = start.new_zeros(rows, steps, dim)
    diagonal, off = torch.zeros(rows, steps, dtype=torch.float64), torch.zeros(rows, steps, dtype=torch.float64)
    lengths = [steps] * rows
    running = torch.ones(rows, dtype=torch.bool)
    scale = torch.zeros(rows, dtype=torch.float64)
    noise = _ROUNDING * torch.finfo(products.dtype).eps
    vector = start / start.norm(dim=1, keepdim=True)
    made = 0
    for step in range(steps):
        basis[:, step] = vector
        live = running.to(vector.device)
        image = torch.zeros_like(vector)
        image[live] = products(vector[live])
        made += int(running.sum())
        diagonal[:, step] = (vector * image).sum(dim=1).cpu()
        scale = torch.maximum(scale, image.norm(dim=1).cpu())
        known = basis[:, : step + 1]
        for _ in range(2):  # twice is enough
            image = image - torch.einsum("ns,nsd->nd", torch.einsum("nsd,nd->ns", known, image), known)
        size = image.norm(dim=1).cpu()
        # The rest is rounding of the product, so the Krylov space is invariant.
        ended = running & (size <= noise * scale)
        for i in ended.nonzero()[:, 0].tolist():
            lengths[i] = step + 1
        running = running & ~ended
        if step + 1 == steps or not bool(running.any()):
            break
        off[:, step] = size
        vector = torch.where(running, 1.0 / size, 0.0).to(image)[:, None] * image
    return diagonal, off, lengths, made
