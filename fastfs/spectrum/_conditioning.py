"""A lower bound on the cosine of the backward-feature angle from the conditioning of a network's layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._network.layers import AUTO, Selection
from fastfs._network.learning_rates import LearningRates, resolve
from fastfs._network.linearization import Linearization, LossFunction
from fastfs.spectrum._extremes import condition_of, extremes
from fastfs.spectrum._jacobians import LayerJacobian, singular_values
from fastfs.spectrum._operator import BFK
from fastfs.spectrum._table import LayerTable

__all__ = ["Conditioning", "conditioning", "kantorovich"]


def kantorovich(condition: float) -> float:
    """Return the smallest possible cos(angle) between b and K b for positive definite K: ``2 sqrt(kappa)/(1 + kappa)``.

    Args:
        condition: kappa, the ratio of the largest to the smallest eigenvalue of K, at least 1; inf gives 0, nan gives
            nan.

    Returns:
        The bound, in [0, 1].

    Raises:
        ValueError: the condition number is below 1.

    Source: Kantorovich's inequality in the form of Wielandt. Equality holds if b is the sum of the two extreme
    eigenvectors, each weighted by the square root of the other's eigenvalue.
    """
    if condition < 1:
        raise ValueError(f"condition: expected a condition number >= 1, got {condition!r}")
    return 0.0 if math.isinf(condition) else 2.0 * math.sqrt(condition) / (1.0 + condition)


@dataclass(frozen=True)
class Conditioning(LayerTable):
    """Conditioning of a chain of L layers. Tensors are float64 on the CPU.

    Attributes:
        layers: names, in the order of the chain.
        jacobian_largest: (L, L) largest singular value of J_kl = df_l/df_k at [l, k] for k <= l, else nan.
        jacobian_smallest: (L, L) smallest |J_kl^T u| over unit vectors u: 0 if f_k has fewer elements than f_l.
        own_largest: (L,) largest eigenvalue of O_k, the kernel at f_k of the parameters between f_{k-1} and f_k.
        own_smallest: (L,) smallest eigenvalue of O_k.
        largest_bound: (L,) upper bound on the eigenvalues of K_l from the above.
        smallest_bound: (L,) lower bound on the eigenvalues of K_l from the above.
        largest: (L,) largest eigenvalue of K_l.
        smallest: (L,) smallest eigenvalue of K_l.
        reason: (L,) why the smallest eigenvalue is 0 or nan, or None.
        cos_bound: (L,) lower bound on cos(angle) from the bound on the condition number; 0 is no bound.
        cos_kernel_bound: (L,) lower bound on cos(angle) from the condition number of K_l itself.
        cos_exact: (L,) ``b^T K b / (|b| |K b|)``.
    """

    layers: list[str]
    jacobian_largest: Tensor
    jacobian_smallest: Tensor
    own_largest: Tensor
    own_smallest: Tensor
    largest_bound: Tensor
    smallest_bound: Tensor
    largest: Tensor
    smallest: Tensor
    reason: list[str | None]
    cos_bound: Tensor
    cos_kernel_bound: Tensor
    cos_exact: Tensor

    @property
    def condition_bound(self) -> Tensor:
        """(L,) bound on the condition number of K_l."""
        return _ratios(self.largest_bound, self.smallest_bound)

    @property
    def condition(self) -> Tensor:
        """(L,) condition number of K_l."""
        return _ratios(self.largest, self.smallest)

    def _columns(self) -> dict[str, list[Any]]:
        names = ("condition_bound", "condition", "cos_bound", "cos_kernel_bound", "cos_exact")
        columns: dict[str, list[Any]] = {"layer": self.layers}
        columns.update({name: getattr(self, name).tolist() for name in names})
        last = {"jacobian_condition": self.jacobian_largest.diagonal(-1) / self.jacobian_smallest.diagonal(-1)}
        columns["jacobian_condition"] = [math.nan, *last["jacobian_condition"].tolist()]
        return {**columns, "reason": self.reason}


def conditioning(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    layers: Selection = AUTO,
    lr: LearningRates = 1.0,
    parameters: str | None = None,
    dtype: torch.dtype | None = None,
    dense_below: int = 1024,
    chunk: int = 16,
) -> Conditioning:
    """Bound the angle of every layer through the singular values of the Jacobians between the layers.

    The layers have to be a chain of cuts: f_l depends on f_{l-1}, and on the parameters before it only through f_{l-1}
    (a residual stream, a plain network). With O_k the kernel at f_k of the parameters between f_{k-1} and f_k,

        K_l = sum over k <= l of J_kl O_k J_kl^T,        J_kl = df_l/df_k, J_ll = 1,

    and because the eigenvalues of a sum lie between the sums of the smallest and of the largest ones,

        lambda_max(K_l) <= sum smax(J_kl)^2 lambda_max(O_k),    lambda_min(K_l) >= sum smin(J_kl)^2 lambda_min(O_k),

    where smin(J) is the minimum of |J^T u| for |u| = 1. Their ratio bounds the condition number of K_l and thereby the
    angle: cos >= 2 sqrt(kappa)/(1 + kappa) for any b (:func:`kantorovich`), which applies to the actual update to first
    order because f_l is a cut. The bound is vacuous (0) if each term has a rank below N_l, as with more rows in a batch
    than dimensions of the preceding features. For many layers it is far from tight, because it admits the worst b.

    Intended for small problems: L^2/2 decompositions of size N, dense up to ``dense_below``, iterative above.

    Args:
        model: any network, as for :class:`BFK`.
        loss_fn: function of the model and the batch that returns the loss.
        batch: second argument of ``loss_fn``.
        layers: the layers, as for :class:`fastfs.Monitor`, in the order of the chain.
        lr: learning rates, as for :class:`BFK`.
        parameters: regular expression over parameter names, as for :class:`BFK`.
        dtype: dtype to compute in, as for :class:`BFK`.
        dense_below: largest size of a matrix that is formed.
        chunk: number of vectors multiplied at once.

    Returns:
        Singular values, eigenvalues and bounds per layer.

    Raises:
        ValueError: the layers are not a chain of cuts. The message names the layer and the reason.

    Source: section 3 of "The Feature Speed Formula", arXiv 2311.18718, where the angle is bounded by kappa(K_l).
    """
    lin = Linearization(model, loss_fn, batch, layers=layers, parameters=parameters, dtype=dtype)
    rates = resolve(lr, lin.names, lin.parameters)
    _check_chain(lin)
    size = len(lin.layers)
    own = torch.zeros(size, 2, dtype=torch.float64)
    kernel = torch.full((size, 2), math.nan, dtype=torch.float64)
    jacobian = torch.full((size, size, 2), math.nan, dtype=torch.float64)
    cos = torch.zeros(size, dtype=torch.float64)
    reason: list[str | None] = []
    for end in range(size):
        among = lin.structure.own[end].tolist()
        if any(among):
            found = extremes(BFK.of(lin, end, rates, among=among, chunk=chunk), dense_below=dense_below)
            own[end] = _pair(found.largest, found.smallest)
        for start in range(end):
            between = LayerJacobian.of(lin, start, end, chunk=chunk)
            ends = singular_values(between, dense_below=dense_below)
            smallest = ends.smallest if between.shape[0] <= between.shape[1] else 0.0
            jacobian[end, start] = _pair(ends.largest, smallest)
        jacobian[end, end] = 1.0
        whole = BFK.of(lin, end, rates, chunk=chunk)
        found = extremes(whole, dense_below=dense_below)
        kernel[end] = _pair(found.largest, found.smallest)
        reason.append(found.reason)
        cos[end] = whole.cos_angle().cpu()
    bound = torch.stack([(jacobian[end, : end + 1].square() * own[: end + 1]).sum(dim=0) for end in range(size)])
    return Conditioning(
        layers=[layer.name for layer in lin.layers],
        jacobian_largest=jacobian[..., 0],
        jacobian_smallest=jacobian[..., 1],
        own_largest=own[:, 0],
        own_smallest=own[:, 1],
        largest_bound=bound[:, 0],
        smallest_bound=bound[:, 1],
        largest=kernel[:, 0],
        smallest=kernel[:, 1],
        reason=reason,
        cos_bound=_cosines(bound),
        cos_kernel_bound=_cosines(kernel),
        cos_exact=cos,
    )


def _pair(largest: float, smallest: float) -> Tensor:
    return torch.tensor([largest, smallest], dtype=torch.float64)


def _check_chain(lin: Linearization) -> None:
    structure = lin.structure
    for layer, reason in zip(lin.layers, structure.reason, strict=True):
        if reason is not None:
            raise ValueError(f"layers: expected a chain of cuts, but layer {layer.name!r} is not a cut: {reason}")
    for before, after in zip(lin.layers, lin.layers[1:], strict=False):
        if bool((structure.upstream[before.index] & ~structure.upstream[after.index]).any()):
            raise ValueError(
                f"layers: expected a chain in the order of the forward; {after.name!r} does not depend on all "
                f"parameters that {before.name!r} depends on"
            )


def _ratios(largest: Tensor, smallest: Tensor) -> Tensor:
    pairs = zip(largest.tolist(), smallest.tolist(), strict=True)
    return torch.tensor([condition_of(a, b) for a, b in pairs], dtype=torch.float64)


def _cosines(ends: Tensor) -> Tensor:
    conditions = _ratios(ends[:, 0], ends[:, 1]).clamp_min(1.0)  # 1 - eps is rounding of 1
    return torch.tensor([kantorovich(c) for c in conditions.tolist()], dtype=torch.float64)
