"""The backward-to-feature kernel as an operator: products by one vjp and one jvp, never a matrix."""

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
    """A linear map from tensors to tensors that scipy can use: subclasses say how to multiply a batch.

    Args:
        rows, columns: shapes of what comes out of a product and of what goes in.
        like: a tensor of the dtype and on the device of both.
        chunk: how many vectors are multiplied at once.
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
        """Products of at most ``chunk`` vectors of shape (n, *column_shape), or of the adjoint with (n, *row_shape)."""
        raise NotImplementedError

    def _products(self, vectors: Tensor, *, adjoint: bool = False) -> Tensor:
        """The product of one vector or of a batch, as many at once as ``chunk`` says.

        Raises:
            TypeError: another dtype or device.
            ValueError: another shape.
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
        with torch.no_grad():  # the graphs that products need are those of torch.func
            parts = [self._multiply(part, adjoint=adjoint) for part in batch.split(self.chunk)]
        result = torch.cat(parts).detach()
        return result[0] if single else result

    def rows(self, vectors: Tensor) -> Tensor:
        """Products of the rows of a matrix (n, columns): (n, rows)."""
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
        """The whole matrix in float64, (rows, columns), on the device: rows x columns x 8 bytes.

        Raises:
            ValueError: it would need more than ``max_bytes``.
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
    """Backward-to-feature kernel ``K_l = sum over k <= l of lr_k J_lk J_lk^T``, with ``J_lk = df_l/dw_k``: N x N.

    N is the number of elements of the features of the layer, batch included; gradient descent with the rates lr moves
    them by ``-K_l b_l`` to first order if the layer is a cut. Symmetric and positive semi-definite. The sum is over all
    parameters that the layer depends on.

    A product is one vjp, a product with the rates and one jvp, at the same random numbers (dropout masks), buffers and
    modes as the first forward. Batches go through ``torch.func.vmap``, at most ``chunk`` vectors at once. Memory
    besides one forward's graph, which is kept: for each vector of a chunk the gradients of all parameters upstream and
    the tangents of one forward, whatever the number of vectors.

    BatchNorm in training mode is taken as it is: the statistics of the batch move with the parameters.

    Args:
        model: any network; it is not changed, and may not be while the operator is used.
        loss_fn: function of the model and the batch that gives the loss. K does not depend on its value; it says how
            the model is run, and gives ``backward``.
        batch: what ``loss_fn`` takes.
        layer: exact name of a module that runs once in a forward.
        lr: learning rate: a number, or regular expression -> number or tensor (one rate per entry of the parameter).
        parameters: regular expression, searched for in the names: the sum is over these parameters alone.
        dtype: torch.float64 to compute in double precision: parameters, buffers and inputs are cast for that.
        chunk: how many vectors are multiplied at once.

    Attributes:
        features, backward: f_l and b_l = dLoss/df_l, of the same shape.
        names: of the parameters in the sum.
        rank_bound: K has at most this rank: entries of these parameters whose rate is not zero, or N if fewer.

    Raises:
        TypeError: features that are not float32 or float64; a loss that is no scalar tensor.
        ValueError: no such layer, or it does not run once; it depends on none of the parameters; rates that do not fit.
        RuntimeError: activation checkpointing in the model: torch.func cannot differentiate it.

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
        """The kernel at a layer of a network that has been linearised already.

        Args:
            linearization: the network.
            layer: index into its layers.
            rates: for each of its parameters, as from :func:`fastfs._network.learning_rates.resolve`.
            among: for each of its parameters whether it is in the sum; all upstream by default.
            chunk: how many vectors are multiplied at once.
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
            raise ValueError(f"layer {lin.layers[layer].name!r}: {reason}; the sum over parameters is not known")
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
        """K v for v of the features' shape, or for a batch (n, *shape); the same dtype and device."""
        return self._products(vectors)

    def cos_angle(self) -> Tensor:
        """``b^T K b / (|b| |K b|)`` for the backward vector of the layer; float64, 0-d; nan if b or K b is zero."""
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
    """Products with the transposed Jacobian of a function at a point.

    Raises:
        RuntimeError: the model does something that torch.func cannot differentiate; for checkpoints with what to do.
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
