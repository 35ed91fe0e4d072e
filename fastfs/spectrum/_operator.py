"""The backward-to-feature kernel as an operator whose products use one vjp and one jvp instead of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from fastfs._network.learning_rates import LearningRates, resolve
from fastfs._network.linearization import Linearization, LossFunction
from fastfs._network.perturbed import load_forward_mode

__all__ = ["BFK", "TorchOperator", "pullback"]

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
_DENSE_BYTES = 2**30


class TorchOperator(LinearOperator):  # type: ignore[misc]
    """A linear map between tensors as a scipy ``LinearOperator``. Subclasses implement products of a batch.

    Args:
        rows: shape of the result of a product.
        columns: shape of the argument of a product.
        like: tensor with the dtype and device of both.
        chunk: number of vectors multiplied at once.
    """

    def __init__(self, rows: torch.Size, columns: torch.Size, like: Tensor, chunk: int) -> None:
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk: expected a number of vectors >= 1, got {chunk!r}")
        if like.dtype not in _NUMPY:
            raise TypeError(f"expected features in float32 or float64, got {like.dtype}: give dtype=torch.float64")
        self.row_shape, self.column_shape = rows, columns
        self.torch_dtype, self.device, self.chunk = like.dtype, like.device, chunk
        super().__init__(_NUMPY[like.dtype], (rows.numel(), columns.numel()))

    def _multiply(self, vectors: Tensor, *, adjoint: bool) -> Tensor:
        """Multiply at most ``chunk`` vectors (n, *column_shape), or (n, *row_shape) for the adjoint."""
        raise NotImplementedError

    def _products(self, vectors: Tensor, *, adjoint: bool = False) -> Tensor:
        """Return the product of one vector or of a batch, ``chunk`` vectors at once.

        Args:
            vectors: one vector, or a batch with a leading dimension.
            adjoint: whether to multiply by the adjoint.

        Returns:
            The products, with a leading dimension if ``vectors`` has one.

        Raises:
            TypeError: the dtype or device differs from that of the operator.
            ValueError: the shape does not fit.
        """
        shape, out = (self.row_shape, self.column_shape) if adjoint else (self.column_shape, self.row_shape)
        if not isinstance(vectors, Tensor) or vectors.dtype != self.torch_dtype or vectors.device != self.device:
            what = f"{vectors.dtype} on {vectors.device}" if isinstance(vectors, Tensor) else type(vectors).__name__
            raise TypeError(f"vectors: expected a tensor of {self.torch_dtype} on {self.device}, got {what}")
        single = vectors.shape == shape
        if not single and not (vectors.dim() == len(shape) + 1 and vectors.shape[1:] == shape):
            raise ValueError(
                f"vectors: expected the shape {tuple(shape)} or (n, {', '.join(map(str, shape))}), "
                f"got {tuple(vectors.shape)}"
            )
        batch = vectors.detach()[None] if single else vectors.detach()
        if len(batch) == 0:
            return batch.new_empty((0, *out))
        with torch.no_grad():  # torch.func records the graphs that products need
            parts = [self._multiply(part, adjoint=adjoint) for part in batch.split(self.chunk)]
        result = torch.cat(parts).detach()
        return result[0] if single else result

    def rows(self, vectors: Tensor) -> Tensor:
        """Multiply the operator with many vectors.

        Args:
            vectors: One vector in each row, shape (n, columns).

        Returns:
            One product in each row, shape (n, rows).
        """
        return self._products(vectors.reshape(-1, *self.column_shape)).reshape(len(vectors), -1)

    def _from_numpy(self, vectors: Any, *, adjoint: bool) -> Any:
        vectors = np.asarray(vectors)
        if vectors.dtype.kind not in "biuf":
            raise TypeError(f"expected real vectors, got {vectors.dtype}")
        shape, size = (self.row_shape, self.shape[1]) if adjoint else (self.column_shape, self.shape[0])
        values = torch.tensor(np.ascontiguousarray(vectors.T), dtype=self.torch_dtype, device=self.device)
        products = self._products(values.reshape(-1, *shape), adjoint=adjoint).reshape(-1, size)
        return products.cpu().numpy().T

    def _matvec(self, x: Any) -> Any:
        return self._from_numpy(x.reshape(-1, 1), adjoint=False)[:, 0]

    def _matmat(self, X: Any) -> Any:
        return self._from_numpy(X, adjoint=False)

    def _rmatvec(self, x: Any) -> Any:
        return self._from_numpy(x.reshape(-1, 1), adjoint=True)[:, 0]

    def _rmatmat(self, X: Any) -> Any:
        return self._from_numpy(X, adjoint=True)

    def dense(self, *, max_bytes: int = _DENSE_BYTES) -> Tensor:
        """Return the matrix in float64, (rows, columns), on the device: rows x columns x 8 bytes.

        Args:
            max_bytes: largest permitted size.

        Returns:
            The matrix.

        Raises:
            ValueError: the matrix would need more than ``max_bytes``.
        """
        rows, columns = self.shape
        needed = rows * columns * 8
        if needed > max_bytes:
            raise ValueError(
                f"dense: a matrix of {rows} x {columns} in float64 needs {needed} bytes, more than max_bytes="
                f"{max_bytes}"
            )
        matrix = torch.empty(rows, columns, dtype=torch.float64, device=self.device)
        for start in range(0, columns, self.chunk):
            width = min(self.chunk, columns - start)
            unit = torch.zeros(width, columns, dtype=self.torch_dtype, device=self.device)
            unit[torch.arange(width), torch.arange(start, start + width)] = 1.0
            matrix[:, start : start + width] = self.rows(unit).T.double()
        return matrix


class BFK(TorchOperator):
    """The backward-to-feature kernel ``K_l = sum over k <= l of lr_k J_lk J_lk^T``, N x N, with ``J_lk = df_l/dw_k``.

    N is the number of elements of the features of the layer, including the batch dimension. Gradient descent with the
    rates lr changes the features by ``-K_l b_l`` to first order if the layer is a cut. K is symmetric and positive
    semi-definite. The sum is over all parameters that the layer depends on.

    A product consists of one vjp, a multiplication by the rates and one jvp, with the same random numbers (dropout
    masks), buffers and modes as the first forward. Batches use ``torch.func.vmap``, at most ``chunk`` vectors at once.
    Besides the graph of one forward, which is kept, each vector of a chunk takes the memory of the gradients of all
    upstream parameters and of the tangents of one forward.

    BatchNorm in training mode is included as it is: the statistics of the batch depend on the parameters.

    Args:
        model: any network. It is not changed, and must not be changed while the operator is in use.
        loss_fn: function of the model and the batch that returns the loss. K does not depend on its value; it defines
            how the model is called, and ``backward``.
        batch: second argument of ``loss_fn``.
        layer: exact name of a module that runs once in a forward.
        lr: learning rate: a number, or regular expression -> number or tensor (one rate per entry of the parameter).
        parameters: regular expression, searched for in the names of the parameters to sum over; None sums over all.
        dtype: ``torch.float64`` to compute in double precision; parameters, buffers and inputs are cast.
        chunk: number of vectors multiplied at once.

    Attributes:
        features: f_l.
        backward: b_l = dLoss/df_l, of the shape of the features.
        names: names of the parameters in the sum.
        rank_bound: upper bound on the rank of K: the number of entries of these parameters with a nonzero rate, at most
            N.

    Raises:
        TypeError: the features are neither float32 nor float64, or the loss is not a scalar tensor.
        ValueError: the layer does not exist, does not run exactly once or depends on none of the parameters, or the
            rates do not fit.
        RuntimeError: the model uses activation checkpointing, which torch.func cannot differentiate.

    Source: section 2.2 of "The Feature Speed Formula", arXiv 2311.18718.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batch: Any,
        layer: str,
        *,
        lr: LearningRates = 1.0,
        parameters: str | None = None,
        dtype: torch.dtype | None = None,
        chunk: int = 16,
    ) -> None:
        if not isinstance(layer, str):
            raise TypeError(f"layer: expected the name of a module, got {layer!r}")
        linearization = Linearization(model, loss_fn, batch, layers=[layer], parameters=parameters, dtype=dtype)
        rates = resolve(lr, linearization.names, linearization.parameters)
        self._set_up(linearization, 0, rates, linearization.structure.upstream[0].tolist(), chunk)
        if not self.names:
            raise ValueError(f"layer {layer!r} depends on none of the parameters {', '.join(linearization.names)}")

    @classmethod
    def of(
        cls,
        linearization: Linearization,
        layer: int,
        rates: Sequence[float | Tensor],
        *,
        among: Iterable[bool] | None = None,
        chunk: int = 16,
    ) -> BFK:
        """Return the kernel at a layer of a linearized network.

        Args:
            linearization: the network.
            layer: index of the layer.
            rates: rate of each parameter, as from :func:`fastfs._network.learning_rates.resolve`.
            among: whether each parameter is in the sum; None includes all upstream ones.
            chunk: number of vectors multiplied at once.

        Returns:
            The kernel.
        """
        upstream = linearization.structure.upstream[layer].tolist()
        chosen = [u and a for u, a in zip(upstream, upstream if among is None else among, strict=True)]
        kernel = cls.__new__(cls)
        kernel._set_up(linearization, layer, rates, chosen, chunk)
        return kernel

    def _set_up(
        self, lin: Linearization, layer: int, rates: Sequence[float | Tensor], chosen: Sequence[bool], chunk: int
    ) -> None:
        function = lin.function(layer)
        reason = lin.structure.reason[layer]
        if reason is not None and "hidden" in reason:
            raise ValueError(f"layer {lin.layers[layer].name!r}: {reason}; the sum over parameters is unknown")
        (self.features,), (self.backward,) = lin.features[layer], lin.backward[layer]
        super().__init__(self.features.shape, self.features.shape, self.features, chunk)
        load_forward_mode()
        places = [i for i, wanted in enumerate(chosen) if wanted]
        self.layer = lin.layers[layer].name
        self.names = [lin.names[i] for i in places]
        self._rates = [rates[i] for i in places]
        self._values = [lin.parameters[i] for i in places]
        entries = sum(_moving(r, v) for r, v in zip(self._rates, self._values, strict=True))
        self.rank_bound = min(self.features.numel(), entries)

        def features(values: Sequence[Tensor]) -> Tensor:
            everything = list(lin.parameters)
            for place, value in zip(places, values, strict=True):
                everything[place] = value
            return function(everything)

        self._function = features
        self._pull = pullback(features, self._values) if places else None

    def apply(self, vectors: Tensor) -> Tensor:
        """Multiply the kernel with vectors.

        Args:
            vectors: Shape of the features, or a batch (n, *shape), in their dtype and on their device.

        Returns:
            K v, of the same shape.
        """
        return self._products(vectors)

    def cos_angle(self) -> Tensor:
        """Return ``b^T K b / (|b| |K b|)`` for the layer's backward vector; float64, 0-d; nan if b or K b is zero."""
        moved, backward = self.apply(self.backward).double(), self.backward.double()
        cos: Tensor = (moved * backward).sum() / (moved.norm() * backward.norm())
        return cos.clamp_max(1.0)

    def _multiply(self, vectors: Tensor, *, adjoint: bool) -> Tensor:
        products: Tensor = torch.func.vmap(self._product, randomness="same")(vectors)
        return products

    def _product(self, vector: Tensor) -> Tensor:
        if self._pull is None:
            return torch.zeros_like(vector)
        (gradients,) = self._pull(vector)
        scaled = [r * g for r, g in zip(self._rates, gradients, strict=True)]
        product: Tensor = torch.func.jvp(self._function, (self._values,), (scaled,))[1]
        return product

    def _adjoint(self) -> BFK:
        return self

    def _transpose(self) -> BFK:
        return self


def pullback(function: Callable[[Any], Tensor], point: Any) -> Callable[[Tensor], Any]:
    """Return a function that multiplies vectors by the transposed Jacobian of a function at a point.

    Args:
        function: the function.
        point: its argument.

    Returns:
        The vector-Jacobian product.

    Raises:
        RuntimeError: torch.func cannot differentiate the model.
    """
    try:
        return torch.func.vjp(function, point)[1]
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        raise RuntimeError(
            "the model uses activation checkpointing or other hooks on saved tensors, which torch.func cannot "
            "differentiate: turn them off for this measurement"
        ) from error


def _moving(rate: float | Tensor, value: Tensor) -> int:
    if isinstance(rate, Tensor):
        return int(rate.expand(value.shape).count_nonzero())
    return value.numel() if rate > 0 else 0
