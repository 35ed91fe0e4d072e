"""The Jacobian between two layers as an operator, and its singular values, which measure its conditioning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn

from fastfs._network.linearization import Linearization, LossFunction
from fastfs._network.perturbed import load_forward_mode
from fastfs.spectrum._extremes import condition_of, extremes
from fastfs.spectrum._operator import TorchOperator, pullback
from fastfs.spectrum._products import count

__all__ = ["LayerJacobian", "SingularValues", "singular_values"]

_DENSE = 1024


class LayerJacobian(TorchOperator):
    """The Jacobian ``J = df_end/df_start``, (N_end, N_start): one jvp per product, one vjp per transposed product.

    N is the number of elements of a layer's features, including the batch dimension. For networks that treat rows
    independently, J is block diagonal. Batches of vectors use ``torch.func.vmap``, at most ``chunk`` vectors at once.

    Args:
        model: any network. It is not changed, and must not be changed while the operator is in use.
        loss_fn: function of the model and the batch that returns the loss; it defines how the model is called.
        batch: second argument of ``loss_fn``.
        start: exact name of a module that runs once.
        end: exact name of a module that runs once, after ``start``.
        dtype: ``torch.float64`` to compute in double precision.
        chunk: number of vectors multiplied at once.

    Raises:
        TypeError: the features are neither float32 nor float64.
        ValueError: a layer does not exist or does not run exactly once, or ``end`` does not depend on ``start``.

    Source: section 3 of "The Feature Speed Formula", arXiv 2311.18718.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batch: Any,
        start: str,
        end: str,
        *,
        dtype: torch.dtype | None = None,
        chunk: int = 16,
    ) -> None:
        for name, layer in (("start", start), ("end", end)):
            if not isinstance(layer, str):
                raise TypeError(f"{name}: expected the name of a module, got {layer!r}")
        linearization = Linearization(model, loss_fn, batch, layers=list(dict.fromkeys((start, end))), dtype=dtype)
        places = {layer.name: layer.index for layer in linearization.layers}
        self._set_up(linearization, places[start], places[end], chunk)

    @classmethod
    def of(cls, linearization: Linearization, start: int, end: int, *, chunk: int = 16) -> LayerJacobian:
        """Return the Jacobian between two layers of a linearized network.

        Args:
            linearization: The linearized network.
            start: Index of the layer whose features are the input.
            end: Index of the layer whose features are the output.
            chunk: Number of vectors that one pass multiplies.

        Returns:
            The Jacobian.
        """
        jacobian = cls.__new__(cls)
        jacobian._set_up(linearization, start, end, chunk)
        return jacobian

    def _set_up(self, lin: Linearization, start: int, end: int, chunk: int) -> None:
        self._function = lin.from_layer(start, end)
        (source,), (target,) = lin.features[start], lin.features[end]
        if source.dtype != target.dtype:
            raise TypeError(
                f"expected features of one dtype, got {source.dtype} and {target.dtype}: give dtype=torch.float64"
            )
        super().__init__(target.shape, source.shape, target, chunk)
        self.start, self.end = lin.layers[start].name, lin.layers[end].name
        load_forward_mode()
        self._zero = torch.zeros_like(source)
        with torch.enable_grad():
            if not self._function(self._zero.clone().requires_grad_()).requires_grad:
                raise ValueError(f"end: layer {self.end!r} does not depend on layer {self.start!r}")
        self._pull = pullback(self._function, self._zero)

    def apply(self, vectors: Tensor) -> Tensor:
        """Multiply the Jacobian with vectors.

        Args:
            vectors: Shape of the features at the start, or a batch (n, *shape).

        Returns:
            J v, shape of the features at the end, or a batch of it.
        """
        return self._products(vectors)

    def apply_transpose(self, vectors: Tensor) -> Tensor:
        """Multiply the transpose of the Jacobian with vectors.

        Args:
            vectors: Shape of the features at the end, or a batch (n, *shape).

        Returns:
            J^T u, shape of the features at the start, or a batch of it.
        """
        return self._products(vectors, adjoint=True)

    def _multiply(self, vectors: Tensor, *, adjoint: bool) -> Tensor:
        one = self._pulled if adjoint else self._pushed
        products: Tensor = torch.func.vmap(one, randomness="same")(vectors)
        return products

    def _pushed(self, vector: Tensor) -> Tensor:
        product: Tensor = torch.func.jvp(self._function, (self._zero,), (vector,))[1]
        return product

    def _pulled(self, vector: Tensor) -> Tensor:
        product: Tensor = self._pull(vector)[0]
        return product


class _Gram(TorchOperator):
    """The Gram matrix J J^T or J^T J, whichever is smaller."""

    def __init__(self, jacobian: LayerJacobian) -> None:
        self._jacobian, self._wide = jacobian, jacobian.shape[0] <= jacobian.shape[1]
        shape = jacobian.row_shape if self._wide else jacobian.column_shape
        super().__init__(
            shape, shape, torch.empty(0, dtype=jacobian.torch_dtype, device=jacobian.device), jacobian.chunk
        )

    def _multiply(self, vectors: Tensor, *, adjoint: bool) -> Tensor:
        between = self._jacobian._products(vectors, adjoint=self._wide)
        return self._jacobian._products(between, adjoint=not self._wide)


@dataclass(frozen=True)
class SingularValues:
    """The extreme singular values of a Jacobian, which has min(rows, columns) of them.

    Attributes:
        largest: largest singular value.
        smallest: smallest singular value; 0 if it is below rounding, nan if it was not found.
        condition: largest/smallest; inf if the smallest is 0.
        reason: why the smallest is 0 or nan; None if it was found.
        method: "dense" (all singular values) or "lanczos".
        values: all singular values in descending order, float64 on the CPU, if the method is "dense"; else None.
    """

    largest: float
    smallest: float
    condition: float
    reason: str | None
    method: str
    values: Tensor | None

    def __str__(self) -> str:
        why = "" if self.reason is None else f" ({self.reason})"
        return f"singular values {self.smallest:.6g} to {self.largest:.6g}, condition number {self.condition:.6g}{why}"


def singular_values(jacobian: LayerJacobian, *, dense_below: int = _DENSE) -> SingularValues:
    """Return all singular values of small Jacobians, and the largest and smallest of others.

    If both dimensions are at most ``dense_below``, the matrix is formed. Otherwise scipy's ``svds`` finds the largest
    value. The smallest one is the square root of the smallest eigenvalue of J J^T (or J^T J), found by Lanczos on
    c - J J^T with c the largest eigenvalue. There, values of at most sqrt(N eps) times the largest singular value are
    rounding and returned as 0.

    Args:
        jacobian: the Jacobian.
        dense_below: largest dimension of a matrix that is formed.

    Returns:
        The singular values and the condition number.

    Raises:
        TypeError: ``jacobian`` is not a :class:`LayerJacobian`.
        ValueError: products are not finite, or ``dense_below`` is negative.

    Source: section 3 of "The Feature Speed Formula", arXiv 2311.18718.
    """
    if not isinstance(jacobian, LayerJacobian):
        raise TypeError(f"jacobian: expected a LayerJacobian, got {type(jacobian).__name__}")
    count(dense_below, "dense_below", 0)
    size, eps = min(jacobian.shape), torch.finfo(jacobian.torch_dtype).eps
    if max(jacobian.shape) <= max(dense_below, 2):
        matrix = jacobian.dense()
        if not bool(matrix.isfinite().all()):
            raise ValueError("jacobian: expected finite products, got NaN or Inf")
        values = torch.linalg.svdvals(matrix).cpu()
        largest, smallest = float(values[0]), float(values[-1])
        noise = max(jacobian.shape) * eps * largest
        reason = f"below the rounding of the products, {noise:.3g}" if smallest <= noise else None
        smallest = 0.0 if reason else smallest
        return SingularValues(largest, smallest, condition_of(largest, smallest), reason, "dense", values)
    double = LinearOperator(jacobian.shape, jacobian.matvec, jacobian.rmatvec, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    ends = extremes(_Gram(jacobian), dense_below=0)
    largest = 0.0
    if ends.largest > 0:
        largest = float(svds(double, k=1, which="LM", v0=start, return_singular_vectors=False)[0])
    smallest = math.sqrt(ends.smallest)
    reason = None if ends.reason is None else f"its square: {ends.reason}"
    return SingularValues(largest, smallest, condition_of(largest, smallest), reason, "lanczos", None)
